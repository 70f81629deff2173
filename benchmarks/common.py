"""What all measurements share: networks, made-up images, and how figures are summed up."""

import datetime
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from networks import ConvNet
from runs import processor

HERE = Path(__file__).parent.parent


class PlainConvNet(ConvNet):
    """The report's network as it is usually written, with ReLU before PyTorch's max pooling."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("conv1", "conv2", "conv3"):
            conv, norm, *_ = getattr(self, name)
            setattr(self, name, nn.Sequential(conv, norm, nn.ReLU(), nn.MaxPool2d(2)))
        self.to(memory_format=torch.contiguous_format)


class Tiny(nn.Linear):
    """Maps ten pixels to logits, so that nearly all of a step's time is the loop around it."""

    def __init__(self) -> None:
        super().__init__(10, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, 32, 32] to logits [B, 10]."""
        return super().forward(images[:, 0, 0, :10])


NETWORKS = {"ConvNet": ConvNet, "PlainConvNet": PlainConvNet, "Tiny": Tiny}


def make_synthetic(root: Path, size: int) -> None:
    """Write images whose classes are patterns of colour plus noise, in the form of CIFAR-10."""
    folder = root / "cifar-10-arrays"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 128, (10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    for part, count in (("train", size), ("test", size // 5)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = patterns[labels] + rng.integers(0, 128, (count, 3, 32, 32))
        np.save(folder / f"{part}_images.npy", images.astype(np.uint8))
        np.save(folder / f"{part}_labels.npy", labels)


def machine(device: str) -> dict[str, Any]:
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


def summary(turns: Sequence[float]) -> dict[str, Any]:
    """Return median and range of a figure, with all turns."""
    found = {"median": statistics.median(turns), "low": min(turns), "high": max(turns)}
    return {**{key: round(value, 4) for key, value in found.items()}, "turns": list(turns)}


def shown(figure: Any) -> str:
    """Return a figure as text, of turns the median and the range."""
    if isinstance(figure, dict) and len(figure["turns"]) > 1:
        return "{median:.4g} ({low:.4g} to {high:.4g})".format(**figure)
    return str(figure["median"] if isinstance(figure, dict) else figure)
