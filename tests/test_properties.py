"""What holds for any size, seed and number of processes, with examples from hypothesis."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import hflip, to_tensor
from torchvision.transforms.v2.functional import to_pil_image

from cifar10.augment import (
    AlternatingFlip,
    Augment,
    Cutout,
    RandomBrightness,
    RandomContrast,
    RandomCrop,
    RandomFlip,
)
from cifar10.batches import Batches, ImageSet, shuffled, split

seeds = st.integers(0, 2**32 - 1)


def examples(count: int) -> Callable[[Any], Any]:
    return settings(max_examples=count, deadline=None, derandomize=True)


def pixels(count: int, seed: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@examples(200)
@given(st.data(), st.integers(1, 500), seeds)
def test_a_split_has_every_index_once(data: st.DataObject, size: int, seed: int) -> None:
    val_size, stratify = data.draw(st.integers(0, size)), data.draw(st.booleans())
    labels = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))
    train, val = split(labels, val_size, seed, stratify)
    assert len(val) == val_size
    assert sorted(train.tolist() + val.tolist()) == list(range(size))
    assert torch.equal(val, split(labels, val_size, seed, stratify)[1])
    if stratify:
        counts = labels.bincount(minlength=3), labels[val].bincount(minlength=3)
        assert ((counts[0] * val_size / size - counts[1]).abs() <= 1.5).all()


@examples(100)
@given(st.data(), st.integers(1, 500), seeds)
def test_folds_hold_out_every_index_once(data: st.DataObject, size: int, seed: int) -> None:
    folds, stratify = data.draw(st.integers(2, 10)), data.draw(st.booleans())
    labels = torch.randint(0, 3, (size,), generator=torch.Generator().manual_seed(seed))
    parts = [split(labels, 0, seed, stratify, folds, fold) for fold in range(folds)]
    assert sorted(torch.cat([val for _, val in parts]).tolist()) == list(range(size))
    for train, val in parts:
        assert sorted(train.tolist() + val.tolist()) == list(range(size))
        assert abs(len(val) - size / folds) < 1


@examples(200)
@given(
    size=st.integers(1, 300),
    batch_size=st.integers(1, 320),
    world_size=st.integers(1, 9),
    seed=seeds,
    epoch=st.integers(0, 10_000),
)
def test_all_ranks_together_see_what_one_process_sees(
    size: int, batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    batch_size = max(batch_size, world_size)
    images = ImageSet(pixels(size, seed, side=2), torch.arange(size), torch.arange(size))

    def shares(order: Callable[[], Tensor] | None) -> list[list[int]]:
        ranks = [Batches(images, batch_size, rank, world_size, order) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        batches = [[batch.indices for batch in rank] for rank in ranks]
        return [torch.cat(parts).tolist() for parts in zip(*batches, strict=True)]

    def alone(order: Callable[[], Tensor] | None) -> list[list[int]]:
        return [batch.indices.tolist() for batch in Batches(images, batch_size, order=order)]

    def order() -> Tensor:
        return shuffled(size, seed, epoch)

    assert list(chain(*shares(None))) == list(range(size)), "evaluation: each once, in order"
    tail = size % batch_size
    whole = alone(order)
    assert sorted(chain(*whole)) == list(range(size)), "training: each once"
    assert shares(order) == (whole[:-1] if 0 < tail < world_size else whole)


@examples(30)
@given(count=st.integers(1, 20), seed=seeds)
def test_no_pixel_is_changed_on_the_way_to_the_network(count: int, seed: int) -> None:
    images = pixels(count, seed)
    order = shuffled(count, seed, 0)
    batches = Batches(
        ImageSet(images, torch.arange(count), torch.arange(count)), 7, order=lambda: order
    )
    floats = torch.cat([Augment()(*batch)[0] for batch in batches])
    assert torch.equal(floats, torch.stack([to_tensor(to_pil_image(images[i])) for i in order]))


@examples(40)
@given(count=st.integers(1, 9), padding=st.integers(0, 31), seed=seeds)
def test_a_crop_is_a_window_of_the_padded_image(count: int, padding: int, seed: int) -> None:
    images = pixels(count, seed) / 255
    torch.manual_seed(seed)
    crops = RandomCrop(padding)(images)
    torch.manual_seed(seed)
    rows, columns = torch.randint(2 * padding + 1, (2, count)).tolist()
    for image, crop, y, x in zip(images, crops, rows, columns, strict=True):
        padded = F.pad(image[None], [padding] * 4, mode="reflect")[0]
        assert torch.equal(crop, padded[:, y : y + 32, x : x + 32])


@examples(40)
@given(count=st.integers(1, 9), seed=seeds, epoch=st.integers(0, 1000))
def test_flips_mirror_or_leave_whole_images(count: int, seed: int, epoch: int) -> None:
    images = pixels(count, seed)
    indices = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))[:count]
    torch.manual_seed(seed)
    alternating = Augment([AlternatingFlip()], seed=seed)
    shown = []
    for later in range(3):
        alternating.epoch.fill_(epoch + later)
        shown.append(alternating(images, indices, indices)[0])
    for image, *sides in zip(images / 255, *shown, strict=True):
        assert torch.equal(sides[0], sides[2])
        assert torch.equal(sides[1], hflip(sides[0]))
        assert any(torch.equal(side, image) for side in sides)
    for image, flipped in zip(images / 255, RandomFlip()(images / 255), strict=True):
        assert torch.equal(flipped, image) or torch.equal(flipped, hflip(image))


@pytest.mark.parametrize(
    "step",
    [
        RandomCrop(4),
        RandomFlip(),
        Cutout(9),
        RandomBrightness(1.5),
        RandomContrast(2.0),
    ],
    ids=lambda step: type(step).__name__,
)
@examples(20)
@given(count=st.integers(0, 9), side=st.integers(6, 40), seed=seeds)
def test_any_batch_keeps_its_form_and_is_left_alone(
    step: nn.Module, count: int, side: int, seed: int
) -> None:
    images = pixels(count, seed, side) / 255
    before = images.clone()
    result = step(images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert result.isfinite().all()
    assert torch.equal(images, before)
    assert ((result >= 0) & (result <= 1)).all()
