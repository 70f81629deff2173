"""The history of a run: a line an epoch on the terminal, `metrics.csv` and `curves.png`."""

import csv
import io
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure

from runs import write_whole

COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
QUANTITIES = {"loss": "loss", "acc": "accuracy"}


class History(Callback):
    """Keeps the metrics of every epoch, in the checkpoint too: a resumed run has whole curves.

    Args:
        writes: Write `metrics.csv` and `curves.png` into the run's folder.

    """

    def __init__(self, writes: bool = True) -> None:
        self.writes = writes
        self.rows: list[dict[str, float]] = []
        self.has_header = False

    def state_dict(self) -> dict[str, Any]:
        """Return the rows for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows of the checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have TensorBoard draw train and validation on one chart."""
        layout = {
            title: ["Multiline", [f"^{stage}/{name}$" for stage in COLORS]]
            for name, title in QUANTITIES.items()
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_custom_scalars({"learning curves": layout})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep and print the epoch's metrics."""
        row: dict[str, float] = {"epoch": trainer.current_epoch}
        for stage in COLORS:
            for name in QUANTITIES:
                if (value := trainer.callback_metrics.get(f"{stage}/{name}")) is not None:
                    row[f"{stage}/{name}"] = round(float(value), 6)
        row["seconds"] = round(time.perf_counter() - self.started, 2)
        self.rows.append(row)
        if trainer.is_global_zero:
            if not self.has_header:
                print("epoch", *(f"{stage:>7} loss     acc " for stage in _stages(row)), " seconds")
                self.has_header = True
            print(_line(row, is_best=row is _best(self.rows)), flush=True)
        if self.writes and (folder := trainer.log_dir) and trainer.is_global_zero:
            write_whole(Path(folder) / "metrics.csv", _csv(self.rows))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves."""
        if self.writes and (folder := trainer.log_dir) and self.rows and trainer.is_global_zero:
            write_whole(Path(folder) / "curves.png", _curves(self.rows))


def _best(rows: list[dict[str, float]]) -> dict[str, float] | None:
    """The first epoch of the highest validation accuracy, if there was validation."""
    rows = [row for row in rows if "val/acc" in row]
    return max(rows, key=lambda row: row["val/acc"]) if rows else None


def _stages(row: dict[str, float]) -> list[str]:
    return [stage for stage in COLORS if f"{stage}/loss" in row]


def _line(row: dict[str, float], is_best: bool) -> str:
    """One epoch on one line; a star where validation accuracy is the best so far."""
    parts = [f"{row['epoch']:5.0f}"]
    for stage in _stages(row):
        star = "*" if stage == "val" and is_best else " "
        parts.append(f"{row[f'{stage}/loss']:12.4f} {row[f'{stage}/acc']:7.2%}{star}")
    return " ".join([*parts, f"{row['seconds']:8.1f}"])


def _csv(rows: list[dict[str, float]]) -> bytes:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _curves(rows: list[dict[str, float]]) -> bytes:
    """Draw loss and accuracy side by side, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    best = _best(rows)
    for axes, (name, title) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
        for stage, color in COLORS.items():
            points = [
                (row["epoch"], row[f"{stage}/{name}"]) for row in rows if f"{stage}/{name}" in row
            ]
            if points:
                label, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
        if best is not None:
            label = f"best val/acc: epoch {best['epoch']:.0f}, {best['val/acc']:.1%}"
            axes.axvline(best["epoch"], color="grey", linewidth=1, linestyle=":", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
