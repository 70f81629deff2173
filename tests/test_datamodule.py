"""Split, batches and their way to the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image, to_tensor

from cifar10 import archive
from cifar10.batches import TensorImages, train_loader
from datamodule import CIFAR10DataModule
from tests.conftest import TEST_SIZE, TRAIN_SIZE


def module(arrays: Path, **settings: Any) -> CIFAR10DataModule:
    """A data module as a trainer of one process would have it."""
    settings = {"val_size": 200, "batch_size": 64, **settings}
    data = CIFAR10DataModule(root=str(arrays), verify=False, download=False, **settings)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1, global_rank=0, training=True, state=SimpleNamespace(fn="fit")
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_split_is_a_partition_that_the_seed_decides(arrays: Path) -> None:
    data, again, other = module(arrays), module(arrays), module(arrays, split_seed=1)
    train, val = data.train_set.indices, data.val_set.indices
    assert (len(train), len(val)) == (TRAIN_SIZE - 200, 200)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(TRAIN_SIZE))
    assert torch.equal(val, again.val_set.indices)
    assert not torch.equal(val, other.val_set.indices)
    # The split is drawn without touching the run's own random numbers, and they do not touch it.
    torch.manual_seed(123)
    assert torch.equal(val, module(arrays).val_set.indices)


def test_validation_images_are_never_trained_on(arrays: Path) -> None:
    data = module(arrays)
    images = torch.cat([images for images, _ in data.train_dataloader()])
    trained = {image.numpy().tobytes() for image in images}
    for loader in (*data.val_dataloader(), data.test_dataloader()):
        assert not trained & {image.numpy().tobytes() for batch, _ in loader for image in batch}


@pytest.mark.parametrize("batch_size", [1, 64, 800, 1000])
def test_an_epoch_visits_each_training_image_once(arrays: Path, batch_size: int) -> None:
    data = module(arrays, batch_size=batch_size)
    batches = list(data.train_dataloader())
    assert all(len(images) == len(labels) for images, labels in batches)
    assert [len(images) for images, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8
    assert images.shape == (800, 3, 32, 32)
    assert labels.dtype == torch.int64
    whole = archive.load(arrays, verify=False)
    kept = data.train_set.indices
    assert sorted(
        (image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    ) == sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(whole.train_images[kept], whole.train_labels[kept], strict=True)
    )


def test_order_follows_from_seed_and_epoch_alone() -> None:
    images = TensorImages(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100))

    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(1)  # a draw elsewhere changes nothing
        loader = train_loader(images, 10, seed)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        return [int(label) for _, labels in loader for label in labels]

    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9, "seeds share no order, not even at another epoch"
    assert orders == [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]


def test_ranks_share_an_epoch() -> None:
    images = TensorImages(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100))
    loaders = [train_loader(images, 10, seed=0, rank=rank, world_size=2) for rank in range(2)]
    visited = [{int(label) for _, labels in loader for label in labels} for loader in loaders]
    assert [len(labels) for labels in visited] == [50, 50]
    assert visited[0] | visited[1] == set(range(100))


def test_the_model_gets_what_totensor_gives(arrays: Path) -> None:
    data = module(arrays)
    images, labels = next(iter(data.val_dataloader()[0]))
    floats, same_labels = data.on_after_batch_transfer((images, labels), 0)
    expected = torch.stack([to_tensor(to_pil_image(image)) for image in images])
    assert torch.equal(floats, expected)
    assert torch.equal(labels, same_labels)
    assert torch.equal(pil_to_tensor(to_pil_image(images[0])), images[0])


class Negative(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 - images


def test_augmentations_change_training_batches_only(arrays: Path) -> None:
    data = module(arrays, augment=[Negative()])
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert data.on_after_batch_transfer((images, images), 0)[0].max() == 0
    data.trainer.training = False  # type: ignore[union-attr]
    assert data.on_after_batch_transfer((images, images), 0)[0].min() == 1


def test_the_test_set_is_evaluated_in_fit_only_when_asked_for(arrays: Path) -> None:
    def sizes(data: CIFAR10DataModule) -> list[int]:
        return [sum(len(labels) for _, labels in loader) for loader in data.val_dataloader()]

    assert sizes(module(arrays)) == [200]
    data = module(arrays, test_curve=True)
    assert sizes(data) == [200, TEST_SIZE]
    data.trainer.state.fn = "validate"  # type: ignore[union-attr]
    assert sizes(data) == [200]


def test_a_split_without_training_images_is_refused(arrays: Path) -> None:
    with pytest.raises(archive.CIFAR10Error, match="leaves no training image of 1000.*at most 999"):
        module(arrays, val_size=TRAIN_SIZE)
