"""Evaluation of a model: accuracy, per-class metrics, confusions, mistakes, calibration."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from cifar10.archive import CLASSES
from cifar10.batches import Predictions
from reports.figures import (
    confusion_figure,
    coverage_figure,
    mistakes_figure,
    most_confident_mistakes,
    reliability_figure,
)
from reports.judges import Judgements, fair, summary_of

BINS = 15  # of confidence, as in Guo et al.
DRAWS = 999
MANY = 20  # most classes in a table
SURE = (0.95, 0.99)  # confidence thresholds


def confusion_of(predictions: Predictions) -> Tensor:
    """Return the confusion matrix int64 [C, C]: true classes in rows, predicted in columns."""
    logits, labels, _ = predictions
    return multiclass_confusion_matrix(logits, labels, logits.shape[1])


def wilson(correct: int, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson confidence interval of a proportion; (0, 1) for no images."""
    if not images:
        return 0.0, 1.0
    interval = binomtest(correct, images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def equal_mass_bins(confidence: np.ndarray) -> list[np.ndarray]:
    """Return the indices of confidences [N] in `BINS` equal-mass bins, the lowest first."""
    order = np.argsort(confidence, kind="stable")
    return [part for part in np.array_split(order, BINS) if len(part)]


class Probabilities:
    """Calibration of the probabilities from logits [N, C], given labels int64 [N]."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        logits = logits.double()
        probabilities = logits.softmax(dim=1)
        confidence, predicted = probabilities.max(dim=1)
        self.confidence: np.ndarray = confidence.numpy()
        self.is_right: np.ndarray = (predicted == labels).numpy().astype(float)
        self.bins = equal_mass_bins(self.confidence)
        self.ece = float(self.calibration_errors(self.is_right[None])[0])
        self.nll = float(F.cross_entropy(logits, labels))
        errors = (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(dim=1)
        self.brier = float(errors.mean())

    def calibration_errors(self, is_right: np.ndarray) -> np.ndarray:
        """Return the expected calibration error [R] for R sets of outcomes `is_right` [R, N]: the
        gap between confidence and accuracy in equal-mass bins, averaged over images (Roelofs et
        al., arXiv 2012.08668)."""
        gaps = [abs(self.confidence[i].sum() - is_right[:, i].sum(axis=1)) for i in self.bins]
        return np.sum(gaps, axis=0) / len(self.confidence)

    def by_chance(self) -> dict[str, float]:
        """Return the ECE that a perfectly calibrated model with the same confidences has by chance,
        as the sample is finite: the mean and the 95 % quantile of its draws (Vaicenavicius et al.,
        arXiv 1902.06977, section 4)."""
        rng = np.random.default_rng(0)
        draws = (rng.random(len(self.confidence)) < self.confidence for _ in range(DRAWS))
        errors = np.concatenate([self.calibration_errors(draw[None]) for draw in draws])
        return {"mean": float(errors.mean()), "most": float(np.quantile(errors, 0.95))}

    def risks(self) -> np.ndarray:
        """Return the error rate among the k most confident predictions, for k from 1 to N."""
        order = np.argsort(-self.confidence, kind="stable")
        return np.cumsum(1 - self.is_right[order]) / np.arange(1, len(order) + 1)

    def aurc(self) -> float:
        """Return the area under the risk-coverage curve: the mean of `risks` (Geifman et al., arXiv
        1805.08206)."""
        return float(self.risks().mean())

    def at(self, confidence: float) -> dict[str, float | None]:
        """Return the share of images with at least this confidence, and the accuracy on them."""
        is_sure = self.confidence >= confidence
        right = float(self.is_right[is_sure].mean()) if is_sure.any() else None
        return {"coverage": float(is_sure.mean()), "accuracy": right}

    def values(self) -> dict[str, float]:
        """Return ECE, NLL (cross entropy) and Brier score."""
        return {"ece": self.ece, "nll": self.nll, "brier": self.brier}


class Evaluation:
    """Evaluates a model from its predictions on the test set. Logits are divided by `temperature`,
    if there is one. `people` are human judgements of these images, if known; `classes` are the
    class names."""

    def __init__(
        self,
        test: Predictions,
        temperature: float | None = None,
        people: Judgements | None = None,
        classes: Sequence[str] = CLASSES,
    ) -> None:
        self.test, self.classes, self.temperature = test, classes, temperature
        self.fair = None if people is None else fair(test, people)
        logits, labels, count = test.logits, test.labels, len(classes)
        self.confusion = confusion_of(test)
        self.accuracy = float(self.confusion.diagonal().sum()) / len(labels)
        self.low, self.high = wilson(int(self.confusion.diagonal().sum()), len(labels))
        self.top2 = float(multiclass_accuracy(logits, labels, count, average="micro", top_k=2))
        self.precision, self.recall, self.f1 = (
            metric(logits, labels, count, average="none").tolist()
            for metric in (multiclass_precision, multiclass_recall, multiclass_f1_score)
        )
        self.as_trained = Probabilities(logits, labels)
        self.probabilities = Probabilities(logits / (temperature or 1), labels)
        self.chance = self.probabilities.by_chance()
        predicted, confidence = logits.argmax(dim=1), self.probabilities.confidence
        self.confidences = [  # mean, of the images predicted as each class
            float(confidence[mask].mean()) if mask.any() else None
            for mask in (predicted.numpy() == i for i in range(count))
        ]

    def values(self) -> dict[str, Any]:
        """Return all numbers as plain data; accuracies are fractions."""
        numbers: dict[str, Any] = {
            "images": len(self.test.labels),
            "accuracy": {"value": self.accuracy, "low": self.low, "high": self.high},
            "top2_accuracy": self.top2,
            "temperature": self.temperature,
            "calibration": {
                **self.probabilities.values(),
                "ece_by_chance": self.chance,
                "aurc": self.probabilities.aurc(),
                "confident": {str(limit): self.probabilities.at(limit) for limit in SURE},
            },
            "as_trained": self.as_trained.values(),
            "classes": {
                name: {
                    "precision": self._share(self.precision[i], i, dim=0)
                    if self.confidences[i]
                    else None,
                    "recall": self._share(self.recall[i], i, dim=1),
                    "f1": self.f1[i],
                    "confidence": self.confidences[i],
                    "images": int(self.confusion[i].sum()),
                }
                for i, name in enumerate(self.classes)
                if self.confusion[i].any()
            },
            "confusion": self.confusion.tolist(),
            "people": self.fair,
        }
        return _rounded(numbers)

    def _share(self, value: float, i: int, dim: int) -> dict[str, float]:
        """Return a class's precision or recall, a share of its column (`dim` 0) or row (`dim` 1) of
        the confusion matrix, with the interval."""
        low, high = wilson(int(self.confusion[i, i]), int(self.confusion.select(1 - dim, i).sum()))
        return {"value": value, "low": low, "high": high}

    def summary(self) -> str:
        """Return the main results in a few lines."""
        probs, chance = self.probabilities, self.chance
        scaling = "not calibrated"
        if self.temperature is not None:
            trained = f"ECE {self.as_trained.ece:.2%}, NLL {self.as_trained.nll:.4f}"
            scaling = f"divided by temperature {self.temperature:.2f} (as trained: {trained})"
        sure = []
        for limit in SURE:
            share = probs.at(limit)
            right = "" if share["accuracy"] is None else f", {share['accuracy']:.2%} correct"
            sure.append(f"at least {limit:.0%}: {share['coverage']:.1%} of the images{right}")
        lines = [
            f"accuracy     {self.accuracy:.2%}, 95 % interval {100 * self.low:.2f} to "
            f"{100 * self.high:.2f} (Wilson); top-2 accuracy {self.top2:.2%}",
            f"calibration  ECE {probs.ece:.2%} (a perfectly calibrated model: {chance['mean']:.2%} "
            f"on average, below {chance['most']:.2%} in 95 of 100 test sets); NLL {probs.nll:.4f}, "
            f"Brier score {probs.brier:.4f}; {scaling}",
            f"confidence   {'; '.join(sure)}; AURC {probs.aurc():.2%}",
        ]
        return "\n".join(lines if self.fair is None else [*lines, summary_of(self.fair)])

    def table(self) -> Table:
        """Return a row per class, or for the `MANY` with the lowest recall: recall with its 95 %
        interval, precision and mean confidence of the images predicted as the class, and the class
        it is most often confused with."""
        table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
        table.add_column("class")
        for header in ("recall", "95 %", "precision", "confidence"):
            table.add_column(header, justify="right")
        table.add_column("confused with")
        wrong = self.confusion - self.confusion.diagonal().diag()
        counts = self.confusion.sum(dim=1)
        order = sorted((i for i, count in enumerate(counts) if count), key=self.recall.__getitem__)
        if len(order) <= MANY:
            order.sort()
        else:
            table.caption = f"the {MANY} of {len(order)} classes with the lowest recall"
        if missing := len(counts) - len(order):
            table.caption = f"{table.caption or ''} ({missing} classes have no images)".strip()
        for i in order[:MANY]:
            name, recall = self.classes[i], self._share(self.recall[i], i, dim=1)
            interval = f"{100 * recall['low']:.1f}-{100 * recall['high']:.1f}"
            confidence = self.confidences[i]
            columns = self.recall[i], self.precision[i] if confidence else None, confidence
            recalled, precision, confident = ("" if v is None else f"{v:.1%}" for v in columns)
            count, other = wrong[i].max(dim=0)
            confused_with = f"{self.classes[int(other)]} ({count / counts[i]:.1%})" if count else ""
            table.add_row(name, recalled, interval, precision, confident, confused_with)
        return table

    def figures(
        self, images: Tensor, focus: Callable[[Tensor, Tensor], Tensor | None]
    ) -> dict[str, Figure]:
        """Return all figures by name. `images` are the set's, uint8 [N, 3, 32, 32]; `focus` returns
        Grad-CAM maps for images and classes (`grad_cam`)."""
        logits, labels = self.test.logits / (self.temperature or 1), self.test.labels
        panels = {f"as trained: ECE {self.as_trained.ece:.1%}": _bins(self.as_trained)}
        if self.temperature is not None:
            title = f"temperature {self.temperature:.2f}: ECE {self.probabilities.ece:.1%}"
            panels[title] = _bins(self.probabilities)
        worst = most_confident_mistakes(logits, labels)
        mistakes = logits[worst], labels[worst], images[worst.to(images.device)]
        figures = {
            "confusion": confusion_figure(self.confusion, self.classes),
            "reliability": reliability_figure(panels),
            "coverage": coverage_figure(self.probabilities.risks(), self.probabilities.aurc()),
            "mistakes": mistakes_figure(*mistakes, self.classes),
        }
        maps = focus(mistakes[2], mistakes[0].argmax(dim=1)) if len(worst) else None
        if maps is not None:
            figures["focus"] = mistakes_figure(*mistakes, self.classes, maps)
        return figures


def _bins(probs: Probabilities) -> np.ndarray:
    """Return each bin's mean confidence, accuracy, and the ends of its interval, [4, bins]."""
    rows = []
    for members in equal_mass_bins(probs.confidence):
        right = probs.is_right[members]
        rows.append(
            (probs.confidence[members].mean(), right.mean(), *wilson(int(right.sum()), len(right)))
        )
    return np.array(rows).T


def _rounded(value: Any) -> Any:
    """Return plain data rounded to six decimals."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return round(value, 6) if isinstance(value, float) else value
