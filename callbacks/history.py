"""The history of a run: one line per epoch on the terminal, `metrics.csv`, `curves.png`."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from cifar10.batches import Batch
from runs import Row, chosen, keeper, write_whole

STAGES, NAMES = ("train", "val", "test"), ("loss", "acc")


class History(Callback):
    """Keeps every epoch's metrics, in checkpoints too, so that a resumed run has complete curves.
    Writes `metrics.csv` and `curves.png` to the run folder if `writes` is true."""

    takes_many_steps = True  # as one batch: it counts images

    def __init__(self, writes: bool = True) -> None:
        self.writes = writes
        self.rows: list[Row] = []
        self.evaluated: Row = {}  # in this epoch
        self.header: list[str] = []
        self.has_stepped = False
        self.is_new = False  # the last row is not printed yet
        self.evaluating = 0.0  # seconds of this epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, plus one for a validation in the current epoch."""
        unfinished = [self.evaluated] if self.evaluated else []
        return {"rows": self.rows + unfinished, "is_inside": bool(unfinished)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows from the checkpoint."""
        self.rows = list(state_dict["rows"])
        if state_dict.get("is_inside"):
            self.evaluated = self.rows.pop()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; print the previous epoch, which is saved by now."""
        self._report(trainer)
        self.started = time.perf_counter()
        self.images, self.evaluating = 0, 0.0

    on_train_start = on_train_epoch_start  # not called when resuming inside an epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Count images; stop the training clock at an epoch's last batch; print the compilation
        time after a run's first."""
        self.images += len(batch.labels) * trainer.world_size
        if trainer.is_last_batch:
            self.images_per_second = self.images / (self._seconds(trainer) - self.evaluating)
        if not self.has_stepped:
            self.has_stepped = True
            mode = getattr(pl_module, "compile_mode", "off")
            if mode != "off" and trainer.is_global_zero:
                seconds = self._seconds(trainer)
                _say(f"compiled ({mode}): {seconds:.1f} s to the end of the first steps")

    def _seconds(self, trainer: Trainer) -> float:
        """Return the seconds since the epoch began, after the GPU has finished its work."""
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - self.started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time: a validation inside an epoch does not count as training."""
        self.evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics until the epoch ends."""
        if trainer.sanity_checking:
            return
        self.evaluating += time.perf_counter() - self.evaluation_started
        step = trainer.global_step
        when = {"epoch": trainer.current_epoch, "step": step, "val/step": step}
        self.evaluated = {**when, **_measured(trainer, "val", "test")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's row, and write `metrics.csv`."""
        # Otherwise Lightning's training metrics are those of an earlier epoch.
        # With no images, the epoch was resumed from the validation at its end.
        is_trained = trainer.is_last_batch and self.images > 0
        measured = (_measured(trainer, "train") if is_trained else {}) | self.evaluated
        self.evaluated = {}
        if measured.get("val/step") == trainer.global_step:  # otherwise inside the epoch
            del measured["val/step"]
        if not measured:
            return
        speed = {"seconds": round(time.perf_counter() - self.started, 2)}
        if is_trained:
            speed["images_per_second"] = round(self.images_per_second)
            pl_module.log("train/images_per_second", self.images_per_second)
        when = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self.rows.append({**when, **measured, **when, **speed})  # override validation's step
        self.is_new = True
        if folder := self._folder(trainer):
            text = io.StringIO()
            keys = list(dict.fromkeys(key for row in self.rows for key in row))
            writer = csv.DictWriter(text, keys, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: round(row[key], 6) for key in row} for row in self.rows)
            write_whole(folder / "metrics.csv", text.getvalue().encode())

    def _folder(self, trainer: Trainer) -> Path | None:
        """Return the folder to write to, if this process should."""
        folder = trainer.log_dir  # a broadcast, so all ranks must call it
        return Path(folder) if folder and self.writes and trainer.is_global_zero else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch."""
        self._report(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        from reports.figures import curves, png  # Matplotlib is slow to import

        if (folder := self._folder(trainer)) and self.rows:
            write_whole(folder / "curves.png", png(curves(self.rows, self.best(trainer))))

    def best(self, trainer: Trainer) -> Row | None:
        """Return the epoch that validation chose (`runs.chosen`)."""
        callback = keeper(trainer)
        choice = chosen(self.rows, callback) if callback else None
        return choice[0] if choice else None

    def _report(self, trainer: Trainer) -> None:
        """Print the newest row once, with a star if it is the best so far."""
        if not (self.is_new and trainer.is_global_zero):
            return
        self.is_new = False
        row, star = self.rows[-1], " "
        stages = [stage for stage in STAGES if f"{stage}/loss" in row]
        if stages != self.header:
            headers = (f"{stage:>7} loss     acc " for stage in stages)
            _say(" ".join(["epoch", *headers, " seconds", "images/s"]))
            self.header = stages
        columns = [f"{row['epoch']:5.0f}"]
        for stage in stages:
            star = "*" if stage == "val" and row is self.best(trainer) else " "
            columns.append(f"{row[f'{stage}/loss']:12.4f} {row[f'{stage}/acc']:7.2%}{star}")
        columns.append(f"{row['seconds']:8.1f}")
        if "images_per_second" in row:
            columns.append(f"{row['images_per_second']:8,.0f}")
        _say(" ".join(columns))


def _say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def _measured(trainer: Trainer, *stages: str) -> Row:
    """Return the metrics of these stages, and the monitored one: with `train` if its name starts
    with `train/`, otherwise with the others."""
    metrics = trainer.callback_metrics
    monitor = str(getattr(keeper(trainer), "monitor", None))
    keys = [f"{stage}/{name}" for stage in stages for name in NAMES]
    if monitor not in keys and monitor.startswith("train/") == ("train" in stages):
        keys.append(monitor)
    return {key: float(metrics[key]) for key in keys if key in metrics}
