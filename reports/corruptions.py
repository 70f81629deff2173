"""Accuracy on images corrupted on purpose, such as CIFAR-10-C (Hendrycks and Dietterich, arXiv
1903.12261): several kinds, each at severities from 1 up."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.table import Table

from cifar10.batches import Predictions
from cifar10.test_sets import SEVERITIES


class Corruptions:
    """Accuracy by corruption and severity, from predictions keyed by corruption."""

    def __init__(self, predictions: Mapping[str, Predictions]) -> None:
        self.accuracies: dict[str, np.ndarray] = {}
        for name, (logits, labels, _) in predictions.items():
            is_right = (logits.argmax(dim=1) == labels).double().numpy()
            self.accuracies[name] = is_right.reshape(SEVERITIES, -1).mean(axis=1)
        self.mean = float(np.mean([row.mean() for row in self.accuracies.values()]))

    def values(self) -> dict[str, Any]:
        """Return all numbers as plain data, as fractions."""
        accuracies = {name: row.round(6).tolist() for name, row in self.accuracies.items()}
        return {"mean_accuracy": round(self.mean, 6), "accuracies": accuracies}

    def summary(self) -> str:
        """Return the mean accuracy over corruptions and severities."""
        return f"accuracy {self.mean:.2%} in the mean of {len(self.accuracies)} corruptions"

    def table(self) -> Table:
        """Return each corruption's accuracy, in the mean and at each severity, as rows."""
        table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
        table.add_column("accuracy, by severity")
        for header in ("mean", *(str(i + 1) for i in range(SEVERITIES))):
            table.add_column(header, justify="right")
        for name, row in self.accuracies.items():
            cells = (f"{value:.1%}" for value in row)
            table.add_row(name.replace("_", " "), f"{row.mean():.1%}", *cells)
        return table

    def figures(self) -> dict[str, Figure]:
        """Draw accuracy over severity, for each corruption and for their mean."""
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        severities = range(1, SEVERITIES + 1)
        for i, (name, row) in enumerate(self.accuracies.items()):
            style = ("-", "--", ":")[i // 10 % 3]  # there are only ten colours
            axes.plot(severities, row, style, linewidth=1, label=name.replace("_", " "))
        mean = np.mean([*self.accuracies.values()], axis=0)
        axes.plot(severities, mean, "o-", color="black", linewidth=2.5, label="mean")
        figure.legend(loc="outside right upper", fontsize=8)
        axes.set(xlabel="severity", ylabel="accuracy", ylim=(0, 1), xticks=severities)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
        return {"severity": figure}
