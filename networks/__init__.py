"""Networks as plain `nn.Module`s: float images [B, 3, 32, 32] in, logits [B, 10] out."""

from networks.convnet import ConvNet

__all__ = ["ConvNet"]
