"""What is trained and how one step goes: network, loss, optimizer, metrics."""

from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cifar10.archive import CLASSES


def _metrics(stage: str) -> MetricCollection:
    return MetricCollection(
        {
            "loss": MeanMetric(nan_strategy="disable"),  # the check would wait for the GPU
            "acc": MulticlassAccuracy(len(CLASSES), average="micro", validate_args=False),
        },
        prefix=f"{stage}/",
        compute_groups=False,
    )


class ImageClassifier(LightningModule):
    """Trains a network on images with cross entropy.

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc`, once an
    epoch: means over the images, accuracy as a fraction.

    Args:
        network: Maps float images [B, 3, 32, 32] to logits [B, 10].
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the scheduler, stepped once an epoch, from the optimizer.
        softmax_before_loss: Apply softmax to the logits before the loss, which applies its own: the
            slip in the report's code, kept to measure what it costs.

    Raises:
        MisconfigurationException: The network does not map [B, 3, 32, 32] to [B, 10].

    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        softmax_before_loss: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.softmax_before_loss = softmax_before_loss
        self.train_metrics = _metrics("train")
        self.val_metrics = _metrics("val")
        self.test_metrics = _metrics("test")
        self.example_input_array = torch.zeros(128, 3, 32, 32)  # for the summary's shapes
        _check(network)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32] in [0, 1] to logits [B, 10]."""
        return self.network(images)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with its scheduler if there is one.

        Raises:
            MisconfigurationException: Values that the optimizer or the scheduler refuses.
        """
        try:
            optimizer = self.make_optimizer(self.parameters())
            scheduler = self.make_lr_scheduler(optimizer) if self.make_lr_scheduler else None
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"model.optimizer or lr_scheduler: {error}") from error
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": getattr(scheduler, "monitor", None),  # of ReduceLROnPlateau
            },
        }

    def on_fit_start(self) -> None:
        """Remember the run's seed."""
        self.seed = torch.initial_seed()

    def on_train_epoch_start(self) -> None:
        """Let dropout and augmentation follow from (seed, epoch, rank), so that a resumed run draws
        what an unbroken one draws."""
        entropy = (self.seed, self.current_epoch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _step(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> Tensor:
        """Update the metrics with one batch and return its mean loss []."""
        images, labels = batch
        logits = self.network(images)
        scores = logits.softmax(dim=1) if self.softmax_before_loss else logits
        loss = F.cross_entropy(scores, labels)
        # One value an image: torchmetrics 1.9 drops `weight` where the check for NaN is disabled.
        losses = loss.detach().expand(len(labels))
        metrics.update(value=losses, preds=logits.detach(), target=labels)
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch; with the last of an epoch, log the epoch's metrics.

        Lightning computes, reduces over ranks and resets what is logged when the epoch ends.
        """
        loss = self._step(batch, self.train_metrics)
        if self.trainer.is_last_batch:
            self.log_dict(self.train_metrics, on_step=False, on_epoch=True)
        return loss

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Evaluate one batch of the validation set, or of the test set for its curve."""
        self._step(batch, self.val_metrics if dataloader_idx == 0 else self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the sets that were evaluated."""
        for metrics in (self.val_metrics, self.test_metrics):
            if metrics["acc"].update_called:
                self.log_dict(metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Evaluate one batch of the test set."""
        self._step(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test set's metrics."""
        self.log_dict(self.test_metrics)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return class probabilities [B, 10]."""
        return self.network(batch[0]).softmax(dim=1)


@torch.no_grad()
def _check(network: nn.Module) -> None:
    """Refuse a network of other shapes before a run begins."""
    expected = [2, len(CLASSES)]
    was_training = network.training
    try:
        logits = network.eval()(torch.zeros(2, 3, 32, 32))
        shape = list(logits.shape)
    except Exception as error:
        raise MisconfigurationException(
            f"model.network {type(network).__name__} does not take images [B, 3, 32, 32]: {error}"
        ) from error
    finally:
        network.train(was_training)
    if shape != expected:
        raise MisconfigurationException(
            f"model.network {type(network).__name__} returns {shape} for 2 images, "
            f"expected logits {expected}"
        )
