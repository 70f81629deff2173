"""Where in an image a network looks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 4  # pixels a side, of the maps of a convolution


@torch.inference_mode(False)  # in which Lightning predicts
@torch.enable_grad()
def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor | None:
    """Return which parts of float images [B, 3, H, W] speak for classes int64 [B], in [0, 1], as
    float [B, H, W]; None for a network without convolutions that leave at least 4 x 4 pixels.

    Grad-CAM (Selvaraju et al., arXiv 1610.02391) of the last such convolution: the mean of its
    maps, each weighted by how much the logit of the class rises with it, where that is positive.
    """
    maps: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        weights = next(network.parameters())  # perhaps of 16 bits
        logits = network(images.detach().to(weights.dtype, copy=True).requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    large = [one for one in maps if min(one.shape[2:]) >= LEAST]
    if not large:
        return None
    score = logits.gather(1, classes[:, None].clone()).sum()
    (gradients,) = torch.autograd.grad(score, large[-1])
    shares = gradients.float().mean(dim=(2, 3), keepdim=True)
    found = (shares * large[-1].detach()).sum(dim=1, keepdim=True).relu()
    found = found / found.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return F.interpolate(found, images.shape[2:], mode="bilinear")[:, 0]
