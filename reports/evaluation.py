"""How good a model is: accuracy with its interval, classes, confusions, calibration, mistakes."""

import math
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from cifar10.archive import CLASSES
from cifar10.batches import Predictions
from reports.figures import BINS, confusion_figure, mistakes_figure, reliability_figure

N = len(CLASSES)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the number that logits [N, 10] divided by which have the lowest cross entropy.

    Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599, section 4.2).
    """

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_temperature), labels))

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def calibration(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `ece`, the expected calibration error over 15 bins, and `nll`, the cross entropy."""
    ece = multiclass_calibration_error(logits.softmax(dim=1), labels, N, n_bins=BINS)
    return {"ece": float(ece), "nll": float(F.cross_entropy(logits, labels))}


def confusion_of(predictions: Predictions) -> Tensor:
    """Return how many images of each class (rows) are taken for which (columns), int64 [10, 10]."""
    return multiclass_confusion_matrix(predictions.logits, predictions.labels, N)


class Evaluation:
    """How good a model is, by its predictions of the test set, and of the validation set, if there
    is one: on that the temperature is fitted."""

    def __init__(self, test: Predictions, val: Predictions | None = None) -> None:
        self.test = test
        logits, labels = test.logits, test.labels
        self.confusion = confusion_of(test)
        correct = int(self.confusion.diagonal().sum())
        self.accuracy = correct / len(labels)
        self.low, self.high = binomtest(correct, len(labels)).proportion_ci(method="wilson")
        self.top2 = float(multiclass_accuracy(logits, labels, N, average="micro", top_k=2))
        self.precision, self.recall, self.f1 = (
            metric(logits, labels, N, average="none").tolist()
            for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
        )
        self.calibration = calibration(logits, labels)
        self.temperature = fit_temperature(val.logits, val.labels) if val else None
        self.fitted_on = len(val.labels) if val else 0
        self.scaled = calibration(logits / (self.temperature or 1), labels)

    def values(self) -> dict[str, Any]:
        """Return all numbers as plain data; accuracies are fractions."""
        sizes = self.confusion.sum(1).tolist()
        per_class = zip(self.precision, self.recall, self.f1, sizes, strict=True)
        found: dict[str, Any] = {
            "images": len(self.test.labels),
            "accuracy": {"value": self.accuracy, "low": self.low, "high": self.high},
            "top2_accuracy": self.top2,
            "calibration": self.calibration,
            "classes": {
                name: {"precision": p, "recall": r, "f1": f, "images": n}
                for name, (p, r, f, n) in zip(CLASSES, per_class, strict=True)
            },
            "confusion": self.confusion.tolist(),
        }
        if self.temperature is not None:
            found["temperature"] = {"value": self.temperature, "calibration": self.scaled}
        return _rounded(found)

    def summary(self) -> str:
        """Return what matters most, on a few lines."""
        low, high = 100 * self.low, 100 * self.high
        lines = [
            f"accuracy     {self.accuracy:.2%}, 95 % interval {low:.2f} to {high:.2f} (Wilson); "
            f"among the first two {self.top2:.2%}",
            f"calibration  ECE {self.calibration['ece']:.2%}, NLL {self.calibration['nll']:.4f}",
        ]
        if self.temperature is not None:
            lines[-1] += (
                f"; divided by temperature {self.temperature:.2f}, fitted on "
                f"{self.fitted_on:,} validation images: "
                f"ECE {self.scaled['ece']:.2%}, NLL {self.scaled['nll']:.4f}"
            )
        return "\n".join(lines)

    def table(self) -> Table:
        """Return a row for each class: how well it is found, what it is taken for."""
        table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
        table.add_column("class")
        for header in ("precision", "recall", "F1"):
            table.add_column(header, justify="right")
        table.add_column("most often taken for")
        wrong = self.confusion - self.confusion.diagonal().diag()
        for i, name in enumerate(CLASSES):
            numbers = [f"{v[i]:.1%}" for v in (self.precision, self.recall, self.f1)]
            count, other = wrong[i].max(dim=0)
            taken = f"{CLASSES[other]} ({count} of {int(self.confusion[i].sum())})"
            table.add_row(name, *numbers, taken if count else "")
        return table

    def figures(self, images: Tensor) -> dict[str, Figure]:
        """Return all figures by name; images are those of the set, uint8 [N, 3, 32, 32]."""
        logits, labels = self.test.logits, self.test.labels
        panels = {f"as trained: ECE {self.calibration['ece']:.1%}": logits}
        if self.temperature is not None:
            title = f"temperature {self.temperature:.2f}: ECE {self.scaled['ece']:.1%}"
            panels[title] = logits / self.temperature
        return {
            "confusion": confusion_figure(self.confusion),
            "reliability": reliability_figure(panels, labels),
            "mistakes": mistakes_figure(logits, labels, images),
        }


def _rounded(value: Any) -> Any:
    """Return plain data with six digits behind the point."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value
