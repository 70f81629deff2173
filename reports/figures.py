"""Figures of a run: learning curves, confusions, reliability, coverage, mistakes."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from runs import Row

COLORS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:green"}
QUANTITIES = {"loss": "loss", "acc": "accuracy"}
SHOWN = 36  # mistakes
LEGIBLE = 20  # most classes whose counts fit into a figure


def png(figure: Figure, dpi: int = 120) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    return content.getvalue()


def curves(rows: list[Row], best: Row | None) -> Figure:
    """Draw loss and accuracy side by side over the epochs of a run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
        for stage, color in COLORS.items():
            key = f"{stage}/{name}"
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                label, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker=".")
        if best is not None:
            label = f"chosen: epoch {best['epoch']:.0f}"
            axes.axvline(best["epoch"], color="grey", linewidth=1, linestyle=":", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    return figure


def confusion_figure(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix int64 [C, C]: shares of the true class as colours and, unless there
    are many classes, counts."""
    share = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).cpu().numpy()
    figure = Figure(figsize=(6.8, 6), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names, size = [_short(name) for name in classes], 10 if len(classes) <= LEGIBLE else 4.5
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    if len(classes) > LEGIBLE:
        figure.set_size_inches(12, 10.6)
        turned = {"rotation": 90}
    axes.set_xticks(range(len(names)), names, fontsize=size, **turned)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    counts = confusion.cpu().numpy() if len(classes) <= LEGIBLE else np.empty((0, 0))
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color)
    figure.colorbar(picture, label="share of the true class", shrink=0.85)
    return figure


def reliability_figure(panels: dict[str, np.ndarray]) -> Figure:
    """Draw accuracy over confidence, one panel per title. Its equal-mass bins are [4, bins]: mean
    confidence, accuracy, and the ends of its 95 % interval."""
    figure = Figure(figsize=(4.2 * len(panels), 4.3), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (confidence, accuracy, low, high)) in zip(row, panels.items(), strict=True):
        axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="perfect")
        axes.errorbar(
            confidence, accuracy, (accuracy - low, high - accuracy), fmt=".-", color="tab:blue",
            linewidth=1, capsize=2, label="a 15th of the images, 95 % interval",
        )  # fmt: skip
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    return figure


def coverage_figure(risks: np.ndarray, aurc: float) -> Figure:
    """Draw the risk-coverage curve: `risks` [N], in [0, 1], the error rate among the most confident
    predictions, over their share of all images."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    coverage = np.arange(1, len(risks) + 1) / len(risks)
    axes.plot(coverage, risks, color="tab:blue")
    axes.set(xlabel="share of images, the most confident first", ylabel="mistakes among them")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title=f"risk and coverage: AURC {aurc:.2%}", xlim=(0, 1), ylim=(0, None))
    axes.grid(alpha=0.3)
    return figure


def _short(name: str) -> str:
    """Return a name cut to 14 characters, with `$` escaped."""
    return (name if len(name) <= 14 else f"{name[:13]}…").replace("$", r"\$")


def most_confident_mistakes(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the indices int64 [M] of the most confident mistakes, at most 36, the most confident
    first, given logits [N, classes] and labels int64 [N]."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != labels).nonzero()[:, 0]
    return wrong[confidence[wrong].argsort(descending=True)][:SHOWN]


def with_focus(images: Tensor, focus: Tensor) -> np.ndarray:
    """Return images uint8 [M, 3, H, W] as float [M, H, W, 3] in [0, 1], bright where `focus`, float
    [M, H, W] in [0, 1], is high."""
    colors = colormaps["inferno"](focus.cpu().numpy())[..., :3]
    blended: np.ndarray = 0.4 * images.permute(0, 2, 3, 1).cpu().numpy() / 255 + 0.6 * colors
    return blended


def mistakes_figure(
    logits: Tensor,
    labels: Tensor,
    images: Tensor,
    classes: Sequence[str],
    focus: Tensor | None = None,
) -> Figure:
    """Draw mistakes: images uint8 [M, 3, 32, 32] with their predicted and true classes. With
    `focus`, float [M, 32, 32] in [0, 1], what supports the predicted class is bright."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    rows = max(1, -(-len(images) // 6))
    figure = Figure(figsize=(9, 0.6 + 1.8 * rows), layout="constrained")
    axes = figure.subplots()  # one for all: 36 axes would take a second
    axes.set_axis_off()
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    if focus is not None:
        pictures = with_focus(images, focus)
    for place, picture in enumerate(pictures):
        row, column = divmod(place, 6)
        top = 1.25 * row
        axes.imshow(picture, extent=(column, column + 0.9, top + 0.9, top))
        guess, true = (_short(classes[int(numbers[place])]) for numbers in (predicted, labels))
        title = f"{guess} {confidence[place]:.0%}\nlabel: {true}"
        axes.text(column + 0.45, top - 0.03, title, fontsize=10, ha="center", va="bottom")
    axes.set(xlim=(0, 5.9), ylim=(1.25 * rows - 0.3, -0.35), aspect="equal")
    note = "" if focus is None else ": evidence for the predicted class (Grad-CAM)"
    figure.suptitle(f"The {len(images)} most confident mistakes{note}", fontsize=14)
    return figure
