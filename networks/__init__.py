"""Networks as plain `nn.Module`s: float images [B, 3, 32, 32] in, logits [B, classes] out."""

from jsonargparse.typing import PositiveInt

from networks.convnet import ConvNet
from networks.deep_convnet import DeepConvNet
from networks.library import has_large_stem, library_network
from networks.max_pool import MaxPool2x2
from networks.speedrun import SpeedrunNet


def default_network(num_classes: PositiveInt = 10) -> ConvNet:
    """Return the network of runs that name none. It takes no other arguments: a network of another
    class would inherit the values of any with the same name."""
    return ConvNet(num_classes=num_classes)


__all__ = [
    "ConvNet", "DeepConvNet", "MaxPool2x2", "SpeedrunNet", "default_network", "has_large_stem",
    "library_network",
]  # fmt: skip
