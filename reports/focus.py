"""Where in an image a network looks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 3  # pixels a side, of the maps


@torch.inference_mode(False)  # in which Lightning predicts
@torch.enable_grad()
def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor | None:
    """Return which parts of float images [B, 3, H, W] speak for classes int64 [B], in [0, 1], as
    float [B, H, W]; None for a network without maps of at least 3 x 3 pixels.

    Grad-CAM (Selvaraju et al., arXiv 1610.02391) of the last such maps that a module returns, so
    behind batch norm and activation: their mean, each weighted by how much the logit of the class
    rises with it, where that is positive.
    """
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # A transformer's [B, H, W, C] is not square.
        if isinstance(output, Tensor) and output.ndim == 4:
            height, width = output.shape[2:]
            if height == width >= LEAST:
                maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        weights = next(network.parameters())  # perhaps of 16 bits
        logits = network(images.detach().to(weights.dtype, copy=True).requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        return None
    score = logits.gather(1, classes[:, None].clone()).sum()
    (gradients,) = torch.autograd.grad(score, maps[-1])
    shares = gradients.float().mean(dim=(2, 3), keepdim=True)
    found = (shares * maps[-1].detach()).sum(dim=1, keepdim=True).relu()
    found = found / found.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return F.interpolate(found, images.shape[2:], mode="bilinear")[:, 0]
