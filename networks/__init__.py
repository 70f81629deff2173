"""Networks as plain `nn.Module`s: float images [B, 3, 32, 32] in, logits [B, 10] out."""

from networks.convnet import ConvNet
from networks.deep_convnet import DeepConvNet
from networks.max_pool import MaxPool2x2
from networks.speedrun import SpeedrunNet

__all__ = ["ConvNet", "DeepConvNet", "MaxPool2x2", "SpeedrunNet"]
