"""What the runs of a study say: a verdict, a table with intervals, comparisons."""

import hashlib
import inspect
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reports.card import LIMITS
from runs import Row, write_whole
from studies.question import Question
from studies.record import Record, best_of, rows_of
from studies.statistics import ALPHA, corrected_p, detectable, interval, smallest_p

ENDINGS = ("diverged", "pruned", "without a validation")  # of runs that are in no mean
SHOWN = 20  # comparisons in a table, settings in a figure; of more only the best

Columns = dict[str, list[str]]  # of a table: header and cells


@dataclass
class Mean:
    """A mean over seeds with its 95 % interval by Student's t, which one seed does not have."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        """Return the mean of values, NaN if there are none."""
        return cls(float(np.mean(values)) if values else math.nan, *interval(values))

    def text(self, format_: str, scale: int = 1) -> str:
        """Return `mean ± half the interval`."""
        if math.isnan(self.value):
            return "-"
        half = format(scale * (self.high - self.low) / 2, format_.removeprefix("+"))
        return format(scale * self.value, format_) + ("" if math.isnan(self.low) else f" ± {half}")


@dataclass
class Run:
    """A finished run: the name of its setting, its record, its epochs and the best of them."""

    setting: str
    record: Record
    rows: list[Row]
    best: Row

    @property
    def seconds(self) -> float:
        """How long its epochs took."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def code(self) -> str:
        """What tells the code and the packages of a run from others."""
        made_by = json.dumps([self.record["code"], self.record["versions"]], sort_keys=True)
        return hashlib.sha256(made_by.encode()).hexdigest()[:8]


@dataclass
class Difference:
    """A comparison of two levels of a factor: `other` minus `one` by seed, in the metric that
    chooses, and in test/acc in the same epochs. `p` is corrected for all comparisons."""

    factor: str
    one: str
    other: str
    gains: dict[int, float]
    tested: list[float]
    p: float = math.nan

    def against(self, level: str) -> "Difference":
        """Return the same comparison, as difference of the other level to this one."""
        if level == self.one:
            return self
        gains, tested = (
            {seed: -gain for seed, gain in self.gains.items()},
            [-g for g in self.tested],
        )
        return replace(self, one=self.other, other=self.one, gains=gains, tested=tested)

    @property
    def mean(self) -> Mean:
        """The mean over seeds."""
        return Mean.of(list(self.gains.values()))


class Answer:
    """The answer to a question by the runs that are on record.

    Args:
        question: What was asked.
        command: The command that was given.
        settings: For each setting by name the level of each factor, by name.
        records: The finished runs with the names of their settings.

    """

    def __init__(
        self,
        question: Question,
        command: str,
        settings: dict[str, dict[str, str]],
        records: list[tuple[str, Record]],
    ) -> None:
        self.question, self.command, self.settings = question, command, settings
        self.choose = question.choose
        self.is_percent = self.choose.endswith("acc")
        self.sign = 1 if self.is_percent else -1  # of better
        bests = [best_of(record, self.choose) or {} for _, record in records]
        self.runs = [
            Run(name, r, rows_of(r), best) for (name, r), best in zip(records, bests, strict=True)
        ]
        self.values = self._of_each_run(self.choose)
        names = dict.fromkeys(factor for levels in settings.values() for factor in levels)
        self.factors = [f for f in names if len({levels[f] for levels in settings.values()}) > 1]
        self.differences = self._compared()

    def whole(self, setting: str) -> list[Run]:
        """Return the runs of a setting that are in its mean."""
        return [run for run in self.runs if run.setting == setting and not run.record["ended"]]

    def ended(self, setting: str) -> str:
        """Say how many runs of a setting are in no mean, and why; nothing if there are none."""
        why = [run.record["ended"] for run in self.runs if run.setting == setting]
        counts = {word: sum(ended.startswith(word) for ended in why) for word in ENDINGS}
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count)

    def ranked(self) -> list[str]:
        """Return the settings in the order of the question; if they are very many or picked by a
        search, those with most whole runs first, of these the best."""
        if len(self.settings) <= SHOWN and not self.question.search:
            return list(self.settings)

        def rank(setting: str) -> tuple[int, float]:
            values = [value for (name, _), value in self.values.items() if name == setting]
            return len(values), self.sign * float(np.mean(values)) if values else 0.0

        return sorted(self.settings, key=rank, reverse=True)

    # ------------------------------------------------------------------------------ statistics

    def _of_each_run(self, key: str) -> dict[tuple[str, int], float]:
        """Return a metric of the best epoch of each whole run, by setting and seed."""
        whole = [run for run in self.runs if not run.record["ended"] and key in run.best]
        return {(run.setting, run.record["seed"]): run.best[key] for run in whole}

    def _by_level(
        self, factor: str, values: dict[tuple[str, int], float]
    ) -> dict[str, dict[int, float]]:
        """Return for each level of a factor the values by seed, as means over the levels of the
        other factors; a seed that lacks one of these settings does not count."""
        found: dict[str, dict[int, float]] = {}
        for level in dict.fromkeys(levels[factor] for levels in self.settings.values()):
            names = [name for name, levels in self.settings.items() if levels[factor] == level]
            found[level] = {
                seed: float(np.mean([values[name, seed] for name in names]))
                for seed in sorted({seed for _, seed in values})
                if all((name, seed) in values for name in names)
            }
        return found

    def _compared(self) -> list[Difference]:
        """Compare the levels of each factor, each with each or all with the baseline."""
        found, test, baseline = [], self._of_each_run("test/acc"), self.question.baseline
        for factor in self.factors:
            levels, tested = self._by_level(factor, self.values), self._by_level(factor, test)
            for one, other in itertools.combinations(levels, 2):
                gains, on_test = (
                    {s: of[other][s] - of[one][s] for s in of[one] if s in of[other]}
                    for of in (levels, tested)
                )
                difference = Difference(factor, one, other, gains, list(on_test.values()))
                if len(gains) > 1 and baseline in (None, one, other):
                    found.append(difference.against(baseline or one))
        if found:
            seeds = sorted({seed for d in found for seed in d.gains})
            table = np.array([[d.gains.get(seed, math.nan) for d in found] for seed in seeds])
            for difference, p in zip(found, corrected_p(table), strict=True):
                difference.p = float(p)
        return found

    def _best(self, factor: str) -> str | None:
        """Return the level that no other beats in the seeds of both. A level that has lost more
        runs than others can't be the best, as it did not lose them by chance."""
        levels = self._by_level(factor, self.values)
        able = [level for level in levels if len(levels[level]) == max(map(len, levels.values()))]
        ours = [d for d in self.differences if d.factor == factor and {d.one, d.other} <= set(able)]
        losers = {d.other if self.sign * d.mean.value < 0 else d.one for d in ours}
        best = [level for level in able if level not in losers or not ours]
        return best[0] if best and ours else None

    def verdict(self, difference: Difference) -> str:
        """Say whether the other level is significantly better or worse."""
        if difference.p >= ALPHA:
            return "no"
        return "better" if self.sign * difference.mean.value > 0 else "worse"

    def conclusion(self) -> list[str]:
        """Say what the runs show: a line for each factor, then what else to mind."""
        lines = [] if self.factors else ["There is one setting only, so nothing to compare."]
        for factor in self.factors:
            level = self.question.baseline or self._best(factor)
            ours = [d for d in self.differences if d.factor == factor]
            line = f"compared with {level}" if self.question.baseline else f"best: {level}"
            if level is None or not ours:
                line, ours = "too few runs to compare", []
            elif not self.question.baseline:
                values = self._by_level(factor, self.values)[level]
                line += f" ({self._number(Mean(float(np.mean(list(values.values())))))})"
            groups = {"better": "significantly better", "worse": "significantly worse",
                      "no": "no significant difference"}  # fmt: skip
            against = [d.against(level) for d in ours if level in (d.one, d.other)]
            for verdict, words in groups.items():
                which = [f"{d.other} ({self._number(d.mean, '+')})" for d in against
                         if self.verdict(d) == verdict]  # fmt: skip
                line += f"; {words}: {', '.join(which)}" if which else ""
            lines.append(f"{factor}: {line}." if factor else f"{line[:1].upper()}{line[1:]}.")
            if size := self._detectable(ours):
                lines.append(size)
        pairs = max((len(d.gains) for d in self.differences), default=0)
        if pairs and smallest_p(pairs) >= ALPHA:
            enough = next(n for n in itertools.count() if smallest_p(n) < ALPHA)
            lines.append(
                f"{pairs} seeds can't show a significant difference: the smallest p that they can "
                f"reach is {smallest_p(pairs):.2g}; it takes {enough} seeds."
            )
        if len({len(run.rows) for run in self.runs if not run.record["ended"]}) > 1:
            lines.append(
                "Some runs have more epochs, of which the best is higher by chance too: their "
                "test/acc tells more."
            )
        if self.question.search:
            lines.append(
                f"The best of {len(self.settings)} settings looks better by {self.choose} than it "
                "is: new seeds would tell."
            )
            return lines
        return lines + [f"{name}: {why}." for name in self.settings if (why := self.ended(name))]

    def _detectable(self, ours: list[Difference]) -> str:
        """Say which difference of a factor's levels such a study finds with a power of 80 %, by the
        spread of the paired differences; nothing if it can find none."""
        others = [d for d in self.differences if d not in ours]
        names = [(d.factor, level) for d in ours + others for level in (d.one, d.other)]
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        pairs = [(number[d.factor, d.one], number[d.factor, d.other]) for d in ours + others]
        size = detectable(min((len(d.gains) for d in ours), default=0), pairs)
        if math.isnan(size):
            return ""
        spread = np.sqrt(np.mean([np.var(list(d.gains.values()), ddof=1) for d in ours]))
        text = f"{100 * size * spread:.1f} points" if self.is_percent else f"{size * spread:.3f}"
        return f"Of five studies like this one, four would find a true difference of {text}."

    def _number(self, mean: Mean, sign: str = "") -> str:
        if not self.is_percent:
            return mean.text(f"{sign}.4f")
        return mean.text(f"{sign}.2f", 100) + ("" if sign else " %")

    # --------------------------------------------------------------------------------- tables

    def columns(self) -> Columns:
        """Return the table of settings."""
        order = self.ranked()
        runs = {setting: self.whole(setting) for setting in order}

        def means(value: Callable[[Run], float | None], format_: str, scale: int = 1) -> list[str]:
            values = [[value(run) for run in runs[setting]] for setting in order]
            return [Mean.of([v for v in of if v is not None]).text(format_, scale) for of in values]

        table = {f or "setting": [self.settings[setting][f] for setting in order]
                 for f in next(iter(self.settings.values()))}  # fmt: skip
        table["runs"] = [_joined(str(len(runs[s])), self.ended(s)) for s in order]
        if not self.is_percent:
            table[self.choose] = means(lambda run: run.best.get(self.choose), ".4f")
        for key in ("val/acc", "test/acc"):
            table[f"{key}, %"] = means(lambda run, key=key: run.best.get(key), ".2f", 100)  # type: ignore[misc]
        table["best epoch"] = means(lambda run: run.best["epoch"], ".1f")
        table["lowest val/loss at epoch"] = means(
            lambda run: (best_of(run.record, "val/loss") or {}).get("epoch"), ".1f"
        )
        table["seconds"] = means(lambda run: run.seconds, ".0f")
        return table

    def compared_columns(self) -> Columns:
        """Return the table of comparisons; of very many those that come closest."""
        shown = self.differences
        if len(shown) > SHOWN:
            shown = sorted(shown, key=lambda d: d.p)[:SHOWN]
        unit = ", points" if self.is_percent else ""
        return {
            "compared": [_joined(f"{d.other} - {d.one}", d.factor) for d in shown],
            "n": [str(len(d.gains)) for d in shown],
            f"difference in {self.choose}{unit}": [self._number(d.mean, "+") for d in shown],
            "in test/acc, points": [Mean.of(d.tested).text("+.2f", 100) for d in shown],
            "p": [f"{d.p:.3f}" for d in shown],
            "significant": [self.verdict(d) for d in shown],
        }

    def _every_run(self) -> Columns:
        codes = list(dict.fromkeys(run.code for run in self.runs))
        table = {
            "setting": [run.setting for run in self.runs],
            "seed": [str(run.record["seed"]) for run in self.runs],
        }
        for key in ("val/acc", "test/acc"):
            cells = [f"{100 * r.best[key]:.2f}" if key in r.best else "-" for r in self.runs]
            table[f"{key}, %"] = cells
        table["best epoch"] = [f"{r.best['epoch']:.0f}" if r.best else "-" for r in self.runs]
        table["seconds"] = [f"{run.seconds:.0f}" for run in self.runs]
        if len(codes) > 1:
            table["code"] = [str(codes.index(run.code) + 1) for run in self.runs]
        return table | {"": [run.record["ended"] for run in self.runs]}

    def _what_was_run(self) -> str:
        """Say what is not in the tables: recipe, flags, limits, split, machines, code."""
        question, settings = self.question, self.runs[0].record["settings"]
        files = ", ".join(f"`{file}`" for file in question.files())
        fixed = [f"`{key}` {json.dumps(value)}" for key, value in question.fixed.items()]
        given, defaults = settings["trainer"], inspect.signature(Trainer.__init__).parameters
        fixed += [f"{k} {given[k]}" for k in LIMITS if given[k] != defaults[k].default]
        text = f"Recipe: {', '.join([files, *fixed])}. "
        split = f"One split (`data.split_seed` {settings['data']['split_seed']})"
        text += "Each seed has its own split" if "split" in question.vary else split
        text += f", {settings['data']['val_size']:,} images for validation. "
        machines = Counter(r.record["machine"] for r in self.runs if r.record["machine"])
        text += "; ".join(f"{count} runs on {name}" for name, count in sorted(machines.items()))
        codes = {run.code: run.record for run in reversed(self.runs)}
        for i, (digest, record) in enumerate(reversed(codes.items()), 1):
            packages = ", ".join(f"{name} {v}" for name, v in record["versions"].items())
            text += f". Code {f'{i}: ' * (len(codes) > 1)}{digest}, {packages}"
        parts = [record["code"] | record["versions"] for record in codes.values()]
        names = sorted({name for part in parts for name in part})
        other = [name for name in names if len({part.get(name) for part in parts}) > 1]
        differ = f" **Not all runs are by the same code**: it differs in {', '.join(other)}."
        return f"{text}.{differ if other else ''}"

    def markdown(self) -> str:
        """Return the whole answer."""
        first, *others = self.conclusion()
        count, is_grid = len(self.differences), len(self.factors) > 1
        parts = [
            f"# {self.question.question}",
            f"```\n{self.command}\n```",
            "\n\n".join([f"**{first}**", *others]),
            _markdown(self.columns()),
            "± is half the 95 % interval of the mean over seeds (Student's t). The best epoch is "
            f"that of the best {self.choose}; the test set was evaluated there, and chose nothing. "
            "Epochs count from 0. A run that diverged, was pruned or had no validation is in no "
            "mean.",
        ]
        if count:
            parts += [
                _markdown(self.compared_columns()),
                f"Paired over n seeds. p by all flips of the signs of these differences, corrected "
                f"for {count} comparison{'s' * (count > 1)} by their maximum; significant means p "
                f"< {ALPHA}. The intervals are not corrected."
                + " A factor's levels are compared over all levels of the others."
                * is_grid,
            ]
        parts += [
            self._what_was_run(),
            "![Each run, mean and interval of each setting](summary.png)",
            "![Curves, mean and range over seeds](curves.png)",
            "## Every run",
            _markdown(self._every_run()),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, console: Console) -> None:
        """Print the answer; write it to a folder: `answer.md`, `runs.jsonl`, two figures."""
        from reports.figures import png  # Matplotlib is slow to import
        from studies.figures import curves, summary

        lines = [json.dumps({"setting": run.setting, **run.record}) + "\n" for run in self.runs]
        write_whole(folder / "runs.jsonl", "".join(lines).encode())
        write_whole(folder / "summary.png", png(summary(self), 110))
        write_whole(folder / "curves.png", png(curves(self), 110))
        write_whole(folder / "answer.md", self.markdown().encode())
        console.print(f"\n{self.question.question}", style="bold", markup=False)
        console.print(_table(self.columns()))
        if self.differences:
            console.print(_table(self.compared_columns()))
        console.print(*self.conclusion(), sep="\n", markup=False)
        console.print(
            f"\nanswer  {folder / 'answer.md'}\nview    tensorboard --logdir {folder}", markup=False
        )


def _joined(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _table(columns: Columns) -> Table:
    """Return a table for the terminal."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for number, header in enumerate(columns):
        table.add_column(header, justify="right" if number else "left", no_wrap=not number)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


def _markdown(columns: Columns) -> str:
    """Return a table in Markdown."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
