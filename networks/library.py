"""Networks of torchvision and timm, made for images of 32 x 32 pixels."""

from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
import torchvision
from jsonargparse.typing import PositiveInt
from torch import nn


def library_network(
    name: str,
    stem: Literal["small", "own"] = "small",
    arguments: dict[str, Any] | None = None,
    num_classes: PositiveInt = 10,
) -> nn.Module:
    """Return a network of torchvision's or timm's: float images to logits [B, num_classes].

    Args:
        name: `resnet18` or another of torchvision's (`torchvision.models.list_models()`), or
            `timm/resnet18` (`timm.list_models()`). It begins with random weights.
        stem: Of the ResNet family, whose own stem makes 8 x 8 pixels of 32 x 32 before the first
            block. `small`: a convolution of 3 x 3 with stride 1 and no pooling, as He et al., arXiv
            1512.03385, section 4.2, have it for CIFAR-10. Others keep theirs.
        arguments: Further arguments of the network, such as timm's {img_size: 32, patch_size: 4}.
        num_classes: Of the images.

    Raises:
        ValueError: There is no such network, or it refuses its arguments.
        ImportError: timm is not installed.

    """
    model = name.removeprefix("timm/")
    if name != model:
        try:
            from timm import create_model, list_models  # an extra
        except ImportError as error:
            raise ImportError("timm is not installed: pip install timm") from error
    else:
        create_model = torchvision.models.get_model
        list_models = partial(torchvision.models.list_models, torchvision.models)
    known = [f"timm/{other}" if name != model else other for other in list_models()]
    if name not in known:
        near = " or ".join(get_close_matches(name, known, n=2))
        raise ValueError(f"there is no network {name}" + f": did you mean {near}?" * bool(near))
    try:
        network: Any = create_model(model, num_classes=num_classes, **(arguments or {}))
    except TypeError as error:  # of its arguments
        raise ValueError(f"{name}: {error}") from error
    if hasattr(network, "aux_logits"):  # which would be further outputs in training
        network.aux_logits = False
    if stem == "small" and has_large_stem(network):
        if isinstance(network.conv1, nn.Conv2d):
            network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:  # three convolutions of 3 x 3, the first with stride 2
            network.conv1[0].stride = (1, 1)
        network.maxpool = nn.Identity()
    return network.to(memory_format=torch.channels_last)


def has_large_stem(network: nn.Module) -> bool:
    """Return whether a network begins as ResNets for large images do: with a convolution of stride
    2, and pooling."""
    first, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    first = first[0] if isinstance(first, nn.Sequential) else first
    halves = isinstance(first, nn.Conv2d) and first.stride == (2, 2)
    return halves and isinstance(pool, nn.MaxPool2d)
