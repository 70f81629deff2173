"""A study's question, and checks that it can be run."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna import distributions
from optuna.samplers import BruteForceSampler, GridSampler

import train
from studies.record import Plan, without_places

Flags = dict[str, Any]

# The flags that a study sets itself, and what to use instead.
OURS = {
    "seed_everything": "seeds", "name": "--folder", "trainer.default_root_dir": "--folder",
    "ckpt_path": "another study", "config": "config", "checkpoint.monitor": "choose",
    "checkpoint.mode": "choose",
}  # fmt: skip


@dataclass
class Range:
    """A range to search, of integers if both ends are."""

    low: int | float
    high: int | float
    log: bool = False  # search on a log scale
    step: int | float | None = None  # search only `low`, `low` + `step`, ...


@dataclass
class Question:
    """A question, as in its YAML file. Flags are those of `train.py fit`, without dashes.

    Args:
        question: The question in words.
        config: The recipe, or a list of recipes; later ones override earlier ones.
        grid: Values for each flag; every combination is a setting.
        variants: Settings by name, each with its own flags.
        search: A range {low, high, log, step} or a list of choices for each flag; Optuna's sampler
            picks the settings.
        trials: How many settings to pick.
        seeds: Each setting runs once per seed.
        vary: `[seed]`: all runs share the recipe's split; `[seed, split]`: each seed has its own.
        choose: The metric that picks the best epoch and setting: `val/acc` or `val/loss`.
        fixed: Flags for all runs, which override the recipe.
        baseline: The variant to compare all others with, instead of comparing all pairs.
        sampler: Picks the settings of a search (default: TPE).
        pruner: Stops runs that do worse than others at the same epoch; in a search, only those of
            the first seed.

    """

    question: str
    config: str | list[str]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, Flags] = field(default_factory=dict)
    search: dict[str, Range | list[bool | int | float | str]] = field(default_factory=dict)
    trials: PositiveInt = 20
    seeds: list[NonNegativeInt] = field(default_factory=lambda: list(range(6)))
    vary: list[Literal["seed", "split"]] = field(default_factory=lambda: ["seed"])
    choose: str = "val/acc"
    fixed: Flags = field(default_factory=dict)
    baseline: str | None = None
    sampler: optuna.samplers.BaseSampler | None = None
    pruner: optuna.pruners.BasePruner | None = None

    def settings(self) -> dict[str, Flags]:
        """Return the settings of a grid or of variants, by name, in order."""
        combinations = itertools.product(*self.grid.values()) if self.grid else []
        named = self.named(dict(zip(self.grid, values, strict=True)) for values in combinations)
        return self.variants or named

    def extremes(self) -> dict[str, Flags]:
        """Return settings that cover every choice of a search and both ends of every range."""
        ends = {
            flag: [space.low, space.high] if isinstance(space, Range) else space
            for flag, space in self.search.items()
        }
        count = max(map(len, ends.values()), default=0)
        return self.named({f: v[i % len(v)] for f, v in ends.items()} for i in range(count))

    def named(self, settings: Iterable[Flags]) -> dict[str, Flags]:
        """Return settings by name."""
        return {self.name_of(flags): flags for flags in settings}

    def name_of(self, flags: Flags) -> str:
        """Return the name of a setting: its variant's, or one built from its flags."""
        return ",".join("=".join(filter(None, level)) for level in self.levels_of(flags).items())

    def levels_of(self, flags: Flags) -> dict[str, str]:
        """Return a setting's level of each factor. A grid's flags are factors; variants, or the
        settings of a search, are levels of a single factor named ""."""
        if self.variants:
            names = [name for name, own in self.variants.items() if _json(own) == _json(flags)]
            return {"": names[0] if names else ""}  # "" if this study no longer asks for it
        factors = [*self.grid, *self.search]
        levels = {_short(flag, factors): _text(flags.get(flag)) for flag in factors}
        return levels if self.grid else {"": ",".join(map("=".join, levels.items()))}

    def distributions(self) -> dict[str, distributions.BaseDistribution]:
        """Return the search space as Optuna distributions.

        Raises:
            MisconfigurationException: A range is invalid, e.g. empty.
        """
        spaces: dict[str, distributions.BaseDistribution] = {}
        for flag, space in self.search.items():
            try:
                spaces[flag] = _distribution(space)
            except ValueError as error:
                raise MisconfigurationException(f"search.{flag}: {error}") from error
        return spaces

    def files(self) -> list[str]:
        """Return the files of the recipe."""
        return [self.config] if isinstance(self.config, str) else self.config

    def folder_of(self, flags: Flags, seed: int) -> str:
        """Return the name of a run's folder, unique within the study."""
        setting = self.name_of(flags).replace(" ", "_")
        name = re.sub(r"[^\w.,=+-]+", "_", setting)
        if name != setting or len(name) > 100:  # others may map to the same name
            name = f"{name[:80]}-{hashlib.sha256(_json(flags).encode()).hexdigest()[:8]}"
        return f"{name},seed={seed}"

    def command(self, flags: Flags, seed: int, folder: Path) -> list[str]:
        """Return the command line of one run, without `python train.py`."""
        given = {**self.fixed, **flags}
        settings = {
            "name": self.folder_of(flags, seed),
            "trainer.default_root_dir": str(folder),
            "checkpoint.monitor": self.choose,
            "data.test_curve": True,  # for display only: `choose` can't name it
            # Classes before their arguments, which they would reset.
            **dict(sorted(given.items(), key=lambda item: item[0].count("."))),
            "seed_everything": seed,
            **({"data.split_seed": seed} if "split" in self.vary else {}),
        }
        configs = [word for file in self.files() for word in ("--config", file)]
        return ["fit", *configs, *(f"--{key}={_text(value)}" for key, value in settings.items())]


def _distribution(space: Range | list[Any]) -> distributions.BaseDistribution:
    if isinstance(space, list):
        return distributions.CategoricalDistribution(space)
    if not (isinstance(space.low, int) and isinstance(space.high, int)):
        return distributions.FloatDistribution(space.low, space.high, space.log, space.step)
    if isinstance(space.step, float):
        raise ValueError(f"step {space.step} is not an integer, but low and high are")
    return distributions.IntDistribution(space.low, space.high, space.log, space.step or 1)


def _json(value: Any) -> str:
    """Return plain data as JSON, the same for equal data."""
    return json.dumps(value, sort_keys=True)


def _text(value: Any) -> str:
    """Return a value as a user would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def _short(flag: str, flags: list[str]) -> str:
    """Return the shortest dotted end of a flag that no other flag shares."""
    parts = flag.split(".")
    ends = [".".join(parts[-count:]) for count in range(1, len(parts))]
    only = [end for end in ends if sum(f".{f}".endswith(f".{end}") for f in flags) == 1]
    return [*only, flag][0]


class DryRun(train.CLI):
    """Builds everything that a `fit` command line names, without running or writing."""

    def find_run_folder(self) -> Path:
        """Return no folder: nothing will be written."""
        return Path()

    def fit(self, **kwargs: Any) -> None:
        """Do nothing."""


def planned(question: Question, flags: Flags) -> Plan:
    """Return the plan of a setting's runs, from the config that their command line resolves to.

    Raises:
        MisconfigurationException: A flag belongs to the study, or the setting can't be run.
        SystemExit: `fit` rejects a flag or a value.
    """
    reserved = OURS | ({"data.split_seed": "vary"} if "split" in question.vary else {})
    for flag in (*question.fixed, *flags):
        if flag in reserved:
            raise MisconfigurationException(f"{flag} is set by the study: use {reserved[flag]}")
        if flag in question.fixed and flag in flags:
            raise MisconfigurationException(
                f"{flag} is in fixed and also in the settings: remove one"
            )
    setting, seed = f"setting {question.name_of(flags)}", question.seeds[0]
    try:
        cli = DryRun(question.command(flags, seed, Path("runs")))
        data = cli.datamodule
        if not data.verify:  # otherwise they are CIFAR-10, or refused
            data.prepare_data()
            data.setup("validate")
        images = {part: data.identity(part) for part in ("train", "test")}
    except MisconfigurationException as error:
        raise MisconfigurationException(f"{setting}: {error}") from error
    config = cli.config.fit
    is_kept = config.checkpoint.save_last and config.checkpoint.save_top_k != 0
    kept = (config.checkpoint.monitor, config.trainer.default_root_dir, config.name)
    given = {**question.fixed, **flags}  # `--fixed.trainer.max_epochs 3` parses to {trainer: ...}
    sections = [key for key in given if "." not in key and isinstance(given[key], dict)]
    _refuse({
        f"{setting}: data.val_size 0 leaves no validation set": config.data.val_size == 0,
        f"{setting}: the study controls which checkpoints are kept, and where": not is_kept
        or kept != (question.choose, "runs", question.folder_of(flags, seed)),
        f"{setting}: write flags of {', '.join(sections)} by their dotted names, such as "
        "trainer.max_epochs": sections != [],
        f"{setting}: trainer.max_epochs must be a number": (config.trainer.max_epochs or 0) <= 0,
    })  # fmt: skip
    device = cli.trainer.strategy.root_device.type
    return Plan(without_places(cli.config_dump), images, device)


def check(question: Question) -> dict[str, Plan]:
    """Return the plans of the settings by name; for a search, those of its extremes.

    Raises:
        MisconfigurationException: The question is invalid, or `planned` refuses a setting.
    """
    kinds = [kind for kind in ("grid", "variants", "search") if getattr(question, kind)]
    kind, seeds, baseline = " and ".join(kinds) or "none", question.seeds, question.baseline
    settings, values = question.settings(), (*question.grid.values(), *question.search.values())
    variants = ", ".join(map(str, question.variants))
    hint = f"name one of {variants}" if variants else "this study has no variants"
    folders = {str(name).replace(" ", "_") for name in settings}
    _refuse({
        f"a study needs exactly one of grid, variants and search: this one has {kind}":
            len(kinds) != 1,
        f"seeds {seeds}: list at least one seed, without duplicates":
            len({*seeds}) < max(len(seeds), 1),
        "vary must be [seed] or [seed, split]": "seed" not in question.vary,
        f"choose is {question.choose}: choose by val/acc or val/loss, never by the test set":
            question.choose not in ("val/acc", "val/loss"),
        f"baseline {baseline} is not a variant: {hint}":
            baseline not in (None, *question.variants),
        "sampler: to run every combination, use grid":
            isinstance(question.sampler, GridSampler | BruteForceSampler),
        f"{kind}: a flag has no values": [] in values,
        "variants: a name is not a string: quote it": not all(isinstance(n, str) for n in settings),
        f"{kind}: two names differ only in spaces": len(folders) < len(settings),
    })  # fmt: skip
    question.distributions()
    plans: dict[str, Plan] = {}
    for name, flags in (settings or question.extremes()).items():
        plan = planned(question, flags)
        if settings and (same := [other for other, p in plans.items() if repr(p) == repr(plan)]):
            raise MisconfigurationException(f"{same[0]} and {name} are the same setting")
        plans[name] = plan
    return plans


def _refuse(mistakes: dict[str, bool]) -> None:
    """Raise the first message whose condition is true."""
    for message, is_true in mistakes.items():
        if is_true:
            raise MisconfigurationException(message)
