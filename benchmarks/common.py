"""What all ways of training share: the networks, the images, and the marks that they leave."""

import argparse
import datetime
import platform
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from cifar10 import archive
from cifar10.batches import ImageSet, split
from networks import ConvNet
from runs import processor

BATCH_SIZE, VAL_SIZE = 128, 10_000


class PlainConvNet(ConvNet):
    """The report's network as it is usually written, with ReLU before PyTorch's max pooling."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "conv2", "conv3"):
            conv, norm, _, relu = getattr(self, name)
            setattr(self, name, nn.Sequential(conv, norm, relu, nn.MaxPool2d(2)))
        self.to(memory_format=torch.contiguous_format)


class Nothing(nn.Module):
    """Computes next to nothing, so that what is left of a step's time is the loop around it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 10]."""
        return images[:, 0, 0, :10] * 0 + self.bias


NETWORKS = {"ConvNet": ConvNet, "PlainConvNet": PlainConvNet, "Nothing": Nothing}


def parsed() -> argparse.Namespace:
    """Return the command line of a way of training."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", default="data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--network", choices=NETWORKS, default="ConvNet")
    parser.add_argument("--in_memory", action="store_true", help="of (b): no DataLoader, no bar")
    parser.add_argument("--best", action="store_true", help="(d) in place of (c)")
    parser.add_argument("--epochs", type=int, default=1_000_000)
    parser.add_argument("--val_size", type=int, default=VAL_SIZE)
    parser.add_argument("--unverified", action="store_true", help="images that are not CIFAR-10's")
    return parser.parse_args()


def machine(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def now() -> float:
    """Return the time in seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def image_sets(
    root: str, val_size: int = VAL_SIZE, verify: bool = True
) -> tuple[ImageSet, ImageSet]:
    """Return training and validation set, as `configs/base.yaml` splits them."""
    data = archive.load(root, verify=verify)
    indices = split(len(data.train_labels), val_size, seed=0)
    train, val = (ImageSet(data.train_images, data.train_labels.long(), i) for i in indices)
    return train, val


class Marks:
    """Leaves at the end of every epoch what any run leaves: a checkpoint, curves, and a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"
        self.folder.mkdir(parents=True)
        self.writer = SummaryWriter(folder)

    def leave(
        self,
        epoch: int,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        **metrics: float,
    ) -> None:
        """Leave the marks of an epoch."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, epoch)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, self.folder / f"epoch_{epoch:02d}.ckpt")
        print(
            f"epoch {epoch}",
            *(f"{name} {value:.4f}" for name, value in metrics.items()),
            flush=True,
        )
