"""The ConvNet of the course report: three convolutions, three dense layers."""

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from networks.max_pool import MaxPool2x2


def _stage(conv: nn.Conv2d) -> nn.Sequential:
    """Convolve, normalise, pool, rectify: [B, in, H, W] -> [B, out, H/2, W/2].

    The report rectifies before pooling. The values are the same, because ReLU and maximum commute,
    but here ReLU has a quarter as many to process.
    """
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), MaxPool2x2(), nn.ReLU())


class ConvNet(nn.Module):
    """Three convolutions and three dense layers, 78,658 parameters by default.

    | layer                                     | output          |
    | ----------------------------------------- | --------------- |
    | conv 5x5, batch norm, max pool 2x2, ReLU  | [B, 6, 16, 16]  |
    | conv 3x3, batch norm, max pool 2x2, ReLU  | [B, 16, 8, 8]   |
    | conv 3x3, batch norm, max pool 2x2, ReLU  | [B, 32, 4, 4]   |
    | dense, ReLU                               | [B, 120]        |
    | dense, ReLU                               | [B, dense_units] |
    | dense                                     | [B, num_classes] |

    Args:
        dense_units: Width of the second dense layer: 84 in the assignment, 80 in the report's code
            (78,134 parameters).
        width: Multiplier of the convolutions' channels.
        dropout: Probability in [0, 1] that a feature is dropped before each of the first two dense
            layers.
        num_classes: Number of classes.

    """

    def __init__(
        self,
        dense_units: PositiveInt = 84,
        width: PositiveInt = 1,
        dropout: ClosedUnitInterval = 0.0,
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__()
        self.conv1 = _stage(nn.Conv2d(3, 6 * width, 5, padding=2, padding_mode="reflect"))
        self.conv2 = _stage(nn.Conv2d(6 * width, 16 * width, 3, padding=1))
        self.conv3 = _stage(nn.Conv2d(16 * width, 32 * width, 3, padding=1))
        self.flatten = nn.Flatten()
        self.dropout = dropout
        self.dense1 = nn.Sequential(nn.Linear(32 * width * 4 * 4, 120), nn.ReLU())
        self.dense2 = nn.Sequential(nn.Linear(120, dense_units), nn.ReLU())
        self.dense3 = nn.Linear(dense_units, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32] in [0, 1] to logits [B, num_classes]."""
        # Channels last makes the backward pass of the second and third stage a third faster; the
        # first has too few channels to benefit.
        features = self.conv1(images).contiguous(memory_format=torch.channels_last)
        features = self.flatten(self.conv3(self.conv2(features)))
        features = self.dense1(F.dropout(features, self.dropout, self.training))
        return self.dense3(self.dense2(F.dropout(features, self.dropout, self.training)))
