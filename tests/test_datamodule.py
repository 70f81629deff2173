"""The split, the batches and their path to the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torchvision.transforms import RandAugment, v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image, to_tensor

from cifar10 import archive
from cifar10.augment import ForEachImage, GrowingResize, RandomCrop
from cifar10.batches import Batches, ImageSet, shuffled, split
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from tests.conftest import QUIET, TEST_SIZE, TRAIN_SIZE


def module(arrays: Path, **settings: Any) -> CIFAR10DataModule:
    """Return a data module as in a single-process trainer."""
    settings = {"val_size": 200, "batch_size": 64, **settings}
    data = CIFAR10DataModule(root=str(arrays), verify=False, download=False, **settings)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=1,
        global_rank=0,
        current_epoch=0,
        overfit_batches=0.0,
        state=SimpleNamespace(fn="fit"),
        strategy=SingleDeviceStrategy("cpu"),
        fit_loop=Trainer(accelerator="cpu", barebones=True).fit_loop,
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
    # The split and the run's own random numbers do not affect each other.
    torch.manual_seed(123)
    assert torch.equal(val, module(arrays).val_set.indices)


def test_the_split_of_all_versions_is_the_same() -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    train, val = split(torch.zeros(1000), 100, 3)
    assert torch.equal(val, order[:100].sort().values)
    assert torch.equal(train, order[100:].sort().values)


def test_smaller_training_sets_are_parts_of_larger_ones(arrays: Path) -> None:
    whole = module(arrays)
    before = set[int]()
    for size in (20, 100, 399, 800):
        data = module(arrays, train_size=size)
        its = set(data.train_set.indices.tolist())
        assert before < its <= set(whole.train_set.indices.tolist())
        assert len(its) == size
        assert torch.equal(data.val_set.indices, whole.val_set.indices)
        every = whole.train_set.labels[whole.train_set.indices].bincount()
        counts = data.train_set.labels[data.train_set.indices].bincount()
        assert ((every * size / 800 - counts).abs() <= 1.5).all()
        before = its
    with pytest.raises(MisconfigurationException, match="train_size 801: only 800 images are left"):
        module(arrays, train_size=801)


def test_a_stratified_split_has_the_same_share_of_each_class(arrays: Path) -> None:
    counts = module(arrays, stratify=True).val_set
    found = counts.labels[counts.indices].bincount()
    assert ((counts.labels.bincount() * 200 / TRAIN_SIZE - found).abs() <= 1.5).all()
    folds = [module(arrays, stratify=True, folds=3, fold=i) for i in range(3)]
    for data in folds:
        found = data.val_set.labels[data.val_set.indices].bincount()
        assert ((data.val_set.labels.bincount() / 3 - found).abs() <= 1.5).all()
    held_out = torch.cat([data.val_set.indices for data in folds])
    assert torch.equal(held_out.sort().values, torch.arange(TRAIN_SIZE))


def test_a_split_without_a_class_is_refused(arrays: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="the validation set of 8 images lacks images of"
    ):
        module(arrays, val_size=8)
    with pytest.raises(
        MisconfigurationException, match="the training set of 8 images lacks images of"
    ):
        module(arrays, val_size=TRAIN_SIZE - 8)
    module(arrays, val_size=0)
    for wrong in ({"fold": 1}, {"folds": 1}, {"folds": 3, "fold": 3}, {"folds": 3, "val_size": 0}):
        with pytest.raises(
            MisconfigurationException, match="data.folds must be at least 2, data.fold from 0"
        ):
            module(arrays, **wrong)


def test_validation_images_are_never_trained_on(arrays: Path) -> None:
    data = module(arrays)
    images = torch.cat([batch.images for batch in data.train_dataloader()])
    trained = {image.numpy().tobytes() for image in images}
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert not trained & {image.numpy().tobytes() for batch in loader for image in batch.images}


@pytest.mark.parametrize("batch_size", [1, 64, 800, 1000])
def test_an_epoch_visits_each_training_image_once(arrays: Path, batch_size: int) -> None:
    data = module(arrays, batch_size=batch_size)
    batches = list(data.train_dataloader())
    assert len(data.train_dataloader()) == len(batches)
    assert [len(batch.images) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    images, labels, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8
    assert images.shape == (800, 3, 32, 32)
    assert labels.dtype == torch.int64
    whole = archive.load(arrays, verify=False)
    assert torch.equal(images, whole.train_images[indices])
    kept = data.train_set.indices
    assert sorted(
        (image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    ) == sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(whole.train_images[kept], whole.train_labels[kept], strict=True)
    )


def test_order_follows_from_seed_and_epoch_alone(arrays: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        torch.manual_seed(seed)
        data = module(arrays)
        torch.rand(1)  # a draw elsewhere changes nothing
        data.trainer.current_epoch = epoch  # type: ignore[misc, union-attr]
        return tuple(torch.cat([batch.indices for batch in data.train_dataloader()]).tolist())

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9, "seeds share no order, not even at another epoch"
    assert orders == [order(seed, epoch) for seed in range(3) for epoch in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 6, 60, 101])
@pytest.mark.parametrize("is_training", [True, False])
def test_ranks_share_every_batch(world_size: int, size: int, is_training: bool) -> None:
    images = ImageSet(
        torch.zeros(200, 3, 32, 32, dtype=torch.uint8),
        torch.arange(200),
        torch.arange(50, 50 + size),
    )
    order = (lambda: shuffled(size, seed=0, epoch=0)) if is_training else None
    ranks = [Batches(images, 20, rank, world_size, order) for rank in range(world_size)]
    shares = [list(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1, "none waits for another"
    assert all(len(share) == len(ranks[0]) for share in shares)
    alone = list(Batches(images, 20, order=order))
    for i, (whole, *parts) in enumerate(zip(alone, *shares, strict=False)):
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        assert max(map(len, (p.labels for p in parts))) - min(len(p.labels) for p in parts) <= 1
        if is_training:
            assert all(len(part.labels) for part in parts), "no rank trains on nothing"
        weights = [rank.weight(i) for rank in ranks]
        means = [
            part.labels.float().mean() * w for part, w in zip(parts, weights, strict=True) if w
        ]
        torch.testing.assert_close(sum(means) / world_size, whole.labels.float().mean())
    left_out = len(alone) - len(ranks[0])
    tail = size % 20
    assert left_out == (is_training and 0 < tail < world_size)


def test_the_same_images_come_first_where_few_are_overfitted(arrays: Path) -> None:
    data = module(arrays)
    data.trainer.overfit_batches = 0.1  # type: ignore[union-attr]
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.indices, data.train_set.indices[:64])


def test_the_model_gets_what_totensor_gives(arrays: Path) -> None:
    data = module(arrays)
    batch = next(iter(data.val_dataloader()))
    floats, _ = data.augmentation(*batch)
    expected = torch.stack([to_tensor(to_pil_image(image)) for image in batch.images])
    assert torch.equal(floats, expected)
    assert torch.equal(pil_to_tensor(to_pil_image(batch.images[0])), batch.images[0])


class Halve(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images / 2


class Negative(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 - images


class Remembers(nn.Module):
    """Records the means of the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 10)
        self.seen: dict[bool, set[float]] = {True: set(), False: set()}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen[self.training] |= set(images.mean((1, 2, 3)).tolist())
        return self.layer(images.mean((1, 2, 3))[:, None])


def test_steps_run_in_order_and_in_training_only(arrays: Path) -> None:
    for steps, expected in (([Halve(), Negative()], 0.5), ([Negative(), Halve()], 0.0)):
        data = CIFAR10DataModule(str(arrays), verify=False, val_size=200, augment=steps)
        data.setup()
        data.train_set.images = data.val_set.images = torch.full_like(data.train_set.images, 255)
        data.setup = lambda stage: None  # type: ignore[method-assign, misc, assignment]
        model = ImageClassifier(network := Remembers())
        network.seen[False].clear()
        Trainer(max_epochs=1, **QUIET).fit(model, datamodule=data)
        assert network.seen == {True: {expected}, False: {1.0}}


def test_a_normalize_that_would_be_left_out_of_evaluation_is_refused(arrays: Path) -> None:
    both = nn.Sequential(Negative(), v2.Normalize([0.5] * 3, [0.5] * 3))
    with pytest.raises(MisconfigurationException, match=r"use --model\.normalize"):
        module(arrays, augment=[both])


def test_one_choice_a_batch_is_said(arrays: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module(arrays, augment=[v2.RandomHorizontalFlip()])
    assert "RandomHorizontalFlip makes one random choice per batch" in capsys.readouterr().out
    module(arrays, augment=[ForEachImage(v2.RandomHorizontalFlip()), RandomCrop()])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "transform",
    [
        v2.Resize(64), v2.Grayscale(3), v2.CenterCrop(24), v2.GaussianBlur(3, sigma=1.0),
        v2.RandomGrayscale(1.0), v2.Compose([v2.RandomHorizontalFlip(), v2.Grayscale(3)]),
        nn.Sequential(v2.RandomHorizontalFlip(), v2.Grayscale(3)), v2.ToDtype(torch.float64),
    ],
)  # fmt: skip
def test_a_transform_that_chooses_nothing_is_refused(arrays: Path, transform: nn.Module) -> None:
    for step in (transform, ForEachImage(transform)):
        with pytest.raises(MisconfigurationException, match="but runs in training only"):
            module(arrays, augment=[step])


@pytest.mark.parametrize("transform", [v2.MixUp(num_classes=9), v2.JPEG(50), RandAugment()])
def test_a_transform_that_takes_no_floats_is_refused(arrays: Path, transform: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match="does not accept float images"):
        module(arrays, augment=[transform])


def test_transforms_that_choose_together_are_taken(
    arrays: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module(arrays, augment=[v2.Pad(4), ForEachImage(v2.RandomCrop(32))])
    as_bytes = v2.ToDtype(torch.uint8, scale=True), v2.ToDtype(torch.float32, scale=True)
    module(arrays, augment=[as_bytes[0], ForEachImage(v2.RandAugment()), as_bytes[1]])
    module(arrays, augment=[ForEachImage(v2.RandomApply([v2.Grayscale(3)], p=0.5))])
    module(arrays, augment=[v2.ToDtype(torch.float32), ForEachImage(v2.ColorJitter(0.2))])
    module(arrays, augment=[v2.Pad(4), ForEachImage(v2.RandomCrop(32)), GrowingResize([16, 32])])
    mixing = [v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)]
    module(arrays, augment=[*mixing[:1]])
    module(arrays, augment=[v2.RandomChoice(mixing)])
    assert capsys.readouterr().out == ""


def test_it_works_without_a_trainer(arrays: Path) -> None:
    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    data.prepare_data()
    data.setup()
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == 800
    assert sum(len(batch.labels) for batch in data.val_dataloader()) == 200
    assert sum(len(batch.labels) for batch in data.test_dataloader()) == TEST_SIZE
    assert str(data) == "CIFAR10DataModule: 800 train, 200 val, 200 test images"
    assert str(CIFAR10DataModule()) == "CIFAR10DataModule: call setup() first"


def test_the_test_set_is_evaluated_in_fit_only_when_asked_for(arrays: Path) -> None:
    def sizes(data: CIFAR10DataModule) -> list[int]:
        loaders = data.val_dataloader()
        loaders = loaders if isinstance(loaders, list) else [loaders]
        return [sum(len(batch.labels) for batch in loader) for loader in loaders]

    assert sizes(module(arrays)) == [200]
    data = module(arrays, test_curve=True)
    assert sizes(data) == [200, TEST_SIZE]
    data.trainer.state.fn = "validate"  # type: ignore[union-attr]
    assert sizes(data) == [200]


def test_a_split_without_training_images_is_refused(arrays: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match="leaves none of 1000 images to train on.*at most 999"
    ):
        module(arrays, val_size=TRAIN_SIZE)
