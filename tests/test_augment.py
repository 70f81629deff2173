"""Every augmentation against a plain implementation for one image."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cifar10.augment import (
    MEAN,
    AlternatingFlip,
    Augment,
    Cutout,
    ForEachImage,
    GrowingResize,
    RandomBrightness,
    RandomContrast,
    RandomCrop,
    RandomFlip,
)

RANDOM = [RandomCrop(4), RandomFlip(), Cutout(8), RandomBrightness(0.4), RandomContrast(0.4)]


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(600, 3, 32, 32)


def test_crop_shifts_each_image_by_itself_over_a_mirrored_border(images: Tensor) -> None:
    padding = 2
    shifts: Counter[tuple[int, int]] = Counter()
    for image, crop in zip(images, RandomCrop(padding)(images), strict=True):
        padded = F.pad(image[None], [padding] * 4, mode="reflect")[0]
        shifts[
            next(
                (y, x)
                for y in range(2 * padding + 1)
                for x in range(2 * padding + 1)
                if torch.equal(crop, padded[:, y : y + 32, x : x + 32])
            )
        ] += 1
    assert len(shifts) == 25, "all shifts occur"
    assert max(shifts.values()) < 3 * 600 / 25, "about equally often"


def test_flip_mirrors_about_half_of_the_images(images: Tensor) -> None:
    results = RandomFlip()(images)
    is_flipped = [torch.equal(r, tv.hflip(image)) for image, r in zip(images, results, strict=True)]
    is_same = [torch.equal(r, image) for image, r in zip(images, results, strict=True)]
    assert all(a != b for a, b in zip(is_flipped, is_same, strict=True))
    assert 240 < sum(is_flipped) < 360


def test_alternating_flip_shows_the_other_side_in_the_next_epoch(images: Tensor) -> None:
    transform = Augment([AlternatingFlip()], seed=3)
    pixels = (images * 255).to(torch.uint8)
    plain, mirrored = pixels / 255, (pixels / 255).flip(-1)
    order = torch.randperm(600)

    def is_mirrored(transform: Augment, epoch: int) -> Tensor:
        transform.epoch.fill_(epoch)
        shown = torch.empty_like(plain)
        shown[order], _ = transform(pixels[order], order, order)  # in any batch order
        sides = torch.stack([(shown == side).flatten(1).all(1) for side in (plain, mirrored)])
        assert (sides.sum(0) == 1).all()
        return sides[1]

    first = is_mirrored(transform, 0)
    assert 240 < first.sum() < 360
    for epoch in range(1, 4):
        assert torch.equal(is_mirrored(transform, epoch), first ^ bool(epoch % 2))
    others = [is_mirrored(Augment([AlternatingFlip()], seed), 0) for seed in (4, 5, 2**32 - 1)]
    for other in others:
        assert 240 < (other ^ first).sum() < 360, "another seed begins with another half"


@pytest.mark.parametrize("size", [1, 7, 8])
def test_cutout_fills_a_square_at_any_place(images: Tensor, size: int) -> None:
    mean = torch.tensor(MEAN).view(3, 1, 1)
    assert (Cutout(64)(images) == mean).all((1, 2, 3)).any(), "with the mean colour"
    corners = set()
    for image, result in zip(images, Cutout(size, (0.0, 0.0, 0.0))(images), strict=True):
        blank = (result == 0).all(0)
        rows, columns = (blank.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
        expected = image.clone()
        expected[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
        assert torch.equal(result, expected)
        for places in (rows, columns):
            is_cut_off = places[0] == 0 or places[-1] == 31
            assert len(places) <= size
            assert len(places) == size or is_cut_off
        corners.add((rows[0], columns[0]))
    assert len(corners) > 250


@pytest.mark.parametrize(
    ("augmentation", "reference", "factor_of"),
    [
        (
            RandomBrightness(0.4),
            tv.adjust_brightness,
            lambda image, result: (result / image)[(result > 0.01) & (result < 0.99)].median(),
        ),
        (
            RandomContrast(0.4),
            tv.adjust_contrast,
            lambda image, result: (
                (result[:, :, :1] - result[:, :, 1:2]) / (image[:, :, :1] - image[:, :, 1:2])
            ).median(),
        ),
    ],
)
def test_brightness_and_contrast_are_torchvisions(
    images: Tensor,
    augmentation: nn.Module,
    reference: Callable[[Tensor, float], Tensor],
    factor_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    images = images * 0.6 + 0.2
    factors = []
    for image, result in zip(images, augmentation(images), strict=True):
        factor = float(factor_of(image, result))
        torch.testing.assert_close(result, reference(image, factor), atol=2e-5, rtol=0)
        factors.append(factor)
    assert min(factors) + 1e-4 >= 0.6
    assert max(factors) - 1e-4 <= 1.4
    assert max(factors) - min(factors) > 0.7


def test_sizes_grow_in_equal_shares_of_the_training(images: Tensor) -> None:
    step = GrowingResize([16, 24, 32])
    augment = Augment([step])
    sizes = []
    for epoch in range(9):
        augment.begin_epoch(epoch, epoch / 9)
        sizes.append(step(images).shape[-1])
    assert sizes == [16] * 3 + [24] * 3 + [32] * 3
    step.set_progress(0.4)
    expected = tv.resize(images, [24, 24], antialias=True)
    torch.testing.assert_close(step(images), expected)
    hundred = GrowingResize(list(range(1, 101)))
    for epoch in range(100):  # where epoch / 100 * 100 may be rounded down
        hundred.set_progress(epoch / 100)
        assert hundred.size == epoch + 1
    inner = Augment([nn.Sequential(RandomFlip(), GrowingResize([16, 32]))])
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.arange(2), torch.arange(2)
    assert [inner.begin_epoch(0, progress) for progress in (0.0, 0.5, 0.9)] == [False, True, False]
    assert inner(*batch)[0].shape == (2, 3, 32, 32)
    assert GrowingResize([16])(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="sizes is empty"):
        GrowingResize([])


@pytest.mark.parametrize("step", [v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])
def test_torchvisions_mixing_mixes_labels_by_the_share_of_the_pixels(step: nn.Module) -> None:
    labels = torch.arange(10)
    pixels = (labels * 25).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for steps in ([step], [v2.RandomChoice([step, step])]):
        images, targets = Augment(steps)(pixels, labels, labels)
        assert targets.shape == (10, 10)
        torch.testing.assert_close(targets.sum(1), torch.ones(10))
        torch.testing.assert_close(images.mean((1, 2, 3)), targets @ (labels * 25 / 255))


def test_torchvisions_transforms_draw_for_each_image_where_asked_to(images: Tensor) -> None:
    def mirrored(step: nn.Module) -> int:
        return sum(not torch.equal(a, b) for a, b in zip(step(images), images, strict=True))

    flip = v2.RandomHorizontalFlip()
    assert {mirrored(flip) for _ in range(20)} == {0, 600}
    assert 200 < mirrored(ForEachImage(flip)) < 400


@pytest.mark.parametrize("augmentation", RANDOM, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_batch_keeps_its_shape_and_type(
    augmentation: nn.Module, batch_size: int, dtype: torch.dtype
) -> None:
    batch = torch.rand(batch_size, 3, 32, 32).to(dtype)
    before = batch.clone()
    result = augmentation(batch)
    assert (result.shape, result.dtype) == (batch.shape, dtype)
    assert torch.equal(batch, before), "the images that came in are left alone"


def test_a_shift_beyond_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"padding 32 is not in \[0, 31\]"):
        RandomCrop(32)
