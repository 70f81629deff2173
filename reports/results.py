"""What a test writes to the run folder: metrics, predictions, figures, a part of the card."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from reports.card import with_other, with_result
from reports.figures import png
from runs import write_whole


def write_results(
    folder: Path,
    values: dict[str, Any],
    summary: str,
    figures: dict[str, Figure],
    predictions: bytes = b"",
    *,
    other: str,
    is_own: bool,
    count: str,
    step: int,
) -> None:
    """Write a test's results to the run folder and print where. Figures also go to TensorBoard,
    and one or more lines to the card.

    `values` has the metrics, the `checkpoint`, its `epoch`, the `set` of images tested, and the
    arguments `changed` since, with both values. `other` names a test set that is not the run's, and
    `count` says how many images it has. `is_own` is whether the images are those that the run
    started with; only their files have no suffix.
    """
    images, changed = values["set"], values["changed"]
    suffix = f"_{other}_{images}" if other else "" if is_own else f"_{images}"
    files = {f"test{suffix}.json": json.dumps(values, indent=2).encode()}
    files |= {f"test{suffix}.npz": predictions} if predictions else {}
    drawn = {f"{name}{suffix}": png(figure, 110) for name, figure in figures.items()}
    files |= {f"{name}.png": picture for name, picture in drawn.items()}
    for name, content in files.items():
        write_whole(folder / name, content)
    print(f"written to {folder}: {', '.join(files)}")
    if any(folder.glob("events.out.*")):
        with SummaryWriter(folder) as board:
            for name, picture in drawn.items():
                pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
                board.add_image(f"test/{name}", pixels, step, dataformats="HWC")
    if not (card := folder / "model.md").exists() or (suffix and not other):
        return
    checkpoint = f"epoch {values['epoch']} (`{values['checkpoint']}`)"
    text = card.read_text(encoding="utf-8")
    if other:
        changes = "".join(f", {key} {new} (not {old})" for key, (old, new) in changed.items())
        result = " ".join(summary.partition(";")[0].split())
        name = f"{other}, {images}"
        text = with_other(text, name, f"- **{name}** ({count}), {checkpoint}{changes}: {result}\n")
    else:
        text = with_result(text, checkpoint, summary, images, changed)
    write_whole(card, text.encode())
