"""What a test leaves in the run's folder: numbers, predictions, figures, and a part of the card."""

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
    """Write the results of a test into the run's folder, and say where; its figures go to
    TensorBoard too, and a line or more to the card.

    `values` has, beside the metrics, the `checkpoint`, its `epoch`, which `set` of images was
    tested, and the settings `changed` since, with both values. `other` is the name of another test
    set than the run's, `count` says how many images it has; `is_own` whether the images are those
    that the run began with, whose results are in files without a suffix.
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
    which = f"epoch {values['epoch']} (`{values['checkpoint']}`)"
    text = card.read_text(encoding="utf-8")
    if other:
        how = "".join(f", {key} {now} (not {old})" for key, (old, now) in changed.items())
        said = " ".join(summary.partition(";")[0].split())
        name = f"{other}, {images}"
        text = with_other(text, name, f"- **{name}** ({count}), {which}{how}: {said}\n")
    else:
        text = with_result(text, which, summary, images, changed)
    write_whole(card, text.encode())
