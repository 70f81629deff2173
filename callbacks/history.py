"""The history of a run, results and speed: a line an epoch on the terminal, `metrics.csv` and
`curves.png`."""

import csv
import io
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from cifar10.batches import Batch
from runs import write_whole

COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
QUANTITIES = {"loss": "loss", "acc": "accuracy"}

CHOSEN = ("val/acc", "val/loss", "test/acc", "epoch")  # what HParams shows of the best epoch

Row = dict[str, float]


class History(Callback):
    """Keeps the metrics of every epoch, in the checkpoint too: a resumed run has whole curves.

    Args:
        writes: Write `metrics.csv` and `curves.png` into the run's folder.

    """

    takes_many_steps = True  # as one batch: it counts images

    def __init__(self, writes: bool = True) -> None:
        self.writes = writes
        self.rows: list[Row] = []
        self.evaluated: Row = {}
        self.header: list[str] = []
        self.has_stepped = False
        self.is_new = False  # the last row, and not printed yet
        self.evaluating = 0.0  # seconds of this epoch

    def state_dict(self) -> dict[str, Any]:
        """Return the rows for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows of the checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have TensorBoard draw train and validation on one chart."""
        self.on_train_epoch_start(trainer, pl_module)  # not called for the rest of an epoch
        layout = {
            title: ["Multiline", [f"^{stage}/{name}$" for stage in COLORS]]
            for name, title in QUANTITIES.items()
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars({"learning curves": layout})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; report the epoch before, which by now is saved."""
        self._report(trainer)
        self.started = time.perf_counter()
        self.images, self.evaluating = 0, 0.0

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count images; with the last batch of an epoch stop the clock of the training, with the
        first of a run say how long its compilation took."""
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
        """Return the seconds since the epoch began, when all that is asked of a GPU is done."""
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - self.started

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the training, for a validation in the middle of an epoch."""
        self.evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what was measured, until the epoch ends."""
        self.evaluating += time.perf_counter() - self.evaluation_started
        self.evaluated = _measured(trainer, "val", "test")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the epoch's metrics."""
        # Lightning goes on offering those of earlier epochs, which are not this one's.
        measured = (_measured(trainer, "train") if trainer.is_last_batch else {}) | self.evaluated
        self.evaluated = {}
        if not measured:
            return
        speed = {"seconds": round(time.perf_counter() - self.started, 2)}
        if trainer.is_last_batch:
            speed["images_per_second"] = round(self.images_per_second)
            pl_module.log("train/images_per_second", self.images_per_second)
        self.rows.append({"epoch": trainer.current_epoch, **measured, **speed})
        self.is_new = True
        if self.writes and (folder := trainer.log_dir) and trainer.is_global_zero:
            write_whole(Path(folder) / "metrics.csv", _csv(self.rows))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last epoch."""
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        """Print the newest row, once."""
        if self.is_new and trainer.is_global_zero:
            self._print(is_best=self.rows[-1] is self.best(trainer))
        self.is_new = False

    def _print(self, is_best: bool) -> None:
        """Print the last epoch on one line; a star where it is the best so far."""
        row = self.rows[-1]
        stages = [stage for stage in COLORS if f"{stage}/loss" in row]
        if stages != self.header:
            headers = (f"{stage:>7} loss     acc " for stage in stages)
            _say(" ".join(["epoch", *headers, " seconds", "images/s"]))
            self.header = stages
        columns = [f"{row['epoch']:5.0f}"]
        for stage in stages:
            star = "*" if stage == "val" and is_best else " "
            columns.append(f"{row[f'{stage}/loss']:12.4f} {row[f'{stage}/acc']:7.2%}{star}")
        columns.append(f"{row['seconds']:8.1f}")
        if "images_per_second" in row:
            columns.append(f"{row['images_per_second']:8,.0f}")
        _say(" ".join(columns))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves; fill TensorBoard's tab HParams."""
        if not (self.writes and (folder := trainer.log_dir) and self.rows):
            return
        best = self.best(trainer)
        if trainer.is_global_zero:
            write_whole(Path(folder) / "curves.png", _curves(self.rows, best))
        chosen = {f"chosen/{key}": best[key] for key in CHOSEN if best and key in best}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.log_metrics(chosen, trainer.global_step)
                # Without torch's description of the whole table, TensorBoard makes its own, which
                # shows the settings first that differ between runs.
                _, *run = hparams(_typed(trainer), {})  # type: ignore[no-untyped-call]
                for summary in run:
                    logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)

    def best(self, trainer: Trainer) -> Row | None:
        """Return the first epoch of the best value that the run's ModelCheckpoint watches."""
        callback = trainer.checkpoint_callback
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            return None
        key, choose = callback.monitor, max if callback.mode == "max" else min
        return choose(
            (row for row in self.rows if key in row), key=lambda row: row[key], default=None
        )


def _say(line: str) -> None:
    """Print a line, above the progress bar if there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def _measured(trainer: Trainer, *stages: str) -> Row:
    metrics = trainer.callback_metrics
    keys = [f"{stage}/{name}" for stage in stages for name in QUANTITIES]
    return {key: round(float(metrics[key]), 6) for key in keys if key in metrics}


def _typed(trainer: Trainer) -> dict[str, Any]:
    """Return the settings that a result depends on, by the names that a user types."""
    found: dict[str, Any] = {
        "seed_everything": getattr(trainer.lightning_module, "seed", None),
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.precision": trainer.precision,
    }

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(name if key == "init_args" else f"{name}.{key}", inner)
        else:
            found[name] = value if isinstance(value, bool | int | float) else str(value)

    modules = {"model": trainer.lightning_module, "data": trainer.datamodule}  # type: ignore[attr-defined]
    for part, module in modules.items():
        settings = dict(getattr(module, "hparams", {}))
        for key in (
            "_instantiator",
            "root",
            "download",
            "sources",
            "verify",
            "log_steps",
            "images",
        ):
            settings.pop(key, None)
        add(part, settings)
    return found


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _curves(rows: list[Row], best: Row | None) -> bytes:
    """Draw loss and accuracy side by side, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
        for stage, color in COLORS.items():
            points = [
                (row["epoch"], row[f"{stage}/{name}"]) for row in rows if f"{stage}/{name}" in row
            ]
            if points:
                label, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
        if best is not None:
            label = f"chosen: epoch {best['epoch']:.0f}"
            axes.axvline(best["epoch"], color="grey", linewidth=1, linestyle=":", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
