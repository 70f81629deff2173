"""What a test leaves in the run's folder: numbers, predictions, figures, and a part of the card."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from reports.card import with_other, with_result
from reports.figures import png
from runs import write_whole


@dataclass
class Results:
    """Where the results of a test go: into the `folder` of the run whose `checkpoint` it is of.

    `images` says which ones were tested, `other` is the name of another test set than the run's,
    and `changed` has the settings that are not the run's, with both values. The results of the test
    images that the run began with are in files without a suffix, and have a part of the card.
    """

    folder: Path
    checkpoint: str
    epoch: int
    step: int
    images: str
    other: str
    is_own: bool
    changed: dict[str, list[Any]]

    def write(
        self,
        count: str,
        summary: str,
        values: dict[str, Any],
        figures: dict[str, Figure],
        predictions: bytes = b"",
    ) -> None:
        """Write the results of so many images, and say where; figures go to TensorBoard too."""
        suffix = "" if self.is_own else f"_{self.images}"
        suffix = f"_{self.other}_{self.images}" if self.other else suffix
        files = {f"test{suffix}.json": json.dumps(values, indent=2).encode()}
        files |= {f"test{suffix}.npz": predictions} if predictions else {}
        files |= {f"{name}{suffix}.png": png(figure, 110) for name, figure in figures.items()}
        for name, content in files.items():
            write_whole(self.folder / name, content)
        print(f"written to {self.folder}: {', '.join(files)}")
        if any(self.folder.glob("events.out.*")):
            with SummaryWriter(self.folder) as board:
                for name, figure in figures.items():
                    board.add_figure(f"test/{name}{suffix}", figure, self.step)
        card = self.folder / "model.md"
        if (self.other or not suffix) and card.exists():
            text = self._in_card(card.read_text(encoding="utf-8"), count, summary)
            write_whole(card, text.encode())

    def _in_card(self, card: str, count: str, summary: str) -> str:
        which = f"epoch {self.epoch} (`{self.checkpoint}`)"
        if not self.other:
            return with_result(card, which, summary, self.images, self.changed)
        name = f"{self.other}, {self.images}"
        how = "".join(f", {key} {now} (not {old})" for key, (old, now) in self.changed.items())
        said = " ".join(summary.partition(";")[0].split())
        return with_other(card, name, f"- **{name}** ({count}), {which}{how}: {said}\n")
