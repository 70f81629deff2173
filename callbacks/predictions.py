"""Keeps what a network says of every image, for whoever wants more than two means."""

import csv
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from cifar10.archive import CLASSES
from cifar10.batches import Batch
from cifar10.pictures import BATCH_SIZE

SHOWN = 30  # pictures on the terminal


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
        logits, labels, indices = whole[0].cpu(), whole[1].view(-1).cpu(), whole[2].view(-1).cpu()
        order = indices.argsort()
        return Predictions(logits[order], labels[order], indices[order])


class PredictionsKeeper(Callback):
    """Keeps the predictions of the last validation or test."""

    takes_many_steps = True

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
        """Keep a batch; of the test set's curve none."""
        if dataloader_idx == 0:
            self.kept.update(outputs, batch)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def predictions(self) -> Predictions | None:
        """Return the predictions, in the order of the images in the data set, and forget them; None
        if there was no batch."""
        found = self.kept.compute() if self.kept.update_called else None
        self.kept.reset()
        return found


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
        if trainer.state.fn != "fit" or not is_due:
            return
        predictions = self.predictions()  # takes all ranks
        if predictions is None:
            return
        confusion = confusion_of(predictions)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.add_figure(
                    "val/confusion", confusion_figure(confusion), trainer.global_step
                )


class PredictionTable(Callback):
    """Writes the two most probable classes of every image to a CSV file, batch by batch; to be used
    in `with`, after which the file is whole, or not there.

    Args:
        path: The file, which is there when all is done.
        files: The pictures' files, or None if the images have numbers only.

    """

    def __init__(self, path: Path, files: list[Path] | None) -> None:
        self.path, self.files = path, files
        self.first: list[list[str]] = []  # rows to show
        self.written = self.skipped = 0
        self.due = 0  # the index of the next image

    def __enter__(self) -> "PredictionTable":
        self.scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.file = self.scratch.open("w", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        name = "image" if self.files is None else "file"
        self.writer.writerow([name, "class", "probability", "runner_up", "runner_up_probability"])
        return self

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch: probabilities [B, 10]."""
        best = outputs.topk(2)
        for index, values, classes in zip(
            batch.indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
        ):
            self._skip_to(index)
            name = str(index if self.files is None else self.files[index])
            pairs = zip(classes, values, strict=True)
            row = [name, *(w for c, v in pairs for w in (CLASSES[c], f"{v:.4f}"))]
            self.writer.writerow(row)
            if len(self.first) < SHOWN:
                self.first.append(row)
            self.due = index + 1
            self.written += 1
        self._skip_to(BATCH_SIZE * (batch_idx + 1))

    def _skip_to(self, index: int) -> None:
        """Name the files before `index` that gave no picture."""
        for file in (self.files or [])[self.due : index]:
            tqdm.write(f"skipped {file}: no picture, or a damaged one", file=sys.stderr)
            self.skipped += 1
        self.due = index

    def __exit__(self, kind: object, *_: object) -> None:
        """Finish the file, and show the first pictures; or leave nothing half-written."""
        self.file.close()
        if kind is not None:
            self.scratch.unlink()
            return
        self.scratch.replace(self.path)
        if self.files is not None and self.first:
            table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
            for header in ("file", "class", "probability", "runner-up", "probability"):
                table.add_column(header, justify="right" if header[0] == "p" else "left")
            for name, first, p, second, q in self.first:
                table.add_row(Text(name), first, f"{float(p):.1%}", second, f"{float(q):.1%}")
            terminal = Console(highlight=False)
            if not terminal.is_terminal:
                terminal.width = 200  # long names on one line
            terminal.print(table)
            if (more := self.written - len(self.first)) > 0:
                print(f"and {more} more")
        print(f"written to {self.path}")
