"""The progress of an epoch, for a person at a terminal."""

import sys

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

STEPS_A_REFRESH = 25  # drawing costs time, and nobody reads faster


class ImagesBar(TQDMProgressBar):
    """Shows how many images of the epoch are done, in whole batches, and images per second.

    The metrics are in the lines of `History`, and validation takes less time than a bar to read.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=STEPS_A_REFRESH, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training, which counts images where Lightning's counts batches."""
        batch_size = getattr(self.trainer.train_dataloader, "batch_size", 1)
        steps = getattr(self.trainer.lightning_module, "steps_a_call", 1)
        self._refresh_rate = max(1, STEPS_A_REFRESH // max(1, steps))
        return Tqdm(
            desc=self.train_description,
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            unit=" images",
            unit_scale=batch_size,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_noinv_fmt}]",
        )

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that is not shown."""
        return Tqdm(disable=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw every batch: pictures take a moment to read."""
        self._refresh_rate = 1
        super().on_predict_start(trainer, pl_module)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return nothing to show beside the bar."""
        return {}
