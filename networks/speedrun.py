"""The networks of the speedruns to 94 % and 96 % test accuracy.

From Jordan, arXiv 2404.00498, as simplified in his `airbench94_muon.py` and deepened in
`airbench96_faster.py` (github.com/KellerJordan/cifar10-airbench).
"""

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

# Added to the patches' variance along each direction, so that noise isn't amplified like signal.
WHITENING_EPS = 5e-4


class Stage(nn.Module):
    """Two or three convolutions: [B, channels_in, H, W] -> [B, channels, H/2, W/2]."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        dirac: bool,
        norm_momentum: float,
        learn_scale: bool,
        residual: bool,
    ) -> None:
        super().__init__()

        def layer(channels_in: int, padding: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
            conv = nn.Conv2d(channels_in, channels, 3, padding=padding, bias=False)
            norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=norm_momentum)
            if dirac:  # the first filters copy their input; the others stay random
                nn.init.dirac_(conv.weight.data[:channels_in])
            norm.weight.requires_grad_(learn_scale)
            return conv, norm

        self.conv1, self.norm1 = layer(channels_in, padding=0)
        self.conv2, self.norm2 = layer(channels)
        self.is_residual = residual
        if residual:
            self.conv3, self.norm3 = layer(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Pool before batch norm, which leaves a quarter as much to normalise."""
        # No padding on the far sides of an odd size: pooling would drop the last row and column.
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1 - width % 2, 1, 1 - height % 2))
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(padded), 2)))
        y = F.gelu(self.norm2(self.conv2(x)))
        return F.gelu(self.norm3(self.conv3(y)) + x) if self.is_residual else y


class SpeedrunNet(nn.Module):
    """A whitening convolution, six others and a dense layer, 1,972,792 parameters by default.

    | layer                                             | output          |
    | ------------------------------------------------- | --------------- |
    | conv 2x2, GELU                                    | [B, 24, 31, 31] |
    | conv 3x3, max pool 2x2, batch norm, GELU          | [B, 64, 15, 15] |
    | conv 3x3, batch norm, GELU                        | [B, 64, 15, 15] |
    | the same two with 256 channels                    | [B, 256, 7, 7]  |
    | and again                                         | [B, 256, 3, 3]  |
    | global max pool, dense without bias               | [B, num_classes] |

    Args:
        widths: Channels of the three stages. With fewer than 24 in the first, `dirac` passes on
            only some of the first layer's channels.
        whiten: Compute the first layer's filters from training images and train only its bias.
            Otherwise they start random and are trained.
        dirac: Initialise the other convolutions as the identity, as far as their channels allow.
        norm_momentum: Share of the newest batch in batch norm's running statistics, in [0, 1].
        learn_scale: Train batch norm's scale as well as its bias.
        residual: Add a third convolution to each stage, with a skip connection from the first.
        num_classes: Number of classes.

    """

    def __init__(
        self,
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (64, 256, 256),
        whiten: bool = True,
        dirac: bool = True,
        norm_momentum: ClosedUnitInterval = 0.4,
        learn_scale: bool = False,
        residual: bool = False,
        num_classes: PositiveInt = 10,
    ) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(not whiten)
        self.groups = nn.Sequential(
            *(
                Stage(channels_in, channels, dirac, norm_momentum, learn_scale, residual)
                for channels_in, channels in zip((24, *widths), widths, strict=False)
            )
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        # Small initial logits: the loss starts at that of a uniform guess.
        self.head.weight.data /= self.head.weight.data.std() * widths[-1]
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_from(self, images: Tensor) -> None:
        """Make the first layer whiten 2x2 patches: over those of training images, float
        [N, 3, 32, 32], its outputs are uncorrelated, with variance 1, or less in directions with
        hardly any. Each filter has a negated twin, as GELU cuts off one sign (section 3.2)."""
        if self.whiten.weight.requires_grad:
            return
        patches = F.unfold(images, self.whiten.kernel_size)  # [N, 12, patches per image]
        # Averaged over images in 64 bits, so that all devices agree on small variances too.
        covariance = (patches @ patches.mT).double().mean(0).cpu() / patches.shape[2]
        variances, directions = torch.linalg.eigh(covariance)
        filters = (directions / (variances + WHITENING_EPS).sqrt()).T
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W], H and W at least 9, to logits [B, num_classes]."""
        x = F.gelu(self.whiten(images.contiguous(memory_format=torch.channels_last)))
        x = self.groups(x)
        return self.head(F.max_pool2d(x, x.shape[2:]).flatten(1))
