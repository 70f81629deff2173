"""Two figures of a study: each run with mean and interval of its setting, and the curves."""

import itertools
import math

import numpy as np
from matplotlib.figure import Figure

from reports.figures import COLORS, QUANTITIES
from studies.answer import SHOWN, Answer, Mean


def _labels(answer: Answer) -> dict[str, str]:
    """Return the settings that are drawn, each with its name on as many lines as it has factors."""
    labels = {}
    for setting in answer.ranked()[:SHOWN]:
        levels = [f"{factor} {level}".strip() for factor, level in answer.settings[setting].items()]
        ended = [f"({answer.ended(setting)})"] if answer.ended(setting) else []
        labels[setting] = "\n".join(levels + ended)
    return labels


def summary(answer: Answer) -> Figure:
    """Draw every run, and mean and interval of each setting."""
    labels = _labels(answer)
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for stage, use, shift in (("val", "chooses", -0.12), ("test", "not used", 0.12)):
        key, color = answer.choose.replace("val", stage), COLORS[stage]
        for y, setting in enumerate(labels):
            bests = [run.best for run in answer.whole(setting)]
            values = [
                (100 if answer.is_percent else 1) * best[key] for best in bests if key in best
            ]
            mean = Mean.of(values)
            half = None if math.isnan(mean.low) else (mean.high - mean.low) / 2
            label = None if y else f"{stage} ({use})"
            axes.plot(values, [y + shift] * len(values), "o", color=color, alpha=0.35, markersize=5)
            axes.errorbar(
                mean.value, y + shift, xerr=half, fmt="D", color=color, capsize=4, label=label
            )
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    quantity = "accuracy, %" if answer.is_percent else "loss"
    axes.set_xlabel(f"{quantity}, in the best epoch by {answer.choose}:\nruns, mean, 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def curves(answer: Answer) -> Figure:
    """Draw loss and accuracy over epochs, a row for each setting: mean and range over seeds."""
    labels = _labels(answer)
    size = (10.0, 2.4 * len(labels) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(labels), 2, sharex=True, sharey="col", squeeze=False)
    for axes, word in zip(grid[0], QUANTITIES.values(), strict=True):
        axes.set_title(word)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    for row, (setting, label) in zip(grid, labels.items(), strict=True):
        row[0].set_ylabel(label)
        for axes, quantity in zip(row, QUANTITIES, strict=True):
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            for stage, color in COLORS.items():
                key, values = f"{stage}/{quantity}", dict[float, list[float]]()
                for epoch in itertools.chain(*(run.rows for run in answer.whole(setting))):
                    if key in epoch:
                        values.setdefault(epoch["epoch"], []).append(epoch[key])
                epochs = sorted(values)
                name, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                means = [np.mean(values[e]) for e in epochs]
                axes.plot(epochs, means, style, color=color, label=name)
                ends = [min(values[e]) for e in epochs], [max(values[e]) for e in epochs]
                axes.fill_between(epochs, *ends, color=color, alpha=0.2, linewidth=0)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
