"""Callbacks that keep, draw and write predictions."""

import csv
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from callbacks.tensorboard import writers
from cifar10.batches import Batch, Predictions, gathered
from cifar10.pictures import BATCH_SIZE, why_unreadable
from runs import write_whole

SHOWN = 30  # images on the terminal
AT_ONCE = 250  # images to explain at once, to save memory


class PredictionsKeeper(Callback):
    """Keeps the predictions of the last validation or test."""

    takes_many_steps = True

    def __init__(self) -> None:
        self.batches: dict[int, list[Predictions]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard earlier predictions."""
        self.batches = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch, except for the test curve."""
        if dataloader_idx == 0:
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    on_test_start = on_validation_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch, by set."""
        predictions = Predictions(outputs.float(), batch.labels, batch.indices)
        self.batches.setdefault(dataloader_idx, []).append(predictions)

    def predictions(self, number: int = 0) -> Predictions | None:
        """Return and discard the predictions of all ranks for a set; None if there was no
        batch."""
        return gathered(self.batches.pop(number, []))


class ConfusionMatrix(PredictionsKeeper):
    """Draws the validation confusion matrix in TensorBoard every few epochs of `fit`:
    `--trainer.callbacks+=callbacks.ConfusionMatrix`. A drawing takes 0.3 s.

    Args:
        every_n_epochs: Draw once in this many epochs.

    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the matrix if it is due."""
        from reports.evaluation import confusion_of  # slow to import
        from reports.figures import confusion_figure

        is_due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or trainer.sanity_checking or not is_due:
            return
        predictions = self.predictions()  # all ranks must call it
        if predictions is not None:
            classes: Any = pl_module.classes
            for board in writers(trainer):
                figure = confusion_figure(confusion_of(predictions), classes)
                board.add_figure("val/confusion", figure, trainer.global_step)


class PredictionTable(Callback):
    """Writes each image's two most probable classes, whether the model is sure, and all
    probabilities to a CSV file at the end; prints the first rows for image files. `files` is None
    for images that have numbers and labels instead. With `explain`, draws Grad-CAM images.
    Both go to the run folder."""

    def __init__(self, run: Path, files: list[Path] | None, *, explain: bool = False) -> None:
        self.path, self.explained = run / "predictions.csv", run / "explained"
        self.files, self.explain = files, explain
        self.rows: list[list[str]] = []
        self.skipped, self.has_drawn = 0, False

    def _forget(self) -> None:
        """Remove the images drawn by an earlier prediction."""
        for picture in self.explained.glob("[0-9]*_*.png"):
            picture.unlink()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        """Keep the probabilities [B, classes]; print the files that could not be read."""
        limit = pl_module.calibration.unsure_below if pl_module.temperature else None
        names, best, indices = pl_module.classes, outputs.topk(2), batch.indices.tolist()
        columns = indices, outputs.tolist(), best.indices.tolist(), batch.labels.tolist()
        for index, values, (first, second), label in zip(*columns, strict=True):
            is_sure = "" if limit is None else "yes" if values[first] >= limit else "no"
            texts = [f"{p:.6f}" for p in values]
            row = [names[first], texts[first], names[second], texts[second], is_sure]
            if self.files is None:
                self.rows.append([str(index), *row, names[label], *texts])
            else:
                self.rows.append([_printable(self.files[index]), *row, *texts])
        if self.explain and len(indices):
            self._explain(pl_module, batch, best.indices[:, 0])
        start = BATCH_SIZE * batch_idx
        for index, file in enumerate((self.files or [])[start : start + BATCH_SIZE], start):
            if index not in indices:
                tqdm.write(f"skipped {_printable(file)}: {why_unreadable(file)}", file=sys.stderr)
                self.skipped += 1

    def _explain(self, model: Any, batch: Batch, classes: Tensor) -> None:
        """Write each image as the network sees it, next to its Grad-CAM for the predicted class
        (without the other views of test-time augmentation)."""
        from reports.figures import with_focus  # slow to import
        from reports.focus import grad_cam

        assert self.files is not None
        parts = [torch.split(tensor, AT_ONCE) for tensor in (batch.images, batch.indices, classes)]
        for images, indices, predicted in zip(*parts, strict=True):
            focus = grad_cam(model.network, model.normalized(images / 255), predicted)
            if focus is None:
                raise MisconfigurationException(
                    "--explain needs a network with feature maps of at least 3 x 3 pixels"
                )
            if not self.has_drawn:
                self._forget()
                self.has_drawn = True
            pictures = images.permute(0, 2, 3, 1).cpu().numpy()
            overlays = (255 * with_focus(images, focus)).astype(np.uint8)
            for index, *pair in zip(indices.tolist(), pictures, overlays, strict=True):
                name = self.files[index].stem[:50]  # may be too long
                content = io.BytesIO()
                picture = Image.fromarray(np.concatenate(pair, axis=1))
                picture.resize((512, 256), Image.Resampling.NEAREST).save(content, "PNG")
                write_whole(self.explained / f"{index:04}_{name}.png", content.getvalue())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, unless nothing could be read, and print the first rows."""
        if not self.rows:
            return
        if not self.explain:
            self._forget()
        model: Any = pl_module
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = ["class", "probability", "runner_up", "runner_up_probability", "sure"]
        columns = ["image", *columns, "label"] if self.files is None else ["file", *columns]
        writer.writerow([*columns, *(f"p_{name}" for name in model.classes)])
        writer.writerows(self.rows)
        write_whole(self.path, text.getvalue().encode())
        if self.files is not None:
            table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
            for header in ("file", "class", "probability", "runner-up", "probability"):
                table.add_column(header, justify="right" if header[0] == "p" else "left")
            for file, first, p, second, q, is_sure, *_ in self.rows[:SHOWN]:
                first = f"not sure: {first}" if is_sure == "no" else first
                table.add_row(Text(file), first, f"{float(p):.1%}", second, f"{float(q):.1%}")
            terminal = Console(highlight=False, markup=False)
            if not terminal.is_terminal:
                terminal.width = 200  # long names on one line
            terminal.print(table)
            if (more := len(self.rows) - SHOWN) > 0:
                print(f"and {more} more")
        if model.temperature and model.calibration.unsure_below:
            limit = f"{model.calibration.unsure_below:.1%}"
            print(f'"sure": at least {limit}, which 95 % of the validation images reach')
        print(f"written to {self.path}" + (f", {self.explained}/" if self.explain else ""))


def _printable(file: Path) -> str:
    """Return a file's name, with escapes where it is not valid UTF-8."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")
