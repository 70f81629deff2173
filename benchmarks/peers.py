"""Common training loops that `python -m benchmarks` compares with this project.

    python -m benchmarks.peers FOLDER --way c --epochs 3

a  the report's loop, as courses teach it: PIL images, ToTensor, DataLoader, `.item()`
b  the usual Lightning way: the same loader, `self.log` and a metric in each step
c  a bare eager loop on tensors in memory
d  the same, keeping freed memory; on a GPU each step is compiled and recorded as one CUDA graph
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import CIFAR10

from cifar10.batches import Batches, ImageSet
from cuda_graph import RecordedStep
from datamodule import EVAL_BATCH_SIZES, CIFAR10DataModule
from memory import keep_freed_memory
from networks import ConvNet

BATCH_SIZE, LR = 128, 5e-4  # as in configs/base.yaml

Loader = Iterable[Any]


class PlainConvNet(ConvNet):
    """The report's network as usually written, with ReLU before PyTorch's max pooling."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "conv2", "conv3"):
            conv, norm, *_ = getattr(self, name)
            setattr(self, name, nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2)))
        self.to(memory_format=torch.contiguous_format)


class Tiny(nn.Linear):
    """Maps ten pixels to logits, so that nearly all of a step's time is loop overhead."""

    def __init__(self) -> None:
        super().__init__(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 10]."""
        return super().forward(images[:, 0, 0, :10])


NETWORKS = {"ConvNet": ConvNet, "PlainConvNet": PlainConvNet, "Tiny": Tiny}


class Pictures(CIFAR10):  # type: ignore[misc]
    """torchvision's data set, on images already in memory."""

    def __init__(self, image_set: ImageSet) -> None:
        images, labels, _ = image_set.batch(image_set.indices)
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform = transforms.ToTensor()
        self.target_transform = None


def floats(images: Tensor) -> Tensor:
    """Return images in [0, 1], where `ToTensor`'s already are."""
    return images / 255 if images.dtype == torch.uint8 else images


def loop(args: argparse.Namespace, network: nn.Module, train: Loader, val: Loader) -> None:
    """Train as (a), (c) or (d); after each epoch, write a checkpoint and curves, print a line."""
    device, waits = args.device, args.way == "a"
    has_graph = args.way == "d" and device == "cuda"
    network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, fused=not waits)
    sums = torch.zeros(2, device="cpu" if waits else device)  # of losses, of correct predictions

    def loss_of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = network(floats(images))
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()

    best_loss = torch.compile(loss_of, dynamic=False) if has_graph else loss_of

    def add_up(loss: Tensor, correct: Tensor, size: int) -> None:
        sums[0] += loss.item() * size if waits else loss.detach() * size
        sums[1] += correct.item() if waits else correct

    def step(images: Tensor, labels: Tensor) -> None:
        is_whole = len(labels) == BATCH_SIZE  # compiling for the tail doesn't pay
        loss, correct = (best_loss if is_whole else loss_of)(images, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        add_up(loss, correct, len(labels))

    train_step: Callable[..., None] = step
    if has_graph:
        train_step = RecordedStep(step, optimizer, {"capturable": True})
    (args.folder / "checkpoints").mkdir(parents=True)
    writer = SummaryWriter(args.folder)
    for epoch in range(args.epochs):
        metrics = {}
        for stage, loader in (("train", train), ("val", val)):
            network.train(stage == "train")
            sums.zero_()
            seen = 0
            for images, labels, *_ in loader:
                images, labels = images.to(device), labels.to(device)
                seen += len(labels)
                if stage == "train":
                    train_step(images, labels)
                else:
                    with torch.no_grad():
                        add_up(*loss_of(images, labels), len(labels))
            metrics[f"{stage}_loss"], metrics[f"{stage}_acc"] = (sums / seen).tolist()
        for name, value in metrics.items():
            writer.add_scalar(name, value, epoch)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, args.folder / "checkpoints" / f"epoch_{epoch:02d}.ckpt")
        print(f"epoch {epoch}", *(f"{key} {v:.4f}" for key, v in metrics.items()), flush=True)


class LitClassifier(L.LightningModule):
    """A LightningModule as most tutorials write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def _step(self, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(floats(images))
        loss, accuracy = F.cross_entropy(logits, labels), getattr(self, f"{stage}_acc")
        accuracy(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log(f"{stage}_acc", accuracy, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return self._step("train", *batch[:2])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._step("val", *batch[:2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=LR)


def lightning(args: argparse.Namespace, network: nn.Module, train: Loader, val: Loader) -> None:
    """Train as (b)."""
    checkpoint = ModelCheckpoint(args.folder / "checkpoints", "epoch_{epoch:02d}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator=args.device,
        devices=1,
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.folder, "", ""),
        callbacks=[checkpoint],
        enable_progress_bar=False,  # the others have none
    )
    trainer.fit(LitClassifier(network), train, val)


def main() -> None:
    """Train until the epochs are done or the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="folder for checkpoints and curves")
    parser.add_argument("--way", choices="abcd", required=True)
    parser.add_argument("--root", default="data", help="folder of the images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=NETWORKS, default="ConvNet")
    parser.add_argument("--epochs", type=int, default=1_000_000)
    parser.add_argument("--val_size", type=int, default=10_000)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.way == "d":
        keep_freed_memory()
    # Made-up images are fine here; only (e) refuses all but CIFAR-10's, unless told otherwise.
    data = CIFAR10DataModule(args.root, verify=False, val_size=args.val_size)
    data.setup()
    train_set, val_set = data.train_set, data.val_set
    loaders: list[Loader]
    if args.way in "cd" or args.network == "Tiny":  # no DataLoader to measure
        train_set, val_set = train_set.to(args.device), val_set.to(args.device)
        loaders = [Batches(train_set, BATCH_SIZE, order=lambda: torch.randperm(len(train_set)))]
        loaders += [Batches(val_set, EVAL_BATCH_SIZES[args.device])]
    else:
        options: dict[str, Any] = {"batch_size": BATCH_SIZE}
        if args.way == "b" and (os.cpu_count() or 1) >= 12:  # workers slow it down on two cores
            options |= {"num_workers": 8, "persistent_workers": True}
        loaders = [DataLoader(Pictures(train_set), shuffle=True, **options)]
        loaders += [DataLoader(Pictures(val_set), **options)]
    (lightning if args.way == "b" else loop)(args, NETWORKS[args.network](), *loaders)


if __name__ == "__main__":
    main()
