"""Batches cut from tensors in memory, and the order in which an epoch visits them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Images uint8 [B, 3, 32, 32], labels int64 [B], and indices int64 [B] in the training or test
    set, which identify an image across epochs."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Predictions(NamedTuple):
    """Logits float32 [N, classes], labels and indices int64 [N] of the images in a set."""

    logits: Tensor
    labels: Tensor
    indices: Tensor


def gathered(batches: list[Predictions]) -> Predictions | None:
    """Return the predictions of all batches on all ranks, on the CPU and in data set order; None if
    there are none."""
    local = [torch.cat(parts).cpu() for parts in zip(*batches, strict=True)]
    by_rank = [local]
    if torch.distributed.is_initialized():
        by_rank *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(by_rank, local)
    merged = [torch.cat(parts) for parts in zip(*filter(None, by_rank), strict=True)]
    return Predictions(*(part[merged[2].argsort()] for part in merged)) if merged else None


@dataclass
class ImageSet:
    """A subset, `indices` int64 [M], of images uint8 [N, 3, 32, 32] and labels int64 [N], all on
    the training device."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        """Return M."""
        return len(self.indices)

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the set on a device."""
        return ImageSet(*(t.to(device) for t in (self.images, self.labels, self.indices)))

    def batch(self, indices: Tensor) -> Batch:
        """Return the images with these indices."""
        # on two cores five times as fast as `images[indices]`
        return Batch(self.images.index_select(0, indices), self.labels[indices], indices)


class Batches:
    """A data loader over a set of images; each iteration is one pass.

    There is nothing to collate, copy or wait for, so there are no workers. Each rank takes its
    share of every batch: together the ranks visit the images as a single process does, each once.
    All ranks have the same number of batches, as they wait for each other's gradients.

    Args:
        image_set: The images to visit.
        batch_size: Images per batch, over all ranks.
        rank: The rank of this process.
        world_size: The number of ranks.
        order: For training: called when a pass begins, returns the order of the set's rows, int64
            [M]. A tail with fewer images than ranks is dropped, as a rank can't train on nothing.
            Without `order`, a pass is complete and in the order of the set.
        first: Returns the index of the first batch of the next pass: for an epoch resumed in the
            middle, the first one not trained on yet.
        steps: Optimizer steps per batch, each on `batch_size` of its images.

    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[], Tensor] | None = None,
        first: Callable[[], int] = lambda: 0,
        steps: int = 1,
    ) -> None:
        self.image_set = image_set
        self.step_size = batch_size
        self.batch_size = batch_size * steps
        self.rank = rank
        self.world_size = world_size
        self.order = order
        self.first = first

    def __len__(self) -> int:
        """Return the number of batches."""
        full, tail = divmod(len(self.image_set), self.batch_size)
        return full + (tail >= (self.world_size if self.order else 1))

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps in a pass, on one device."""
        return -(-len(self.image_set) // self.step_size)

    def weight(self, index: int) -> float:
        """Return the factor that turns the mean of the ranks' losses into the mean over the images
        of a batch: the number of images on this rank, over the mean number per rank."""
        size = min(self.batch_size, len(self.image_set) - index * self.batch_size)
        share = size // self.world_size + (self.rank < size % self.world_size)
        return share * self.world_size / size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        indices = self.image_set.indices
        if self.order is not None:
            indices = indices[self.order().to(indices.device)]
        for chunk in torch.split(indices, self.batch_size)[self.first() : len(self)]:
            yield self.image_set.batch(chunk.tensor_split(self.world_size)[self.rank])


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """Return `range(size)` in a random order that depends on (seed, epoch) alone, int64.

    Drawn on the CPU: the same on every device, in half a millisecond per epoch.
    """
    # With plain seed + epoch, seeds 0 and 1 would share all orders but one.
    spread_seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(spread_seed + epoch)
    return torch.randperm(size, generator=generator)


def split(
    labels: Tensor,
    val_size: int,
    seed: int,
    stratify: bool = False,
    folds: int | None = None,
    fold: int = 0,
    train_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Split images with labels int64 [N] at random into training and validation indices, int64,
    both sorted.

    Args:
        labels: The labels of all images.
        val_size: Size of the validation set.
        seed: Seed of the split.
        stratify: Keep the class proportions in the validation set, to within an image.
        folds: Cut the images into this many parts and validate on one, instead of `val_size`.
        fold: The part to validate on.
        train_size: Train on only this many of the other images, with class proportions kept.
            Smaller sets are subsets of larger ones.

    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = _spread(order, labels) if stratify else order
    parts = order.tensor_split([val_size]) if folds is None else order.tensor_split(folds)
    train = torch.cat([part for i, part in enumerate(parts) if i != fold])
    train = train if train_size is None else _spread(train, labels)[:train_size]
    return train.sort().values, parts[fold].sort().values


def _spread(order: Tensor, labels: Tensor) -> Tensor:
    """Rearrange an order of images int64 [M] so that any stretch of it has the class proportions,
    to within an image. Images of one class keep their order."""
    ordered, positions = labels[order], torch.empty(len(order), dtype=torch.float64)
    for label in torch.unique(ordered):
        count = int((ordered == label).sum())
        positions[ordered == label] = (torch.arange(count).double() + 0.5) / count
    return order[positions.argsort(stable=True)]
