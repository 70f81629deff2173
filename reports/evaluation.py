"""How good a model is: accuracy with its interval, classes, confusions, calibration, mistakes."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.optimize import minimize_scalar
from statsmodels.stats.proportion import proportion_confint
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

from callbacks.predictions import Predictions
from cifar10.archive import CLASSES

N = len(CLASSES)
BINS = 15  # of confidence, as in Guo et al.
SHOWN = 36  # mistakes


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
    """What is to be said of a model on a set of images.

    Args:
        test: What it says of the test set.
        val: Of the validation set, on which the temperature is fitted; None if there is none.

    """

    def __init__(self, test: Predictions, val: Predictions | None = None) -> None:
        self.test = test
        logits, labels = test.logits, test.labels
        self.confusion = confusion_of(test)
        correct = int(self.confusion.diagonal().sum())
        self.accuracy = correct / len(labels)
        self.low, self.high = proportion_confint(correct, len(labels), method="wilson")
        self.top2 = float(multiclass_accuracy(logits, labels, N, average="micro", top_k=2))
        self.precision, self.recall, self.f1 = (
            metric(logits, labels, N, average="none")
            for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
        )
        self.calibration = calibration(logits, labels)
        self.temperature = fit_temperature(val.logits, val.labels) if val else None
        self.scaled = calibration(logits / (self.temperature or 1), labels)

    def values(self) -> dict[str, Any]:
        """Return all numbers as plain data; accuracies are fractions."""
        per_class = zip(self.precision, self.recall, self.f1, self.confusion.sum(1), strict=True)
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
                f"; divided by temperature {self.temperature:.2f}, fitted on validation: "
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
            numbers = [f"{float(v[i]):.1%}" for v in (self.precision, self.recall, self.f1)]
            count, other = wrong[i].max(dim=0)
            taken = f"{CLASSES[other]} ({count} of {int(self.confusion[i].sum())})"
            table.add_row(name, *numbers, taken if count else "")
        return table

    # --------------------------------------------------------------------------------- figures

    def figures(self, images: Tensor) -> dict[str, Figure]:
        """Return all figures by name; images are those of the set, uint8 [N, 3, 32, 32]."""
        return {
            "confusion": confusion_figure(self.confusion),
            "reliability": self.reliability_figure(),
            "mistakes": self.mistakes_figure(images),
        }

    def reliability_figure(self) -> Figure:
        """Draw accuracy over confidence, as the network is and with the temperature."""
        logits, labels = self.test.logits, self.test.labels
        panels = [("as trained", logits, self.calibration)]
        if self.temperature is not None:
            title = f"temperature {self.temperature:.2f}"
            panels.append((title, logits / self.temperature, self.scaled))
        figure = Figure(figsize=(4.2 * len(panels), 4.3), layout="constrained")
        for axes, (title, scores, numbers) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw_reliability(axes, scores, labels)
            axes.set_title(f"{title}: ECE {numbers['ece']:.1%}")
        return figure

    def mistakes_figure(self, images: Tensor) -> Figure:
        """Draw the most confident mistakes, each with what it is taken for and what it is."""
        confidence, predicted = self.test.logits.softmax(dim=1).max(dim=1)
        wrong = (predicted != self.test.labels).nonzero()[:, 0]
        worst = wrong[confidence[wrong].argsort(descending=True)][:SHOWN]
        figure = Figure(figsize=(9, 11.4), layout="constrained")
        for axes in figure.subplots(6, 6).flat:
            axes.set_axis_off()
        for axes, i in zip(figure.axes, worst.tolist(), strict=False):
            axes.imshow(images[i].permute(1, 2, 0).cpu())
            taken, true = CLASSES[predicted[i]], CLASSES[self.test.labels[i]]
            axes.set_title(f"{taken} {confidence[i]:.0%}\nis: {true}", fontsize=11)
        figure.suptitle(f"The {len(worst)} most confident mistakes", fontsize=14)
        return figure


def confusion_figure(confusion: Tensor) -> Figure:
    """Draw a confusion matrix int64 [10, 10]: how many of each class are taken for which."""
    share = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).cpu().numpy()
    figure = Figure(figsize=(6.8, 6), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(N), CLASSES, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(N), CLASSES)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(confusion.cpu().numpy()):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.colorbar(picture, label="share of the true class", shrink=0.85)
    return figure


def _draw_reliability(axes: Axes, logits: Tensor, labels: Tensor) -> None:
    """Draw the accuracy of each bin of confidence, and how much of the set is in it."""
    confidence, predicted = (part.cpu().numpy() for part in logits.softmax(dim=1).max(dim=1))
    correct = predicted == labels.cpu().numpy()
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins, weights=correct, minlength=BINS)
    middles = (np.arange(BINS) + 0.5) / BINS
    there = counts > 0
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="perfect")
    axes.bar(
        middles[there], (hits[there] / counts[there]), 0.9 / BINS,
        color="tab:blue", label="accuracy in the bin",
    )  # fmt: skip
    axes.plot(
        middles, counts / counts.sum(), color="tab:orange", marker=".", label="share of images"
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")


def _rounded(value: Any) -> Any:
    """Return plain data with six digits behind the point."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, Tensor):
        value = value.item()
    return round(value, 6) if isinstance(value, float) else value
