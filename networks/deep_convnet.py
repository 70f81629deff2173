"""A larger version of the report's ConvNet, as its discussion suggests."""

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F


def _convs(channels_in: int, channels: int, count: int) -> nn.Sequential:
    """Convolve, normalise and rectify `count` times, then pool: [B, in, H, W] -> [B, C, H/2, W/2].

    As in `ConvNet`, the last ReLU comes after pooling.
    """
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(channels)]
        layers += [nn.ReLU()] if i < count - 1 else [nn.MaxPool2d(2), nn.ReLU()]
        channels_in = channels
    return nn.Sequential(*layers)


class DeepConvNet(nn.Module):
    """Five convolutions and two dense layers, 541,738 parameters by default.

    | layer                                         | output           |
    | --------------------------------------------- | ---------------- |
    | conv 3x3, batch norm, max pool 2x2, ReLU      | [B, 32, 16, 16]  |
    | conv 3x3 twice, then the same                 | [B, 64, 8, 8]    |
    | conv 3x3 twice, then the same                 | [B, 128, 4, 4]   |
    | dense, ReLU                                   | [B, 128]         |
    | dense                                         | [B, num_classes] |

    Args:
        channels: Channels of the three stages.
        dense_units: Width of the first dense layer.
        dropout: Probability in [0, 1] that a feature is dropped before each dense layer.
        num_classes: Number of classes.

    """

    def __init__(
        self,
        channels: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 64, 128),
        dense_units: PositiveInt = 128,
        dropout: ClosedUnitInterval = 0.0,
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.conv1 = _convs(3, first, 1)
        self.conv2 = _convs(first, second, 2)
        self.conv3 = _convs(second, third, 2)
        self.dropout = dropout
        self.dense1 = nn.Linear(third * 4 * 4, dense_units)
        self.dense2 = nn.Linear(dense_units, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32] to logits [B, num_classes]."""
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.conv3(self.conv2(self.conv1(images))).flatten(1)
        features = F.relu(self.dense1(F.dropout(features, self.dropout, self.training)))
        return self.dense2(F.dropout(features, self.dropout, self.training))
