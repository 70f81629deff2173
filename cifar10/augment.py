"""Data augmentation: from a batch of pixels to augmented images, on the training device.

Every training batch passes through `Augment`. The other classes are its steps, listed in
`data.augment`:

    data:
      augment:
        - class_path: cifar10.augment.RandomCrop
          init_args: {padding: 4}
        - class_path: cifar10.augment.RandomFlip

The steps run in training only, in the given order, on float images in [0, 1]. The random ones here
choose for each image separately; only `ForEachImage` loops over images. torchvision's MixUp and
CutMix also work as steps: they mix labels along with images.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

# Per channel, over all pixels of the 50,000 training images in [0, 1].
MEAN = (0.49140, 0.48216, 0.44653)
STD = (0.24703, 0.24349, 0.26159)


class Augment(nn.Module):
    """Converts the pixels of training images to floats in [0, 1], as torchvision's `ToTensor` does,
    and applies the steps.

    Args:
        steps: Modules that map float images [B, 3, H, W] to float images. A step that has
            `mixes_labels`, or contains torchvision's `MixUp` or `CutMix`, maps images and labels to
            images and probabilities [B, classes]. Before each epoch, a step's `set_progress` gets
            the share of training done, in [0, 1). It may return False if nothing changes.
        seed: With an image's index, decides in which epochs `AlternatingFlip` mirrors it.

    """

    epoch: Tensor

    def __init__(self, steps: Sequence[nn.Module] = (), seed: int = 0) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.seed = seed
        self.mixes = [_mixes_labels(step) for step in steps]
        # A tensor: for a Python number, `torch.compile` would recompile every epoch.
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, pixels: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Map a batch, pixels uint8 [B, 3, 32, 32], labels and indices int64 [B], to float images
        and targets: labels, or probabilities [B, classes]."""
        images = pixels / 255
        for step, mixes in zip(self.steps, self.mixes, strict=True):
            if mixes:
                images, labels = _mix(step, images, labels)
            elif getattr(step, "is_by_epoch", False):
                images = step(images, indices, self.epoch, self.seed)
            else:
                images = step(images)
        return images, labels

    @property
    def growing(self) -> list[nn.Module]:
        """The modules that follow training progress."""
        return [module for module in self.steps.modules() if hasattr(module, "set_progress")]

    def begin_epoch(self, epoch: int, progress: float) -> bool:
        """Pass the epoch and the share of training done, in [0, 1), to the steps. Return whether
        they may have changed."""
        self.epoch.fill_(epoch)
        changed = [m.set_progress(progress) is not False for m in self.growing]  # type: ignore[operator]
        return any(changed)


class ForEachImage(nn.Module):
    """Applies a transform to one image at a time. torchvision's random transforms need this: on a
    batch they make one random choice for all images.

    Args:
        transform: Maps a float image [3, 32, 32] to a float image.

    """

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        """Transform images [B, 3, 32, 32] one by one."""
        return torch.stack([self.transform(image) for image in images])


class RandomCrop(nn.Module):
    """Pads by reflection and crops each image at a random position.

    The shift of He et al. (arXiv 1512.03385, section 4.2), who pad with zeros, combined with the
    reflection of Jordan (arXiv 2404.00498).

    Args:
        padding: Largest shift in pixels, in every direction, in [0, 31].

    """

    def __init__(self, padding: int = 4) -> None:
        super().__init__()
        if not 0 <= padding <= 31:
            raise ValueError(f"padding {padding} is not in [0, 31]")
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Shift images [B, C, H, W]."""
        batch_size, _, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        places = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2p + 1, 2p + 1, H, W]
        rows, columns = torch.randint(2 * self.padding + 1, (2, batch_size), device=images.device)
        return places[torch.arange(batch_size, device=images.device), :, rows, columns]


class RandomFlip(nn.Module):
    """Mirrors each image left to right with probability 1/2."""

    def forward(self, images: Tensor) -> Tensor:
        """Mirror about half of the images [B, C, H, W]."""
        return _flip(images, torch.rand(len(images), device=images.device) < 0.5)


class GrowingResize(nn.Module):
    """Shrinks training images to sizes that grow during training, so that early epochs cost less.
    Needs a network that takes any image size; evaluation always uses full-size images.

    Progressive resizing, as in the CIFAR-10 speedruns of 2026
    (github.com/fulcrumresearch/cifar-10-speedrun). Bilinear, with anti-aliasing.

    Args:
        sizes: Side lengths in pixels, each for an equal share of training. The size changes only
            between epochs.

    """

    def __init__(self, sizes: Sequence[PositiveInt]) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes is empty")
        self.sizes = [int(size) for size in sizes]
        self.size = self.sizes[0]

    def set_progress(self, progress: float) -> bool:
        """Choose the size for a progress in [0, 1]; return whether it has changed."""
        previous = self.size
        self.size = self.sizes[min(int(progress * len(self.sizes) + 1e-6), len(self.sizes) - 1)]
        return self.size != previous

    def forward(self, images: Tensor) -> Tensor:
        """Resize images [B, C, H, W]."""
        if images.shape[2:] == (self.size, self.size):
            return images
        size = (self.size, self.size)
        # In float32: the CPU kernel doesn't support 16 bits.
        resized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return resized.to(images.dtype)


class AlternatingFlip(nn.Module):
    """Mirrors each image left to right in every other epoch, half of them in the first.

    Two consecutive epochs always show both sides of an image. Random flips show the same side twice
    half of the time (arXiv 2404.00498, section 3.6).
    """

    is_by_epoch = True  # `Augment` passes indices, epoch and seed

    def forward(self, images: Tensor, indices: Tensor, epoch: Tensor, seed: int) -> Tensor:
        """Mirror the images [B, C, H, W] whose turn it is in `epoch`, int64 []."""
        return _flip(images, (_coins(indices, seed) + epoch) % 2 == 1)


class Cutout(nn.Module):
    """Fills a square around a random pixel with one colour, clipped at the image border (DeVries
    and Taylor, arXiv 1708.04552).

    Args:
        size: Side of the square in pixels.
        fill: Red, green and blue in [0, 1]. Default: CIFAR-10's mean colour.

    """

    fill: Tensor

    def __init__(self, size: PositiveInt = 8, fill: tuple[float, float, float] = MEAN) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("fill", torch.tensor(fill).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Fill a square in each of the images [B, 3, H, W]."""
        inside = []
        for length in images.shape[2:]:
            centre = torch.randint(length, (len(images), 1), device=images.device)
            offset = torch.arange(length, device=images.device) - centre + self.size // 2
            inside.append((offset >= 0) & (offset < self.size))
        rows, columns = inside
        is_inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(is_inside, self.fill.to(images.dtype), images)


class RandomBrightness(nn.Module):
    """Multiplies each image by a random factor, as torchvision's `ColorJitter` does.

    Args:
        strength: The factor is uniform in [max(0, 1 - strength), 1 + strength].

    """

    def __init__(self, strength: NonNegativeFloat = 0.2) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, images: Tensor) -> Tensor:
        """Make images [B, C, H, W] in [0, 1] brighter or darker."""
        return (images * _factors(images, self.strength)).clamp(0, 1)


class RandomContrast(nn.Module):
    """Moves each image towards or away from its mean grey by a random factor, as torchvision's
    `ColorJitter` does.

    Args:
        strength: The factor is uniform in [max(0, 1 - strength), 1 + strength].

    """

    luma: Tensor

    def __init__(self, strength: NonNegativeFloat = 0.2) -> None:
        super().__init__()
        self.strength = strength
        luma = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
        self.register_buffer("luma", luma, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Change the contrast of images [B, 3, H, W] in [0, 1]."""
        grey = (images * self.luma.to(images.dtype)).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return (grey + (images - grey) * _factors(images, self.strength)).clamp(0, 1)


TestTimeAugmentation = Literal["none", "mirror", "mirror-shift"]


def average_over_views(
    network: Callable[[Tensor], Tensor], images: Tensor, views: TestTimeAugmentation
) -> Tensor:
    """Return a network's mean logits [B, classes] over views of images [B, 3, H, W].

    `mirror`: the image and its mirror image. `mirror-shift`: that pair with half of the weight, and
    the pairs of the image shifted by one pixel up and left, and down and right, with a quarter
    each: six views, six times as long (arXiv 2404.00498, section 3.5).
    """
    if views == "none":
        return network(images)
    # In float32: bfloat16 would round the mean to three digits.
    logits = (network(images).float() + network(images.flip(-1)).float()) / 2
    if views == "mirror":
        return logits
    height, width = images.shape[2:]
    padded = F.pad(images, [1] * 4, mode="reflect")
    corners = padded[:, :, :height, :width], padded[:, :, 2:, 2:]
    shifted = [average_over_views(network, corner, "mirror") for corner in corners]
    return logits / 2 + (shifted[0] + shifted[1]) / 4


@torch.compiler.disable  # type: ignore[untyped-decorator]  # else recompiled for each ratio
def _mix(step: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return step(images, labels)


def _flip(images: Tensor, is_flipped: Tensor) -> Tensor:
    return torch.where(is_flipped.view(-1, 1, 1, 1), images.flip(-1), images)


def _factors(images: Tensor, strength: float) -> Tensor:
    """Return a random factor for each image, [B, 1, 1, 1]."""
    low, high = max(0.0, 1 - strength), 1 + strength
    return images.new_empty(len(images), 1, 1, 1).uniform_(low, high)


def _coins(indices: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random 0 or 1 for each index, int64 [B], the same in every epoch.

    The highest bit of MurmurHash3's 32-bit finaliser, which is as good as a coin flip.
    """
    bits = (indices + (seed * 0x9E3779B9 & 0xFFFFFFFF)) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits >> 31  # the finaliser's last step would not change this bit


@rank_zero_only
def check_choices(augmentation: Augment, classes: int = 10) -> None:
    """Try torchvision's transforms. Raise if one rejects float images, or changes all images in the
    same way, so that evaluation would lack it. Print those that make one random choice per
    batch."""
    steps = [step for step in augmentation.steps if _is_torchvisions(step)]
    if not steps:
        return
    with torch.random.fork_rng(devices=[]):
        pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
        images, augmented = pixels / 255, pixels
        parts = [s for s in augmentation.steps if not isinstance(s, GrowingResize)]
        augment, mixing = Augment(parts, augmentation.seed), any(augmentation.mixes)
        try:
            for _ in range(20):  # some reject floats only in some draws
                augmented, labels = augment(pixels, torch.arange(4), torch.arange(4) % classes)
            if labels.shape not in ((4,), (4, classes)):
                raise ValueError(f"labels of {labels.shape[1]} classes, expected {classes}")
        except (TypeError, ValueError, RuntimeError) as error:
            inputs = "float images [B, 3, 32, 32]"
            if mixing:
                inputs += f" and labels [B] of {classes} classes"
            raise MisconfigurationException(
                f"data.augment does not accept {inputs}: {error}"
            ) from error
        for member in (member for step in steps for member in _members(step)):
            if _is_fixed(member, images, augmented):
                raise MisconfigurationException(
                    f"data.augment: {type(member).__name__} changes all images in the same way, "
                    "but runs in training only: make it the network's first layer"
                )
        for step in steps:
            if isinstance(step, ForEachImage) or _mixes_labels(step):
                continue
            rng_state = torch.get_rng_state()
            with suppress(TypeError, ValueError, RuntimeError):  # it needs the steps before it
                step(images)
            if not torch.equal(rng_state, torch.get_rng_state()):
                print(
                    f"data.augment: {type(step).__name__} makes one random choice per batch; for "
                    "one per image, wrap it in cifar10.augment.ForEachImage"
                )


def _members(step: nn.Module) -> Iterator[nn.Module]:
    """Yield a transform, or those in it that are always applied, recursively."""
    inner = [step.transform] if isinstance(step, ForEachImage) else []
    inner += step.transforms if isinstance(step, v2.Compose) else []
    inner += step if isinstance(step, nn.Sequential) else []
    if not inner:
        yield step
    for part in inner:
        yield from _members(part)


def _mixes_labels(step: nn.Module) -> bool:
    """Return whether a step, or a transform in it, maps images and labels."""
    if isinstance(step, v2.MixUp | v2.CutMix) or getattr(step, "mixes_labels", False):
        return True
    return any(map(_mixes_labels, getattr(step, "transforms", ())))


def _is_torchvisions(step: nn.Module) -> bool:
    """Return whether a step is, or contains, a transform of torchvision."""
    return any(type(m).__module__.startswith("torchvision.transforms") for m in _members(step))


def _is_fixed(transform: nn.Module, images: Tensor, augmented: Tensor) -> bool:
    """Return whether a transform always changes images [B, 3, 32, 32] in the same way. One that
    changes shape or dtype counts only if the whole augmentation, which returns `augmented`, does
    too."""
    try:
        first = transform(images)
        if first.shape != images.shape or first.dtype != images.dtype:
            if augmented.shape == images.shape and augmented.dtype == images.dtype:
                return False
        elif torch.equal(first, images):
            return False
        # 200 draws: a transform that changes 95 of 100 images must not pass for a fixed one.
        return all(torch.equal(transform(images), first) for _ in range(200))
    except (TypeError, ValueError, RuntimeError):  # it needs the steps before it
        return False
