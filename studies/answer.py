"""The answer of a study: a verdict, a table with intervals, comparisons."""

import hashlib
import inspect
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from numpy.typing import ArrayLike
from rich.console import Console
from rich.markdown import Markdown
from scipy import stats

from reports.card import LIMITS
from runs import write_whole
from studies.question import Question
from studies.record import Record, best_of, rows_of
from studies.statistics import ALPHA, Floats, corrected_p, detectable, smallest_p

ENDINGS = ("diverged", "pruned", "without a validation")  # of runs excluded from the means
SHOWN = 20  # most comparisons in a table and settings in a figure; keeps the best
VERDICTS = {
    "better": "significantly better", "worse": "significantly worse",
    "no": "no significant difference",
}  # fmt: skip

Columns = dict[str, list[str]]  # a table: cells by header


@dataclass
class Mean:
    """A mean over seeds, half its 95 % interval (Student's t; NaN for one seed), and the count."""

    value: float
    half: float = math.nan
    count: int = 1

    @classmethod
    def of(cls, values: ArrayLike) -> "Mean":
        """Return the mean of the values that are not NaN, or NaN if there are none."""
        array = np.asarray(values, dtype=float)
        known, half = array[~np.isnan(array)], math.nan
        if len(known) > 1:
            half = float(stats.sem(known) * stats.t.ppf(0.975, len(known) - 1))
        return cls(float(known.mean()) if len(known) else math.nan, half, len(known))

    def text(self, format_: str, scale: int = 1) -> str:
        """Return `mean ± half the interval`."""
        if math.isnan(self.value):
            return "-"
        half = "" if math.isnan(self.half) else f" ± {scale * self.half:{format_.lstrip('+')}}"
        rounded = float(f"{scale * self.value:{format_}}") + 0.0  # turns -0.0 into 0.0
        return f"{rounded:{format_}}{half}"


class Run:
    """A finished run: its setting's name, record, epochs, a hash of its code, and its numbers.

    `code` hashes the versions of its modules and packages in `modules`. `numbers` has the metrics
    of its best epoch, the epoch with the lowest val/loss, and its total seconds."""

    def __init__(self, setting: str, record: Record, choose: str, modules: set[str]) -> None:
        self.setting, self.record, self.rows = setting, record, rows_of(record)
        code = {k: v for k, v in (record["code"] | record["versions"]).items() if k in modules}
        text = json.dumps(code, sort_keys=True)
        self.code = hashlib.sha256(text.encode()).hexdigest()[:8]
        packages = map(" ".join, record["versions"].items())
        self.made_by = ", ".join([record["machine"] or "-", f"code {self.code}", *packages])
        lowest = best_of(record, "val/loss") or {"epoch": math.nan}
        self.numbers = {**(best_of(record, choose) or {}), "lowest": lowest["epoch"]}
        self.numbers["seconds"] = sum(row["seconds"] for row in self.rows)


@dataclass
class Difference:
    """A comparison of two levels of a factor: `other` minus `one`, in the `choose` metric and in
    test/acc at the same epochs. Both are float64 [seeds], NaN where a seed lacks a run. `p` is
    corrected for all comparisons."""

    factor: str
    one: str
    other: str
    gains: Floats
    tested: Floats
    p: float = math.nan

    def against(self, level: str) -> "Difference":
        """Return the same comparison with `level` as `one`."""
        if level == self.one:
            return self
        return replace(self, one=level, other=self.one, gains=-self.gains, tested=-self.tested)

    @property
    def mean(self) -> Mean:
        """The mean over the seeds that have both levels."""
        return Mean.of(self.gains)


@dataclass
class Answer:
    """The answer to a question that a command asked. `settings` maps the name of a setting to its
    levels by factor, and `records` maps setting and seed to the finished run."""

    question: Question
    command: str
    settings: dict[str, dict[str, str]]
    records: dict[tuple[str, int], Record]

    def __post_init__(self) -> None:
        settings, records = self.settings, self.records
        self.choose = self.question.choose
        self.is_percent = self.choose.endswith("acc")
        self.sign = 1 if self.is_percent else -1  # of an improvement
        self.seeds = sorted({seed for _, seed in records})
        parts = [record["code"] | record["versions"] for record in records.values()]
        versions = {name: {p[name] for p in parts if name in p} for part in parts for name in part}
        self.other = sorted(name for name, values in versions.items() if len(values) > 1)
        # Excludes modules that only some settings import, such as a custom network.
        modules = {*self.other, *(name for name in versions if all(name in p for p in parts))}
        self.runs = [Run(name, r, self.choose, modules) for (name, _), r in records.items()]
        self.whole = {name: [run for run in self.runs if run.setting == name
                             and not run.record["ended"]] for name in settings}  # fmt: skip
        self.names = list(next(iter(settings.values())))  # of factors
        self.factors = [f for f in self.names if len({s[f] for s in settings.values()}) > 1]
        self.differences = self._compared()

    def ended(self, setting: str) -> str:
        """Say how many runs of a setting are excluded from the means, and why; "" if none."""
        reasons = [run.record["ended"] for run in self.runs if run.setting == setting]
        counts = {word: sum(ended.startswith(word) for ended in reasons) for word in ENDINGS}
        return ", ".join(f"{count} {word}" for word, count in counts.items() if count)

    def ranked(self) -> list[str]:
        """Return the settings in the question's order. If there are more than `SHOWN`, or a search
        picked them, sort by the number of completed runs, then by the mean, best first."""
        if len(self.settings) <= SHOWN and not self.question.search:
            return list(self.settings)
        means = {name: Mean.of(self.values(name, self.choose)) for name in self.settings}
        ranks = {name: (mean.count, self.sign * mean.value) for name, mean in means.items()}
        return sorted(ranks, key=lambda name: ranks[name], reverse=True)

    def values(self, setting: str, key: str) -> Floats:
        """Return a number of a setting's completed runs, float64 [seeds]; NaN if missing."""
        by_seed = {r.record["seed"]: r.numbers.get(key, math.nan) for r in self.whole[setting]}
        return np.array([by_seed.get(seed, math.nan) for seed in self.seeds])

    def _by_level(self, factor: str, key: str) -> dict[str, Floats]:
        """Return a number for each level of a factor, float64 [seeds], averaged over the levels of
        the other factors; NaN for a seed that lacks one of these settings."""
        by_level: dict[str, list[Floats]] = {}
        for setting, levels in self.settings.items():
            by_level.setdefault(levels[factor], []).append(self.values(setting, key))
        return {level: np.mean(values, axis=0) for level, values in by_level.items()}

    def _compared(self) -> list[Difference]:
        """Compare the levels of each factor, in pairs or all with the baseline."""
        compared, baseline = [], self.question.baseline
        for factor in self.factors:
            chosen, test = self._by_level(factor, self.choose), self._by_level(factor, "test/acc")
            for one, other in itertools.combinations(chosen, 2):
                gains, tested = chosen[other] - chosen[one], test[other] - test[one]
                difference = Difference(factor, one, other, gains, tested)
                if difference.mean.count > 1 and baseline in (None, one, other):
                    compared.append(difference.against(baseline or one))
        if compared:
            all_p = corrected_p(np.stack([difference.gains for difference in compared], axis=1))
            compared = [replace(d, p=float(p)) for d, p in zip(compared, all_p, strict=True)]
        return compared

    def _best(self, factor: str) -> str:
        """Return the level that the fewest others beat on shared seeds; "" if none is compared. A
        level that lost more runs than another can't be the best, because runs aren't lost by
        chance; one whose runs are still to come can."""
        group = [d for d in self.differences if d.factor == factor]
        lost = Counter(self.settings[r.setting][factor] for r in self.runs if r.record["ended"])
        compared = dict.fromkeys(level for d in group for level in (d.one, d.other))
        fewest = min((lost[level] for level in compared), default=0)
        valid = [level for level in compared if lost[level] == fewest]
        gains = [(self.sign * d.mean.value, d) for d in group if {d.one, d.other} <= {*valid}]
        beaten = Counter(d.other if gain < 0 else d.one for gain, d in gains if gain)
        return min(valid, key=lambda level: beaten[level], default="")

    def verdict(self, difference: Difference) -> str:
        """Say whether the other level is significantly better or worse."""
        if difference.p >= ALPHA:
            return "no"
        return "better" if self.sign * difference.mean.value > 0 else "worse"

    def conclusion(self) -> list[str]:
        """Summarize the runs: a line for each factor, then caveats."""
        lines = [] if self.factors else ["There is one setting only, so nothing to compare."]
        for factor in self.factors:
            level = self.question.baseline or self._best(factor)
            group = [d for d in self.differences if d.factor == factor]
            against = [d.against(level) for d in group if level in (d.one, d.other)]
            line = f"Too few runs to compare {factor}".rstrip()
            if against:
                mean = Mean.of(self._by_level(factor, self.choose)[level]).value
                label = "Baseline" if self.question.baseline else f"Best {factor}".rstrip()
                line = f"{label}: {level} ({self._text(Mean(mean))})"
            for verdict, words in VERDICTS.items():
                matching = [d for d in against if self.verdict(d) == verdict]
                gains = [f"{d.other} ({self._text(d.mean, '+')})" for d in matching]
                line += f"; {words}: {', '.join(gains)}" if gains else ""
            lines.append(f"{line}.")
        pairs = max((d.mean.count for d in self.differences), default=0)
        enough = next(seeds for seeds in itertools.count() if smallest_p(seeds) < ALPHA)
        lengths = {len(run.rows) for runs in self.whole.values() for run in runs}
        remarks = {
            f"{pairs} seeds can't show a significant difference: the smallest p that they can "
            f"reach is {smallest_p(pairs):.3g}; it takes {enough} seeds.": 0 < pairs < enough,
            "Some runs have more epochs, of which the best is higher by chance too: their "
            "test/acc tells more.": len(lengths) > 1,
            f"The best of {len(self.settings)} settings looks better by {self.choose} than "
            "it is: ask again for the best few as variants, with other seeds.": bool(
                self.question.search
            ),
        }
        ended = {} if self.question.search else {name: self.ended(name) for name in self.settings}
        lines += [remark for remark, holds in remarks.items() if holds]
        return lines + [f"{name}: {why}." for name, why in ended.items() if why]

    def _detectable(self) -> dict[tuple[str, int], float]:
        """Return, by factor and number of pairs, the true difference that is found with a power of
        80 %, in standard deviations of a pair's difference."""
        ends = [((d.factor, d.one), (d.factor, d.other)) for d in self.differences]
        names = list(dict.fromkeys(itertools.chain(*ends)))
        pairs = [(names.index(one), names.index(other)) for one, other in ends]
        effects: dict[tuple[str, int], float] = {}
        for d, pair in zip(self.differences, pairs, strict=True):
            if (key := (d.factor, d.mean.count)) not in effects:
                effects[key] = detectable(key[1], [pair, *(p for p in pairs if p != pair)])
        return effects

    def _text(self, mean: Mean, sign: str = "") -> str:
        """Format a mean of the `choose` metric or, with `sign`, of differences in it."""
        if not self.is_percent:
            return mean.text(f"{sign}.4f")
        return mean.text(f"{sign}.2f", 100) + ("" if sign else " %")

    def columns(self) -> Columns:
        """Return the table of settings."""
        order = self.ranked()
        table = {f or "setting": [self.settings[s][f] for s in order] for f in self.names}
        table["runs"] = [_joined(str(len(self.whole[s])), self.ended(s)) for s in order]
        return table | self._numbers([self.whole[s] for s in order], ".1f")

    def _numbers(self, groups: list[list[Run]], epoch_format: str) -> Columns:
        """Return columns of means over groups of runs."""
        table = {self.choose: (self.choose, ".4f", 1)} if not self.is_percent else {}
        table |= {
            "val/acc, %": ("val/acc", ".2f", 100),
            "test/acc, %": ("test/acc", ".2f", 100),
            "best epoch": ("epoch", epoch_format, 1),
            "lowest val/loss at epoch": ("lowest", epoch_format, 1),
            "seconds": ("seconds", ".0f", 1),
        }
        return {
            header: [Mean.of([run.numbers.get(key, math.nan) for run in group]).text(format_, scale)
                     for group in groups]
            for header, (key, format_, scale) in table.items()
        }  # fmt: skip

    def compared_columns(self) -> Columns:
        """Return the table of comparisons; if more than `SHOWN`, those with the lowest p."""
        is_long = len(self.differences) > SHOWN
        shown = sorted(self.differences, key=lambda d: d.p if is_long else 0)[:SHOWN]
        stds, sizes = self._detectable(), list[Mean]()
        for d in shown:  # a dash with too few seeds or no spread
            size = stds[d.factor, d.mean.count] * float(np.nanstd(d.gains, ddof=1))
            sizes.append(Mean(size or math.nan))
        unit, format_, scale = (", points", ".1f", 100) if self.is_percent else ("", ".3f", 1)
        return {
            "compared": [_joined(f"{d.other} - {d.one}", d.factor) for d in shown],
            "n": [str(d.mean.count) for d in shown],
            f"difference in {self.choose}{unit}": [self._text(d.mean, "+") for d in shown],
            "in test/acc, points": [Mean.of(d.tested).text("+.2f", 100) for d in shown],
            "p": [f"{d.p:.3f}" for d in shown],
            "significant": [self.verdict(d) for d in shown],
            f"80 % power at{unit}": [size.text(format_, scale) for size in sizes],
        }

    def _every_run(self) -> Columns:
        table = {
            "setting": [run.setting for run in self.runs],
            "seed": [str(run.record["seed"]) for run in self.runs],
            **self._numbers([[run] for run in self.runs], ".0f"),
        }
        if len({run.code for run in self.runs}) > 1:
            table["code"] = [run.code for run in self.runs]
        return table | {"ended": [run.record["ended"] for run in self.runs]}

    def _what_was_run(self) -> str:
        """Describe what the tables lack: recipe, flags, limits, split, machines, code."""
        question, settings = self.question, self.runs[0].record["settings"]
        given, defaults = settings["trainer"], inspect.signature(Trainer.__init__).parameters
        recipe = [f"`{file}`" for file in question.files()]
        recipe += [f"`{key}` {json.dumps(value)}" for key, value in question.fixed.items()]
        all_flags = (question.fixed, question.grid, question.search, *question.variants.values())
        named = {flag for flags in all_flags for flag in flags}
        recipe += [
            f"{key} {given[key]}"
            for key in LIMITS
            if given[key] != defaults[key].default and f"trainer.{key}" not in named
        ]
        data = [run.record["settings"]["data"] for run in self.runs]
        sizes = sorted({d["val_size"] for d in data if not d.get("folds")})
        sizes += sorted({f"1/{d['folds']} of the training" for d in data if d.get("folds")})
        splits = {(d["split_seed"], d.get("fold", 0)) for d in data}
        split = "One split" if len(splits) == 1 else "Several splits"
        split = "Each seed has its own split" if "split" in question.vary else split
        text = f"Recipe: {', '.join(recipe)}. {split}, {' or '.join(map(str, sizes))} images for "
        made_by = Counter(run.made_by for run in self.runs)
        runs = [f"{count} on {machine_and_code}" for machine_and_code, count in made_by.items()]
        images = {name for run in self.runs for name in run.record["images"].values()}
        note = "" if images <= {"CIFAR-10"} else f" Images: {', '.join(sorted(images))}."
        text += f"validation.{note} Runs: {'; '.join(runs)}."
        if self.other:
            text += (
                f" **Not all runs are by the same code**: it differs in {', '.join(self.other)}."
            )
        return text

    def markdown(self) -> str:
        """Return the whole answer."""
        lines = self.conclusion()
        count, parts = len(self.differences), []
        if count:
            comparisons = "comparisons" if count > 1 else "comparison"
            note = (
                "Paired over n seeds. p by all flips of the signs of these differences, corrected "
                f"for {count} {comparisons} by their maximum; significant means p "
                f"< {ALPHA}. The intervals are not corrected. 80 % power at: the true difference "
                "that four of five such studies would find, by the spread of these pairs; a dash: "
                "none, with so few seeds or without a spread."
            )
            if len(self.factors) > 1:
                note += " A factor's levels are compared over all levels of the others."
            parts = [_markdown(self.compared_columns()), note]
        parts = [
            f"# {self.question.question}",
            f"```\n{self.command}\n```",
            *(f"**{line}**" for line in lines[: len(self.factors)]),
            *lines[len(self.factors) :],
            _markdown(self.columns()),
            "± is half the 95 % interval of the mean over seeds (Student's t). The best epoch is "
            f"that of the best {self.choose}; the test set was evaluated there, and not used to "
            "choose anything. Epochs count from 0. Runs that diverged, were pruned or had no "
            "validation are left out of the means.",
            *parts,
            self._what_was_run(),
            "![Each run, mean and interval of each setting](summary.png)",
            "![Curves, mean and range over seeds](curves.png)",
            "## Every run",
            _markdown(self._every_run()),
        ]
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Print the answer, and write it to a folder: `answer.md` and `runs.jsonl`."""
        lines = [json.dumps({**run.record, "setting": run.setting}) + "\n" for run in self.runs]
        write_whole(folder / "runs.jsonl", "".join(lines).encode())
        text = self.markdown()
        write_whole(folder / "answer.md", text.encode())
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(Markdown(text.partition("\n![")[0]))  # without figures and the table of runs
        print(f"\nanswer  {folder / 'answer.md'}")
        if any(folder.glob("*/version_*")):
            print(f"view    tensorboard --logdir {folder}")


def _joined(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _markdown(columns: Columns) -> str:
    """Return a table in Markdown."""
    line = ["---", *["---:"] * (len(columns) - 1)]  # numbers are right-aligned
    rows = [list(columns), line, *zip(*columns.values(), strict=True)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
