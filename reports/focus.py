"""Grad-CAM: where in an image a network looks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 3  # pixels per side of a feature map


@torch.inference_mode(False)  # Lightning predicts in inference mode
@torch.enable_grad()
def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor | None:
    """Return which parts of float images [B, 3, H, W] support classes int64 [B], as float [B, H, W]
    in [0, 1]; None for a network without square feature maps of at least 3 x 3 pixels.

    Grad-CAM (Selvaraju et al., arXiv 1610.02391) on the last such maps that a module returns, so
    after batch norm and activation: their sum, weighted by the logit's mean gradients, clipped at 0
    and scaled to a maximum of 1.
    """
    maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # Not a transformer's [B, H, W, C], where W is not C.
        if isinstance(output, Tensor) and output.ndim == 4:
            height, width = output.shape[2:]
            if height == width >= LEAST:
                maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.modules()]
    try:
        weights = next(network.parameters())  # may have 16 bits
        logits = network(images.detach().to(weights.dtype, copy=True).requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        return None
    score = logits.gather(1, classes[:, None].clone()).sum()
    (gradients,) = torch.autograd.grad(score, maps[-1])
    shares = gradients.float().mean(dim=(2, 3), keepdim=True)
    heat = (shares * maps[-1].detach()).sum(dim=1, keepdim=True).relu()
    heat = heat / heat.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]
