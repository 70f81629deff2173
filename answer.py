"""What the runs of a study say: a table, comparisons, a sentence, figures."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.history import Row


@dataclass
class Outcome:
    """A finished run.

    Args:
        setting: The name of its setting.
        seed: Its seed.
        rows: Its epochs, as in `metrics.csv`.
        ended: Why it ended before its last epoch, if it did.

    """

    setting: str
    seed: int
    rows: list[Row]
    ended: str = ""

    def best(self, choose: str) -> Row | None:
        """Return the first epoch that is best by `val/acc` or `val/loss`."""
        rows = [row for row in self.rows if math.isfinite(row.get(choose, math.nan))]
        sign = -1 if choose.endswith("acc") else 1
        return min(rows, key=lambda row: sign * row[choose], default=None)

    def diverged(self) -> str:
        """Say that the run diverged, if it did: its training loss is no number at last, or above
        that of guessing, which is log 10."""
        loss = self.rows[-1].get("train/loss", 0.0) if self.rows else 0.0
        if math.isfinite(loss) and loss < 1.05 * math.log(10):
            return ""
        return f"diverged (train/loss {loss:.3g} in epoch {self.rows[-1]['epoch']:.0f})"

    def seconds(self) -> float:
        """Return how long its epochs took."""
        return sum(row["seconds"] for row in self.rows)


class Answer:
    def __init__(self, question: Any, settings: Any, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes

    def write(self, folder: Path) -> None:
        for o in self.outcomes:
            print(o.setting, o.seed, o.ended, o.best("val/acc"))
