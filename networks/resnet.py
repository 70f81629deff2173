"""The network that most people mean by a baseline on CIFAR-10."""

import torch
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock


def resnet18() -> ResNet:
    """Return torchvision's ResNet-18 with CIFAR-10's stem, 11,173,962 parameters: images
    [B, 3, 32, 32] to logits [B, 10].

    He et al., arXiv 1512.03385. Made for images of 224 pixels, it halves 32 pixels twice before its
    first block; here the first convolution is 3x3 with stride 1, and no pooling follows.
    """
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network.to(memory_format=torch.channels_last)
