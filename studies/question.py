"""What a study asks, and whether that can be run."""

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
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BruteForceSampler, GridSampler

import train
from studies.record import Plan, without_places

Flags = dict[str, Any]

# What a study decides itself, and by which of its own settings.
OURS = {
    "seed_everything": "seeds", "name": "--folder", "trainer.default_root_dir": "--folder",
    "ckpt_path": "another study", "config": "config", "checkpoint.monitor": "choose",
    "checkpoint.mode": "choose",
}  # fmt: skip


@dataclass
class Range:
    """Numbers to search, whole ones if both ends are.

    Args:
        low: The lowest.
        high: The highest.
        log: Search by order of magnitude.
        step: Only these steps from the lowest.

    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def distribution(self) -> BaseDistribution:
        """Return the range as Optuna takes it."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            if isinstance(self.step, float):
                raise ValueError(f"step {self.step} between whole numbers")
            return IntDistribution(self.low, self.high, self.log, self.step or 1)
        return FloatDistribution(self.low, self.high, self.log, self.step)


@dataclass
class Question:
    """A question, as its YAML file asks it. Flags are those of `train.py fit`, without dashes.

    Args:
        question: In words.
        config: The recipe, or several on top of each other.
        grid: Values for each flag; every combination is a setting.
        variants: Settings by name, each with flags of its own.
        search: For each flag a range {low, high, log, step} or a list of choices; Optuna's sampler
            picks the settings.
        trials: How many settings to pick.
        seeds: Each setting is run once for each of them.
        vary: `[seed]`: all runs have the recipe's split; `[seed, split]`: each seed has its own.
        choose: What names the best epoch, and the best setting: `val/acc` or `val/loss`.
        fixed: Flags for all runs, on top of the recipe.
        baseline: The name of a variant: compare the others with this one only, not each with each.
        sampler: Picks the settings of a search (default: TPE).
        pruner: Stops runs that do worse than others at the same epoch; of a search those of the
            first seed.

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
        if self.variants:
            return {name: flags or {} for name, flags in self.variants.items()}
        combinations = itertools.product(*self.grid.values()) if self.grid else []
        return self.named(dict(zip(self.grid, values, strict=True)) for values in combinations)

    def extremes(self) -> dict[str, Flags]:
        """Return settings that have every choice of a search and both ends of every range."""
        ends = {
            flag: space if isinstance(space, list) else [space.low, space.high]
            for flag, space in self.search.items()
        }
        count = max((len(values) for values in ends.values()), default=0)
        return self.named(
            {flag: values[min(i, len(values) - 1)] for flag, values in ends.items()}
            for i in range(count)
        )

    def named(self, settings: Iterable[Flags]) -> dict[str, Flags]:
        """Return settings by name."""
        return {self.name_of(flags): flags for flags in settings}

    def name_of(self, flags: Flags) -> str:
        """Return the name of a setting: its variant's, or what its flags say."""
        for name, own in self.variants.items():
            if as_text(own or {}) == as_text(flags):
                return name
        every = [*self.grid, *self.search]
        return ",".join(f"{_short(flag, every)}={_text(flags[flag])}" for flag in every)

    def levels(self, settings: dict[str, Flags]) -> dict[str, dict[str, str]]:
        """Return for each setting its level of each factor: the flags of a grid are factors, the
        variants or the settings of a search are levels of one factor that has no name."""
        if not self.grid:
            return {name: {"": name} for name in settings}
        flags = list(self.grid)
        return {
            name: {_short(flag, flags): _text(value) for flag, value in setting.items()}
            for name, setting in settings.items()
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what is searched as Optuna takes it.

        Raises:
            MisconfigurationException: A range without numbers in it.
        """
        found: dict[str, BaseDistribution] = {}
        for flag, space in self.search.items():
            try:
                found[flag] = (
                    CategoricalDistribution(space)
                    if isinstance(space, list)
                    else space.distribution()
                )
            except ValueError as error:
                raise MisconfigurationException(f"search.{flag}: {error}") from error
        return found

    def files(self) -> list[str]:
        """Return the files of the recipe."""
        return [self.config] if isinstance(self.config, str) else self.config

    def folder_of(self, flags: Flags, seed: int) -> str:
        """Return the name of a run's folder, which no other run of the study has."""
        setting = self.name_of(flags).replace(" ", "_")
        name = re.sub(r"[^\w.,=+-]+", "_", setting)
        if name != setting or len(name) > 100:  # others may come to the same
            name = f"{name[:80]}-{hashlib.sha256(as_text(flags).encode()).hexdigest()[:8]}"
        return f"{name},seed={seed}"

    def command(self, flags: Flags, seed: int, folder: Path, name: str) -> list[str]:
        """Return the command line of one run, without `python train.py`."""
        settings = {
            "name": name,
            "trainer.default_root_dir": str(folder),
            "checkpoint.monitor": self.choose,
            "data.test_curve": True,  # to look at; `choose` cannot name it
            **self.fixed,
            **flags,
            "seed_everything": seed,
            **({"data.split_seed": seed} if "split" in self.vary else {}),
        }
        configs = [word for file in self.files() for word in ("--config", file)]
        return ["fit", *configs, *(f"--{key}={_text(value)}" for key, value in settings.items())]


def _text(value: Any) -> str:
    """Return a value as a user would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def _short(flag: str, flags: list[str]) -> str:
    """Return as much of the end of a flag as tells it from the others."""
    parts = flag.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if sum(f".{other}".endswith(f".{end}") for other in flags) == 1:
            return end
    return flag


def as_text(value: Any) -> str:
    """Return plain data as JSON, equal for equal data."""
    return json.dumps(value, sort_keys=True)


class DryRun(train.CLI):
    """Builds everything that a command line of `fit` names, and neither runs nor writes."""

    def find_run_folder(self) -> Path:
        """Return no folder: nothing will be written."""
        return Path()

    def fit(self, **kwargs: Any) -> None:
        """Do nothing."""


def planned(question: Question, flags: Flags) -> Plan:
    """Return what the runs of a setting are, by the settings that their command line comes to.

    Raises:
        MisconfigurationException: Something that the study decides itself, or that can't be run.
        SystemExit: A flag that `fit` does not have or a value that it refuses.
    """
    name = question.name_of(flags)
    for flag in (*question.fixed, *flags):
        if flag in OURS or (flag == "data.split_seed" and "split" in question.vary):
            instead = OURS.get(flag, "vary")
            raise MisconfigurationException(f"{flag} belongs to the study: use {instead}")
        if flag in question.fixed and flag in flags:
            raise MisconfigurationException(f"{flag} is fixed, and differs between settings")
    try:
        cli = DryRun(question.command(flags, question.seeds[0], Path("runs"), "check"))
        data = cli.datamodule
        if not data.verify:  # else they are CIFAR-10 or refused
            data.prepare_data()
            data.setup("validate")
        images = {part: data.identity(part) for part in ("train", "test")}
    except MisconfigurationException as error:
        raise MisconfigurationException(f"setting {name}: {error}") from error
    config = cli.config.fit
    if config.data.val_size == 0:
        raise MisconfigurationException(f"setting {name}: data.val_size 0 leaves no validation")
    keeps = config.checkpoint.save_last and config.checkpoint.save_top_k != 0
    ends = (config.checkpoint.monitor, config.trainer.default_root_dir, config.name)
    if ends != (question.choose, "runs", "check") or not keeps:
        raise MisconfigurationException(
            f"setting {name}: what is kept of a run, and where, belongs to the study"
        )
    if not (config.trainer.max_epochs or 0) > 0:
        raise MisconfigurationException(f"setting {name}: trainer.max_epochs must be a number")
    device = cli.trainer.strategy.root_device.type
    return Plan(without_places(cli.config_dump), images, device, config.trainer.max_epochs)


def check(question: Question) -> dict[str, Plan]:
    """Refuse what could not run, and return the plans of the settings by name; of a search, those
    of its extremes.

    Raises:
        MisconfigurationException: A question without settings, or one that `planned` refuses.
    """
    kinds = [kind for kind in ("grid", "variants", "search") if getattr(question, kind)]
    if len(kinds) != 1:
        said = " and ".join(kinds) or "none"
        raise MisconfigurationException(f"a study has grid, variants or search: this has {said}")
    if not question.seeds or len(set(question.seeds)) < len(question.seeds):
        raise MisconfigurationException(f"seeds {question.seeds}: name each one once, at least one")
    if "seed" not in question.vary:
        raise MisconfigurationException("vary: [seed] or [seed, split]")
    if question.choose not in ("val/acc", "val/loss"):
        raise MisconfigurationException(
            f"choose is {question.choose}: choose by val/acc or val/loss, never by the test set"
        )
    if question.baseline is not None and question.baseline not in question.variants:
        names = ", ".join(question.variants) or "variants, of which this study has none"
        raise MisconfigurationException(
            f"baseline {question.baseline} is no variant: name one of {names}"
        )
    if isinstance(question.sampler, GridSampler | BruteForceSampler):
        raise MisconfigurationException("sampler: to run every combination, use grid")
    for values in (*question.grid.values(), *question.search.values()):
        if values == []:
            raise MisconfigurationException(f"{kinds[0]}: a flag has no values")
    question.distributions()
    settings = question.settings()
    plans: dict[str, Plan] = {}
    for name, flags in (settings or question.extremes()).items():
        plan = planned(question, flags)
        if settings and (same := [other for other, its in plans.items() if its == plan]):
            raise MisconfigurationException(f"{same[0]} and {name} are the same setting")
        plans[name] = plan
    if len({question.folder_of(flags, 0) for flags in settings.values()}) < len(settings):
        raise MisconfigurationException(f"{kinds[0]}: two names differ only in spaces")
    return plans
