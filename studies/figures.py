"""A study's two figures: all runs with each setting's mean and interval, and the curves."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from reports.figures import COLORS, QUANTITIES, png
from runs import write_whole
from studies.answer import SHOWN, Answer, Mean
from studies.record import GUESSING


def write_figures(answer: Answer, folder: Path) -> None:
    """Write `summary.png` and `curves.png` to a folder."""
    labels = {}  # of the settings to draw, one line per factor
    for setting in answer.ranked()[:SHOWN]:
        levels = [
            f"{factor} {level}".strip().replace(",", "\n")
            for factor, level in answer.settings[setting].items()
        ]
        ended = [f"({answer.ended(setting)})"] if answer.ended(setting) else []
        labels[setting] = "\n".join(levels + ended)
    write_whole(folder / "summary.png", png(summary(answer, labels), 110))
    write_whole(folder / "curves.png", png(curves(answer, labels), 110))


def summary(answer: Answer, labels: dict[str, str]) -> Figure:
    """Draw the runs of each setting in `labels`, with mean and interval."""
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(labels)), layout="constrained")
    axes, shown = figure.subplots(), list[float]()
    for stage, use, shift in (("val", "chooses", -0.12), ("test", "not used", 0.12)):
        for y, setting in enumerate(labels):
            values = answer.values(setting, answer.choose.replace("val", stage))
            values, height = values * (100 if answer.is_percent else 1), y + shift
            shown += values[np.isfinite(values)].tolist()
            axes.plot(values, np.full(len(values), height), "o", color=COLORS[stage], alpha=0.35,
                      markersize=5)  # fmt: skip
            mean, label = Mean.of(values), None if y else f"{stage} ({use})"
            axes.errorbar(mean.value, height, xerr=mean.half, fmt="D", color=COLORS[stage],
                          capsize=4, label=label)  # fmt: skip
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    if shown:  # ignores the intervals, which can be huge with two seeds
        margin = 0.3 * (max(shown) - min(shown)) or 1.0
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
    quantity = "accuracy, %" if answer.is_percent else "loss"
    axes.set_xlabel(f"{quantity}, in the best epoch by {answer.choose}:\nruns, mean, 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def curves(answer: Answer, labels: dict[str, str]) -> Figure:
    """Draw loss and accuracy over epochs, mean and range over seeds, one row per setting in
    `labels`."""
    figure = Figure(figsize=(10.0, 2.4 * len(labels) + 0.5), layout="constrained")
    grid = figure.subplots(len(labels), 2, sharex=True, sharey="col", squeeze=False)
    for row, (setting, label) in zip(grid, labels.items(), strict=True):
        row[0].set_ylabel(label)
        epochs = list(itertools.chain(*(run.rows for run in answer.whole[setting])))
        for axes, quantity in zip(row, QUANTITIES, strict=True):
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            for stage, color in COLORS.items():
                key, values = f"{stage}/{quantity}", dict[float, list[float]]()
                for epoch in epochs:
                    if key in epoch:
                        values.setdefault(epoch["epoch"], []).append(epoch[key])
                x, y = sorted(values), [values[epoch] for epoch in sorted(values)]
                name, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                axes.plot(x, list(map(np.mean, y)), style, color=color, label=name)
                ends = list(map(min, y)), list(map(max, y))
                axes.fill_between(x, *ends, color=color, alpha=0.2, linewidth=0)
    for column, title in zip(grid.T, QUANTITIES.values(), strict=True):
        column[0].set_title(title)
        column[-1].set_xlabel("epoch")
    grid[0, 0].set_ylim(top=min(grid[0, 0].get_ylim()[1], 3 * GUESSING))
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
