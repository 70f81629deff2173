"""Networks from torchvision and timm, adapted to 32 x 32 images."""

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
    """Return a torchvision or timm network: float images to logits [B, num_classes].

    Args:
        name: `resnet18` or another torchvision model (`torchvision.models.list_models()`), or
            `timm/resnet18` (`timm.list_models()`), with random weights.
        stem: For ResNets, whose `own` stem reduces 32 x 32 pixels to 8 x 8 before the first block.
            `small`: a 3 x 3 convolution with stride 1 and no pooling, as in He et al., arXiv
            1512.03385, section 4.2, for CIFAR-10. Other networks keep theirs.
        arguments: Further arguments of the network, such as timm's {img_size: 32, patch_size: 4}.
        num_classes: Number of classes.

    Raises:
        ValueError: There is no such network, or it rejects its arguments.
        ImportError: timm is not installed.

    """
    model = name.removeprefix("timm/")
    if name != model:
        try:
            from timm import create_model, list_models  # an optional dependency
        except ImportError as error:
            raise ImportError("timm is not installed: pip install timm") from error
    else:
        create_model = torchvision.models.get_model
        list_models = partial(torchvision.models.list_models, torchvision.models)
    known = [f"timm/{other}" if name != model else other for other in list_models()]
    if name not in known:
        suggestions = " or ".join(get_close_matches(name, known, n=2))
        hint = f": did you mean {suggestions}?" if suggestions else ""
        raise ValueError(f"there is no network {name}{hint}")
    try:
        network: Any = create_model(model, num_classes=num_classes, **(arguments or {}))
    except TypeError as error:  # from its arguments
        raise ValueError(f"{name}: {error}") from error
    if hasattr(network, "aux_logits"):  # further outputs in training
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
    """Return whether a network starts like ResNets for large images, with a stride-2 convolution
    and max pooling."""
    first, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    first = first[0] if isinstance(first, nn.Sequential) else first
    has_stride_2 = isinstance(first, nn.Conv2d) and first.stride == (2, 2)
    return has_stride_2 and isinstance(pool, nn.MaxPool2d)
