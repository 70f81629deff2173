"""Keeps what a network says of every image, for whoever wants more than two means."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics import Metric

from cifar10.batches import Batch


class Predictions(NamedTuple):
    """Logits float32 [N, 10], labels int64 [N] and indices int64 [N] of the images of a set."""

    logits: Tensor
    labels: Tensor
    indices: Tensor


class _Logits(Metric):
    """Collects logits over the batches of a set and over all ranks."""

    logits: list[Tensor]
    labels: list[Tensor]
    indices: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in Predictions._fields:
            self.add_state(name, [], "cat")

    def update(self, logits: Tensor, batch: Batch) -> None:
        self.logits.append(logits.float())
        self.labels.append(batch.labels)
        self.indices.append(batch.indices)

    def compute(self) -> Predictions:
        parts = (self.logits, self.labels, self.indices)
        # Of several ranks they come as one tensor.
        whole = [part if isinstance(part, Tensor) else torch.cat(part) for part in parts]
        order = whole[2].argsort()
        return Predictions(*(part[order] for part in whole))


class PredictionsKeeper(Callback):
    """Keeps the predictions of the last validation or test."""

    def __init__(self) -> None:
        self.kept = _Logits()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.kept.reset()
        self.kept.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch; of the test set in a test only."""
        if dataloader_idx == 0:
            self.kept.update(outputs, batch)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch."""
        self.kept.update(outputs, batch)

    def predictions(self) -> Predictions:
        """Return the predictions, in the order of the images in the data set."""
        return self.kept.compute()


class ConfusionMatrix(PredictionsKeeper):
    """Draws the confusion matrix of validation in TensorBoard, every few epochs of `fit`:
    `--trainer.callbacks+=callbacks.ConfusionMatrix`. A drawing takes 0.3 s.

    Args:
        every_n_epochs: How many epochs from one to the next.

    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        from reports.evaluation import confusion_figure, confusion_of  # slow to import

        is_due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or not is_due or not self.kept.update_called:
            return
        confusion = confusion_of(self.predictions())  # takes all ranks
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_figure(
                    "val/confusion", confusion_figure(confusion), trainer.global_step
                )
