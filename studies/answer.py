"""What the runs of a study say: a table with intervals, comparisons, a sentence, two figures."""

import csv
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from reports.figures import COLORS, QUANTITIES
from runs import Row, write_whole

ALPHA = 0.05  # a difference is significant if its corrected p is below
PAIRS = 3  # fewer do not show how much seeds differ
ENDINGS = ("diverged", "pruned", "without a validation")  # of runs that are in no mean
SHOWN = 20  # settings in a figure, comparisons in a table; of more only the best


@dataclass
class Outcome:
    """A finished run.

    Args:
        setting: The name of its setting.
        seed: Its seed.
        rows: Its epochs, as in `metrics.csv`.
        ended: Why it ended before its last epoch, or diverged, if it did.
        machine: Where it ran, or which study it was taken from.

    """

    setting: str
    seed: int
    rows: list[Row]
    ended: str = ""
    machine: str = ""

    def best(self, choose: str) -> Row | None:
        """Return the first epoch that is best by `val/acc` or `val/loss`."""
        rows = [row for row in self.rows if math.isfinite(row.get(choose, math.nan))]
        sign = -1 if choose.endswith("acc") else 1
        return min(rows, key=lambda row: sign * row[choose], default=None)

    def diverged(self) -> str:
        """Say that the run diverged, if it did: its last training loss is NaN, or above that
        of guessing, which is log 10."""
        if not self.rows:
            return ""
        loss, epoch = self.rows[-1].get("train/loss", 0.0), self.rows[-1]["epoch"]
        if loss < 1.05 * math.log(10):
            return ""
        return f"diverged: train/loss {loss:.3g} in epoch {epoch:.0f}"

    def seconds(self) -> float:
        """Return how long its epochs took."""
        return sum(row["seconds"] for row in self.rows)


@dataclass
class Mean:
    """A mean over seeds with its 95 % interval by Student's t, which one seed does not have."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        """Return the mean of values, NaN if there are none."""
        if len(values) < 2:
            return cls(*values) if values else cls(math.nan)
        return cls(float(np.mean(values)), *map(float, DescrStatsW(values).tconfint_mean()))

    def text(self, format_: str, percent: bool = False) -> str:
        """Return `mean ± half the interval`."""
        if math.isnan(self.value):
            return "-"
        scale = 100 if percent else 1
        text = format(scale * self.value, format_)
        if not math.isnan(self.low):
            half = format(scale * (self.high - self.low) / 2, format_.removeprefix("+"))
            text += f" ± {half}"
        return text


@dataclass
class Difference:
    """A comparison of two levels of a factor, over the seeds that both have."""

    factor: str
    one: str
    other: str
    pairs: int
    mean: Mean
    test: Mean  # of test/acc in the same epochs
    p: float  # corrected for the number of comparisons, once all are known

    @property
    def is_significant(self) -> bool:
        """Whether it is significant."""
        return self.p < ALPHA


@dataclass
class Answer:
    """The answer to a question.

    Args:
        question: In words.
        command: The command that was given.
        choose: `val/acc` or `val/loss`: what names the best epoch and the best setting.
        settings: For each setting by name the level of each factor, by name.
        outcomes: The finished runs.
        baseline: Compare with this setting only.
        is_search: Whether a search picked the settings.

    """

    question: str
    command: str
    choose: str
    settings: dict[str, dict[str, str]]
    outcomes: list[Outcome]
    baseline: str | None = None
    is_search: bool = False
    differences: list[Difference] = field(init=False)

    def __post_init__(self) -> None:
        self.is_percent = self.choose.endswith("acc")
        self.sign = 1 if self.is_percent else -1  # of better
        self.values = self._of_each_run(self.choose)
        self.differences = self._compared()

    def _of_each_run(self, key: str) -> dict[tuple[str, int], float]:
        """Return a metric of the best epoch for each setting and seed that have a whole run."""
        return {
            (run.setting, run.seed): best[key]
            for run in self.outcomes
            if not run.ended and (best := run.best(self.choose)) and key in best
        }

    def whole(self, setting: str) -> list[Outcome]:
        """Return the runs of a setting that are in its mean."""
        return [run for run in self.outcomes if run.setting == setting and not run.ended]

    # ------------------------------------------------------------------------------ statistics

    def by_level(
        self, factor: str, values: dict[tuple[str, int], float]
    ) -> dict[str, dict[int, float]]:
        """Return for each level of a factor the values by seed, as means over the levels of the
        other factors; a seed that lacks one of these settings does not count."""
        seeds = sorted({run.seed for run in self.outcomes})
        found: dict[str, dict[int, float]] = {}
        for level in dict.fromkeys(levels[factor] for levels in self.settings.values()):
            names = [name for name, levels in self.settings.items() if levels[factor] == level]
            found[level] = {
                seed: float(np.mean([values[name, seed] for name in names]))
                for seed in seeds
                if all((name, seed) in values for name in names)
            }
        return found

    def factors(self) -> list[str]:
        """Return the factors that have more than one level."""
        names = dict.fromkeys(factor for levels in self.settings.values() for factor in levels)
        return [f for f in names if len({levels[f] for levels in self.settings.values()}) > 1]

    def _compared(self) -> list[Difference]:
        """Compare the levels of each factor by paired t-tests, corrected together after Holm."""
        found = []
        test = self._of_each_run("test/acc")
        for factor in self.factors():
            levels, tested = self.by_level(factor, self.values), self.by_level(factor, test)
            for one, other in itertools.combinations(levels, 2):
                if self.baseline is not None and self.baseline not in (one, other):
                    continue
                if other == self.baseline:
                    one, other = other, one
                seeds = [seed for seed in levels[one] if seed in levels[other]]
                if len(seeds) < PAIRS:
                    continue
                pairs = [(levels[other][seed], levels[one][seed]) for seed in seeds]
                gains = [a - b for a, b in pairs]
                both = tested[one].keys() & tested[other].keys()
                on_test = Mean.of([tested[other][seed] - tested[one][seed] for seed in both])
                # Pairs that all differ by the same do not show how much chance does.
                varies = max(gains) - min(gains) > 1e-9
                p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if varies else 1.0
                found.append(Difference(factor, one, other, len(seeds), Mean.of(gains), on_test, p))
        if found:
            corrected = multipletests([one.p for one in found], method="holm")[1]
            for difference, p in zip(found, corrected, strict=True):
                difference.p = float(p)
        return found

    def conclusion(self) -> str:
        """Say in one sentence what the data decide."""
        clauses = [clause for factor in self.factors() if (clause := self._decided(factor))]
        if not clauses:
            clauses = [f"too few runs to compare: it takes {PAIRS} seeds of two settings"]
        if self.epochs_differ():
            clauses.append(
                "some have more epochs, of which the best is higher by chance too: their test/acc "
                "tells more"
            )
        if self.is_search:
            clauses.append(
                f"the best of {len(self.settings)} settings looks better by {self.choose} than it "
                "is: new seeds would tell"
            )
        else:
            for word in ENDINGS:
                for setting in self.settings:
                    runs = [run.ended for run in self.outcomes if run.setting == setting]
                    if count := sum(ended.startswith(word) for ended in runs):
                        verb = word if word == "diverged" else f"was {word}"
                        clauses.append(
                            f"the setting {setting} {verb} in {count} of {len(runs)} runs"
                        )
        text = "; ".join(clauses)
        return f"{text[:1].upper()}{text[1:]}."

    def epochs_differ(self) -> bool:
        """Whether whole runs differ in how many epochs they have."""
        return len({len(run.rows) for run in self.outcomes if not run.ended}) > 1

    def _decided(self, factor: str) -> str:
        ours = [one for one in self.differences if one.factor == factor]
        if not ours:
            return ""
        if self.baseline is not None:
            return self._decided_against_baseline(ours)
        levels = self.by_level(factor, self.values)
        most = max(map(len, levels.values()))  # others have lost runs, and not by chance
        means = {k: float(np.mean(list(v.values()))) for k, v in levels.items() if len(v) == most}
        best = max(means, key=lambda level: self.sign * means[level])
        against = {
            (one.other if one.one == best else one.one): one
            for one in ours
            if best in (one.one, one.other) and {one.one, one.other} <= set(means)
        }
        worse = [level for level, one in against.items() if one.is_significant]
        open_ = [level for level, one in against.items() if not one.is_significant]
        lead = f"for {factor}, " if factor else ""
        leader = f"{best} has the best mean {self.choose}, {self._value(Mean(means[best]))}"
        if len(means) > 1 and max(means.values()) - min(means.values()) < 1e-9:
            return f"{lead}all have the same mean {self.choose}, {self._value(Mean(means[best]))}"
        lost = [level for level in levels if level not in means]
        fewer = f" ({_listed(lost)} left out: too few whole runs)" if lost else ""
        if not worse:
            least = min(one.p for one in ours)
            rest = "no difference is" if least >= ALPHA else "its lead over none of the others is"
            return (
                f"{lead}the data do not decide: {leader}, but {rest} significant"
                f"{f' (smallest p {least:.2f})' if least >= ALPHA else ''}" + fewer
            )
        text = f"{lead or 'the setting '}{leader}, significantly better than {_listed(worse)}"
        text += f"; between it and {_listed(open_)} the data do not decide" if open_ else ""
        return text + fewer

    def _decided_against_baseline(self, ours: list[Difference]) -> str:
        groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for one in ours:
            if one.pairs < max(other.pairs for other in ours):
                continue
            gain = self.sign * one.mean.value
            kind = ("better" if gain > 0 else "worse") if one.is_significant else "undecided"
            groups[kind].append(f"{one.other} ({self._gain(one.mean)})")
        texts = [
            f"significantly {kind} than {self.baseline}: {_listed(groups[kind])}"
            for kind in ("better", "worse")
            if groups[kind]
        ]
        if groups["undecided"]:
            texts.append(f"the data do not decide about {_listed(groups['undecided'])}")
        most = max(one.pairs for one in ours)
        compared = {one.other for one in ours if one.pairs == most}
        if lost := [level for level in self.settings if level not in {*compared, self.baseline}]:
            texts.append(f"{_listed(lost)} left out: too few whole runs")
        return "; ".join(texts)

    def _value(self, mean: Mean) -> str:
        return f"{mean.text('.2f', True)} %" if self.is_percent else mean.text(".4f")

    def _gain(self, mean: Mean) -> str:
        return mean.text("+.2f", True) if self.is_percent else mean.text("+.4f")

    # --------------------------------------------------------------------------------- tables

    def by_setting(self) -> list[dict[str, Any]]:
        """Return a row for each setting: means over its seeds, and what went wrong."""
        found = []
        for setting in self.ranked():
            runs = self.whole(setting)
            best = [row for run in runs if (row := run.best(self.choose))]
            turns = [row for run in runs if (row := run.best("val/loss"))]
            ended = [run.ended for run in self.outcomes if run.setting == setting and run.ended]
            found.append(
                {
                    "setting": setting,
                    "seeds": len(runs),
                    **{
                        key: Mean.of([row[key] for row in best if key in row])
                        for key in ("val/acc", "val/loss", "test/acc", "epoch")
                    },
                    "turn": Mean.of([row["epoch"] for row in turns]),
                    "seconds": Mean.of([run.seconds() for run in runs]),
                    "ended": ", ".join(
                        f"{sum(e.startswith(word) for e in ended)} {word}"
                        for word in ENDINGS
                        if any(e.startswith(word) for e in ended)
                    ),
                }
            )
        return found

    def ranked(self) -> list[str]:
        """Return the settings in the order of the question; if they are very many or picked by a
        search, those with most whole runs first, of these the best."""
        if len(self.settings) <= SHOWN and not self.is_search:
            return list(self.settings)

        def rank(setting: str) -> tuple[int, float]:
            values = [v for (name, _), v in self.values.items() if name == setting]
            return len(values), self.sign * float(np.mean(values)) if values else 0.0

        return sorted(self.settings, key=rank, reverse=True)

    def columns(self) -> list[tuple[str, list[str]]]:
        """Return the table of settings as columns: header and cells."""
        rows = self.by_setting()
        chosen = [("val/acc, %", "val/acc", ".2f", True)]
        if not self.is_percent:
            chosen.insert(0, (self.choose, self.choose, ".4f", False))
        chosen += [
            ("test/acc, %", "test/acc", ".2f", True),
            ("best epoch", "epoch", ".1f", False),
            ("lowest val/loss at epoch", "turn", ".1f", False),
            ("seconds", "seconds", ".0f", False),
        ]
        table = [
            (factor or "setting", [self.settings[row["setting"]][factor] for row in rows])
            for factor in next(iter(self.settings.values()))
        ]
        table += [("runs", [_joined(str(row["seeds"]), row["ended"]) for row in rows])]
        return table + [
            (header, [row[key].text(form, percent) for row in rows])
            for header, key, form, percent in chosen
        ]

    def compared_columns(self) -> list[tuple[str, list[str]]]:
        """Return the table of comparisons as columns; of very many those that come closest."""
        shown = self.differences
        if len(shown) > SHOWN:
            shown = sorted(shown, key=lambda one: one.p)[:SHOWN]
        unit = ", points" if self.is_percent else ""
        return [
            ("compared", [_joined(f"{d.other} - {d.one}", d.factor) for d in shown]),
            ("pairs", [str(d.pairs) for d in shown]),
            (f"difference in {self.choose}{unit}", [self._gain(d.mean) for d in shown]),
            ("in test/acc, points", [d.test.text("+.2f", True) for d in shown]),
            ("corrected p", [f"{d.p:.3f}" for d in shown]),
            ("significant", ["yes" if d.is_significant else "no" for d in shown]),
        ]

    def csv(self) -> str:
        """Return the table of settings, accuracies as fractions, intervals as two columns."""
        text = io.StringIO()
        rows = []
        for row in self.by_setting():
            flat: dict[str, Any] = {}
            for key, value in row.items():
                if isinstance(value, Mean):
                    ends = {"": value.value, "_low": value.low, "_high": value.high}
                    flat |= {key + end: _rounded(number) for end, number in ends.items()}
                else:
                    flat[key] = value
            rows.append(flat)
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def markdown(self) -> str:
        """Return the whole answer."""
        by_setting = sorted(self.outcomes, key=lambda run: (run.setting, run.seed))
        runs = [
            (
                run.setting,
                str(run.seed),
                *(
                    f"{100 * best[key]:.2f}" if key in best else "-"
                    for key in ("val/acc", "test/acc")
                ),
                f"{best['epoch']:.0f}" if best else "-",
                f"{run.seconds():.0f}",
                run.ended,
            )
            for run, best in ((run, run.best(self.choose) or {}) for run in by_setting)
        ]
        headers = ("setting", "seed", "val/acc, %", "test/acc, %", "best epoch", "seconds", "")
        every = [(h, list(c)) for h, c in zip(headers, zip(*runs, strict=True), strict=True)]
        machines = Counter(run.machine for run in self.outcomes if run.machine)
        where = "; ".join(
            f"{count} {'' if machine.startswith('taken') else 'on '}{machine}"
            for machine, count in sorted(machines.items())
        )
        parts = [
            f"# {self.question}",
            f"```\n{self.command}\n```",
            f"**{self.conclusion()}**",
            _markdown(self.columns()),
            f"± is half the 95 % interval of the mean over seeds (Student's t). The best epoch is "
            f"that of the best {self.choose}; the test set was evaluated there, and chose nothing. "
            "Epochs count from 0."
            + (
                " A run that did not end well is in no mean."
                if any(run[-1] for run in runs)
                else ""
            ),
        ]
        if self.differences:
            parts += [
                _markdown(self.compared_columns()),
                f"Paired over seeds, t-test; p corrected for {len(self.differences)} "
                f"comparison{'s' * (len(self.differences) > 1)} after Holm; significant "
                f"means p < {ALPHA}. The intervals are not corrected."
                + (" A factor's levels are compared over all of the other's."
                   if len(self.factors()) > 1 else ""),
            ]  # fmt: skip
        parts += [
            "![Each run, mean and interval of each setting](summary.png)",
            "![Curves, mean and range over seeds](curves.png)",
            "## Every run",
            _markdown(every),
            f"Runs: {where}." if where else "",
        ]
        return "\n\n".join(parts) + "\n"

    # --------------------------------------------------------------------------------- figures

    def _title(self, setting: str) -> str:
        """Return the name of a setting on as many lines as it has factors."""
        levels = self.settings[setting].items()
        return "\n".join(f"{factor} {level}".strip() for factor, level in levels)

    def summary_figure(self) -> Figure:
        """Draw every run, and mean and interval of each setting."""
        rows = self.by_setting()[:SHOWN]
        figure = Figure(figsize=(8, 1.6 + 0.45 * len(rows)), layout="constrained")
        axes = figure.subplots()
        scale = 100 if self.is_percent else 1
        shift = {"val": 0.12, "test": -0.12}
        for stage in ("val", "test"):
            key = self.choose.replace("val", stage)
            for y, row in enumerate(rows):
                values = [
                    scale * best[key]
                    for run in self.whole(row["setting"])
                    if (best := run.best(self.choose)) and key in best
                ]
                mean = Mean.of(values)
                ys = [y - shift[stage]] * len(values)
                axes.plot(values, ys, "o", color=COLORS[stage], alpha=0.35, markersize=5)
                use = "(chooses)" if stage == "val" else "(not used)"
                axes.errorbar(
                    mean.value,
                    y - shift[stage],
                    xerr=None if math.isnan(mean.low) else (mean.high - mean.low) / 2,
                    fmt="D",
                    color=COLORS[stage],
                    capsize=4,
                    label=None if y else f"{stage} {use}",
                )
        labels = [_joined(self._title(row["setting"]), row["ended"]) for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        quantity = "accuracy, %" if self.is_percent else "loss"
        axes.set_xlabel(
            f"{quantity}, at the epoch of the best {self.choose}: runs, mean, 95 % interval"
        )
        axes.grid(axis="x", alpha=0.3)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 1.0 + 0.55 / figure.get_figheight()),
            ncols=2,
            frameon=False,
        )
        return figure

    def curves_figure(self) -> Figure:
        """Draw loss and accuracy over epochs, one panel for each setting: mean and range."""
        settings = self.ranked()[:SHOWN]
        columns = len(settings) if len(settings) <= 4 else 3
        blocks = math.ceil(len(settings) / columns)
        figure = Figure(figsize=(3.6 * columns + 0.6, 5.2 * blocks + 0.5), layout="constrained")
        grid = figure.subplots(2 * blocks, columns, squeeze=False)
        for index, lower in itertools.product(range(blocks * columns), range(2)):
            axes = grid[2 * (index // columns) + lower, index % columns]
            if index >= len(settings):
                axes.set_axis_off()
                continue
            quantity, word = list(QUANTITIES.items())[lower]
            self._draw(axes, settings[index], quantity)
            axes.set(
                title="" if lower else self._title(settings[index]), ylabel=word, xlabel="epoch"
            )
        for first in range(2):
            drawn = [a for a in grid[first::2].flat if a.lines]
            limits = [a.get_ylim() for a in drawn]
            for axes in drawn:  # the same scale everywhere
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        drawn = [axes for axes in grid.flat if axes.lines]
        if drawn:
            figure.legend(
                *drawn[0].get_legend_handles_labels(), loc="outside upper center", ncols=3
            )
        return figure

    def _draw(self, axes: Axes, setting: str, quantity: str) -> None:
        """Draw the curves of one setting."""
        runs = self.whole(setting)
        if not runs:
            axes.text(0.5, 0.5, "no whole run", ha="center", transform=axes.transAxes)
        for stage, color in COLORS.items():
            key = f"{stage}/{quantity}"
            values: dict[float, list[float]] = {}
            for row in itertools.chain.from_iterable(run.rows for run in runs):
                if key in row:
                    values.setdefault(row["epoch"], []).append(row[key])
            if values:
                label, style = (f"{stage} (not used)", "--") if stage == "test" else (stage, "-")
                epochs = sorted(values)
                axes.plot(
                    epochs, [np.mean(values[e]) for e in epochs], style, color=color, label=label
                )
                ends = [min(values[e]) for e in epochs], [max(values[e]) for e in epochs]
                axes.fill_between(epochs, *ends, color=color, alpha=0.2, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)

    # ---------------------------------------------------------------------------------- leaving

    def write(self, folder: Path, console: Console) -> None:
        """Print the answer; write `answer.md`, `answer.csv`, `summary.png` and `curves.png`."""
        for name, figure in (("summary", self.summary_figure()), ("curves", self.curves_figure())):
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=110)
            write_whole(folder / f"{name}.png", png.getvalue())
        write_whole(folder / "answer.csv", self.csv().encode())
        write_whole(folder / "answer.md", self.markdown().encode())
        console.print(f"\n{self.question}", style="bold", markup=False)
        console.print(_table(self.columns()))
        if self.differences:
            console.print(_table(self.compared_columns()))
        console.print(self.conclusion(), markup=False)
        console.print(
            f"\nanswer  {folder / 'answer.md'}\nview    tensorboard --logdir {folder}", markup=False
        )


def _joined(text: str, note: str) -> str:
    return f"{text} ({note})" if note else text


def _rounded(number: float) -> float | str:
    return "" if math.isnan(number) else round(number, 6)


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _table(columns: list[tuple[str, list[str]]]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=box.SIMPLE, header_style="bold", pad_edge=False)
    for number, (header, _) in enumerate(columns):
        table.add_column(header, justify="right" if number else "left", no_wrap=not number)
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _markdown(columns: list[tuple[str, list[str]]]) -> str:
    """Return a table in Markdown."""
    rows = [[header for header, _ in columns], ["---"] * len(columns)]
    rows += [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
