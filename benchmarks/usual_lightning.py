"""(b) The usual Lightning way: the loader of (a), `self.log` and a metric in every step."""

import os
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.common import BATCH_SIZE, NETWORKS, image_sets, parsed
from benchmarks.report_loop import Pictures
from cifar10.batches import Batches
from datamodule import EVAL_BATCH_SIZES


class LitClassifier(L.LightningModule):
    """A LightningModule as most tutorials write it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 10]."""
        return self.network(images / 255 if images.dtype == torch.uint8 else images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels, *_ = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_acc(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels, *_ = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=5e-4)


def main() -> None:
    """Train until the process is stopped."""
    args = parsed()
    L.seed_everything(0)
    train_set, val_set = image_sets(args.root)
    train_loader: Iterable[Any]
    val_loader: Iterable[Any]
    if args.in_memory:  # the cost of Lightning alone, without that of the loader
        train_set, val_set = train_set.to(args.device), val_set.to(args.device)
        train_loader = Batches(train_set, BATCH_SIZE, order=lambda: torch.randperm(40_000))
        val_loader = Batches(val_set, EVAL_BATCH_SIZES[args.device])
    else:
        # Workers help where there are cores for them; with two cores they slow it down.
        cores = os.cpu_count() or 1
        workers: dict[str, Any] = (
            {"num_workers": 8, "persistent_workers": True, "pin_memory": args.device == "cuda"}
            if cores >= 12
            else {}
        )
        train_loader = DataLoader(Pictures(train_set), BATCH_SIZE, shuffle=True, **workers)
        val_loader = DataLoader(Pictures(val_set), BATCH_SIZE, **workers)
    trainer = L.Trainer(
        accelerator=args.device,
        devices=1,
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.folder, "", ""),
        callbacks=[
            ModelCheckpoint(args.folder / "checkpoints", "epoch_{epoch:02d}", save_top_k=-1)
        ],
        enable_progress_bar=not args.in_memory,
    )
    trainer.fit(LitClassifier(NETWORKS[args.network]()), train_loader, val_loader)


if __name__ == "__main__":
    main()
