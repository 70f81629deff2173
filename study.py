"""The second door: many runs that answer one question.

    python study.py configs/studies/batch_size.yaml
    python study.py configs/studies/batch_size.yaml --jobs 2              # two runs at a time
    python study.py configs/studies/batch_size.yaml --seeds '[0, 1, 2, 3]'  # the new seed only

Every run is one of `python train.py fit`, in runs/<study>/<setting>,seed=<seed>/version_0/. What was
stopped, in whatever way, goes on with the same command; the same command started again while it
runs, here or on other machines, takes its share of the runs. Optuna keeps the record; nothing else
is shared.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning
import optuna
import sqlalchemy
import torch
import yaml
from filelock import FileLock, Timeout
from jsonargparse import ActionConfigFile
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import train
from answer import Answer, Outcome
from callbacks import History
from callbacks.history import Row
from runs import forget, is_newest, processor, read_checkpoint
from terminal import OneLineParser, errors_in_one_line, quieten

# A worker on another machine that has said nothing for so long is taken for dead. It says something
# once in `HEARTBEAT`. A dead worker on this machine is known at once, by its lock.
HEARTBEAT, SILENCE = 30.0, 300.0  # seconds

Flags = dict[str, Any]


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
            return IntDistribution(self.low, self.high, self.log, int(self.step or 1))
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
        choose: What names the best epoch, and the best setting: `val/acc` or `val/loss`.
        fixed: Flags for all runs, on top of the recipe.
        baseline: The name of a setting: compare the others with this one only, not each with each.
        sampler: Picks the settings of a search.
        pruner: Stops runs that do worse than others at the same epoch.

    """

    question: str
    config: str | list[str]
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: dict[str, Flags] = field(default_factory=dict)
    search: dict[str, Range | list[bool | int | float | str]] = field(default_factory=dict)
    trials: int = 20
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
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
        return self.named([dict(zip(self.grid, values, strict=True)) for values in combinations])

    def extremes(self) -> dict[str, Flags]:
        """Return settings that have every choice of a search and both ends of every range."""
        ends = {
            flag: space if isinstance(space, list) else [space.low, space.high]
            for flag, space in self.search.items()
        }
        count = max((len(values) for values in ends.values()), default=0)
        return self.named(
            [
                {f: values[min(i, len(values) - 1)] for f, values in ends.items()}
                for i in range(count)
            ]
        )

    def named(self, settings: list[Flags]) -> dict[str, Flags]:
        """Return settings of a grid or a search by name."""
        flags = [*self.grid, *self.search]
        return {
            ",".join(f"{_short(flag, flags)}={_text(value)}" for flag, value in setting.items()): (
                setting
            )
            for setting in settings
        }

    def distributions(self) -> dict[str, BaseDistribution]:
        """Return what is searched as Optuna takes it.

        Raises:
            MisconfigurationException: A range without numbers in it.
        """
        found: dict[str, BaseDistribution] = {}
        for flag, space in self.search.items():
            try:
                is_list = isinstance(space, list)
                found[flag] = CategoricalDistribution(space) if is_list else space.distribution()
            except ValueError as error:
                raise MisconfigurationException(f"search.{flag}: {error}") from error
        return found

    def recipe(self) -> str:
        """Return all that the runs have in common and that can change a result, as JSON."""
        files = [self.config] if isinstance(self.config, str) else self.config
        contents = [yaml.safe_load(Path(file).read_text()) for file in files]
        elsewhere = ("data.root", "data.sources", "data.download", "trainer.accelerator")
        fixed = {flag: value for flag, value in self.fixed.items() if flag not in elsewhere}
        return json.dumps([contents, fixed, self.choose], sort_keys=True)

    def command(self, flags: Flags, seed: int, folder: Path, name: str) -> list[str]:
        """Return the command line of one run, without `python train.py`."""
        files = [self.config] if isinstance(self.config, str) else self.config
        mode = "max" if self.choose.endswith("acc") else "min"
        settings = {
            "name": name,
            "trainer.default_root_dir": str(folder),
            "checkpoint.monitor": self.choose,
            "checkpoint.mode": mode,
            "data.test_curve": True,  # to look at; `choose` cannot name it
            **self.fixed,
            **flags,
            "seed_everything": seed,
        }
        configs = [word for file in files for word in ("--config", file)]
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


def _key(flags: Flags, seed: int) -> tuple[str, int]:
    """Return what two runs of one study must differ in."""
    return json.dumps(flags, sort_keys=True), seed


# ------------------------------------------------------------------- before anything runs


class DryRun(train.CLI):
    """Builds everything that a command line of `fit` names, and neither runs nor writes."""

    def find_run_folder(self) -> Path:
        """Return no folder: nothing will be written."""
        return Path()

    def fit(self, **kwargs: Any) -> None:
        """Do nothing."""


def check(question: Question, settings: dict[str, Flags]) -> dict[str, int]:
    """Refuse what could not run, and return the epochs of each setting by name.

    Raises:
        MisconfigurationException: A question without settings, or with flags of its own in them.
        SystemExit: A flag that `fit` does not have or a value that it refuses.
    """
    kinds = [kind for kind in ("grid", "variants", "search") if getattr(question, kind)]
    if len(kinds) != 1:
        said = " and ".join(kinds) or "none"
        raise MisconfigurationException(f"a study has grid, variants or search: this has {said}")
    if not question.seeds or len(set(question.seeds)) < len(question.seeds):
        raise MisconfigurationException(f"seeds {question.seeds}: name each one once, at least one")
    if question.choose not in ("val/acc", "val/loss"):
        raise MisconfigurationException(
            f"choose is {question.choose}: choose by val/acc or val/loss, never by the test set"
        )
    if question.baseline is not None and question.baseline not in settings and settings:
        raise MisconfigurationException(
            f"baseline {question.baseline} is no setting: name one of {', '.join(settings)}"
        )
    if any(not values for values in question.grid.values()):
        raise MisconfigurationException("grid: a flag has no values")
    ours = {"seed_everything": "seeds", "name": "--folder", "trainer.default_root_dir": "--folder",
            "ckpt_path": "nothing", "config": "config", "checkpoint.monitor": "choose",
            "checkpoint.mode": "choose"}  # fmt: skip
    epochs = {}
    for name, flags in settings.items():
        for flag in (*question.fixed, *flags):
            if flag in ours:
                raise MisconfigurationException(f"{flag} belongs to the study: use {ours[flag]}")
        try:
            cli = DryRun(question.command(flags, question.seeds[0], Path("runs"), "check"))
        except MisconfigurationException as error:
            raise MisconfigurationException(f"setting {name}: {error}") from error
        if cli.config.fit.data.val_size == 0:
            raise MisconfigurationException(f"setting {name}: data.val_size 0 leaves no validation")
        epochs[name] = cli.config.fit.trainer.max_epochs
    return epochs


# ------------------------------------------------------------------------- one run, in a process


class Reporter(Callback):
    """Tells the study of every epoch, and stops the run if the study says so."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def rows(self, trainer: Trainer) -> list[Row]:
        """Return the rows of the run's history."""
        return next(c for c in trainer.callbacks if isinstance(c, History)).rows  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was done before the run was stopped."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send all rows, and wait for the answer."""
        self.connection.send(("epoch", self.rows(trainer)))
        trainer.should_stop = trainer.should_stop or self.connection.recv()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send all rows for the last time."""
        self.final = self.rows(trainer)


def run(
    command: list[str], folder: Path, devices: str | None, threads: int, link: Connection
) -> None:
    """Run `train.py fit` in this process, a child of the study, from the last epoch that is kept.

    Args:
        command: The command line, should nothing be kept yet.
        folder: Holds the run's `version_0`, and `fit.log` for what it prints.
        devices: The value of CUDA_VISIBLE_DEVICES, if this run has GPUs of its own.
        threads: How many cores it may use.
        link: Takes ("epoch", rows), answers whether to stop; at last ("done", rows) or
            ("failed", why).

    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "fit.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.argv = ["train.py", *command]
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    torch.set_num_threads(threads)
    quieten()
    train.keep_freed_memory()
    try:
        # A process that lost its parent may take a moment to end.
        with FileLock(folder / ".lock", timeout=60), errors_in_one_line():
            for version in folder.glob("version_*"):
                forget(version)  # if it was stopped in its first epoch
            kept = [path for path in folder.glob("version_*/checkpoints/*.ckpt") if is_newest(path)]
            if not kept and (twin := find_twin(command, folder)):
                print(f"the same run as {twin}: taken from there")
                shutil.copytree(twin, folder / "version_0", copy_function=os.link)
                link.send(("done", _rows_kept(twin)))
                return
            reporter = Reporter(link)
            train.CLI(["fit", f"--ckpt_path={kept[0]}"] if kept else command, [reporter])
        link.send(("done", reporter.final))
    except SystemExit as stop:
        link.send(("failed", str(stop.code)))
    except Exception as error:
        traceback.print_exc()
        link.send(("failed", f"{type(error).__name__}: {error}, see {folder / 'fit.log'}"))


def find_twin(command: list[str], folder: Path) -> Path | None:
    """Return a whole run of another study that has the same settings and so the same results."""

    def common(settings: dict[str, Any]) -> dict[str, Any]:
        for key in ("name", "ckpt_path", "config"):
            settings.pop(key, None)
        del settings["trainer"]["default_root_dir"]
        return settings

    cli = DryRun(command)
    own = common(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"])
    studies, seed = folder.parents[1], folder.name.rpartition(",")[2]
    for weights in studies.glob(f"*/*,{seed}/version_*/model.pth"):
        config = weights.with_name("config.yaml")
        if config.exists() and common(yaml.safe_load(config.read_text())) == own:
            return weights.parent
    return None


def _rows_kept(version: Path) -> list[Row]:
    """Return the epochs of a run by its last checkpoint."""
    checkpoint = version / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        return []
    rows: list[Row] = read_checkpoint(checkpoint)["callbacks"]["History"]["rows"]
    return rows


def _die_with_parent() -> None:
    """End this process when the study has ended, however it did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ------------------------------------------------------------------------------------- the record


def open_record(question: Question, folder: Path, storage: str | None) -> optuna.Study:
    """Open the study in its storage, or begin it there.

    Raises:
        MisconfigurationException: No such storage, or a study begun with another recipe.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock"):  # two that make the tables at once get in each other's way
            record = optuna.create_study(
                study_name=folder.name,
                storage=_storage(storage or f"sqlite:///{folder / 'study.db'}"),
                direction="maximize" if question.choose.endswith("acc") else "minimize",
                sampler=question.sampler or optuna.samplers.TPESampler(seed=0),
                pruner=question.pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(f"storage {storage}: {reason}") from error
    recipe = record.user_attrs.get("recipe")
    if recipe is None:
        record.set_user_attr("recipe", question.recipe())
    elif recipe != question.recipe():
        raise MisconfigurationException(
            f"{folder} was begun with another recipe: config, fixed or choose has changed since. "
            "Give this one a folder of its own with --folder"
        )
    return record


def _storage(url: str) -> optuna.storages.BaseStorage:
    if url.startswith("journal:"):
        path = url.removeprefix("journal:")
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=patience)


class Worker:
    """Takes runs of a study, each for itself alone, and returns them finished.

    A trial of Optuna is one run. Its user attributes hold its `flags`, its `seed`, who runs it, and
    in the end all epochs, so that the storage alone is enough for the answer.
    """

    def __init__(self, question: Question, record: optuna.Study, folder: Path) -> None:
        self.question = question
        self.record = record
        self.distributions = question.distributions()
        self.failed: dict[tuple[str, int], str] = {}
        self.name = f"{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
        self.workers = folder / ".workers"
        self.workers.mkdir(exist_ok=True)
        self.alive = FileLock(self.workers / self.name)
        self.alive.acquire()

    def close(self) -> None:
        """Say that this worker has ended."""
        self.alive.release()
        (self.workers / self.name).unlink(missing_ok=True)

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that count: not those that were given up for another try."""
        found = self.record.get_trials(deepcopy=False)
        return [t for t in found if t.state != TrialState.FAIL and self._key(t)]

    @staticmethod
    def _key(trial: FrozenTrial | optuna.Trial) -> tuple[str, int] | None:
        attrs = trial.user_attrs
        return _key(attrs["flags"], attrs["seed"]) if "seed" in attrs else None

    def settings(self) -> dict[str, Flags]:
        """Return the settings that are known by now, by name."""
        if not self.question.search:
            return self.question.settings()
        picked = {self._key(t)[0]: t.user_attrs["flags"] for t in self.trials()}  # type: ignore[index]
        return self.question.named(list(picked.values()))

    def missing(self) -> list[tuple[Flags, int]]:
        """Return the runs that nobody has done or is to do, all settings of one seed first."""
        trials = self.trials()
        there = {self._key(trial) for trial in trials}
        if self.question.search:  # a setting that was not given up gets the other seeds too
            settings = [t.user_attrs["flags"] for t in trials if t.state == TrialState.COMPLETE]
        else:
            settings = list(self.settings().values())
        runs = {_key(f, seed): (f, seed) for seed in self.question.seeds for f in settings}
        return [run for key, run in runs.items() if key not in there and key not in self.failed]

    def take(self) -> optuna.Trial | None:
        """Return a trial that from now on is this worker's; None if there is none to be had now."""
        self._give_up_the_dead()
        for flags, seed in self.missing():
            params = flags if self.question.search else {}
            self.record.enqueue_trial(params, {"flags": flags, "seed": seed})
        while True:
            trials = self.record.get_trials(deepcopy=False)
            picked = [t for t in trials if "picked" in t.user_attrs]
            may_pick = bool(self.distributions) and len(picked) < self.question.trials
            if not may_pick and not any(t.state == TrialState.WAITING for t in trials):
                return None
            trial = self.record.ask(self.distributions)
            trial.set_user_attr("worker", self.name)
            if "seed" not in trial.user_attrs and may_pick:
                trial.set_user_attr("picked", True)
                trial.set_user_attr("flags", trial.params)
                trial.set_user_attr("seed", self.question.seeds[0])
            if self._key(trial) and not self._is_twice(trial) and self._is_asked(trial):
                return trial
            self.record.tell(trial, state=TrialState.FAIL)

    def _is_twice(self, trial: optuna.Trial) -> bool:
        """Whether another worker wanted the same run at the same moment: the earlier one counts."""
        key = self._key(trial)
        return any(t.number < trial.number and self._key(t) == key for t in self.trials())

    def _is_asked(self, trial: optuna.Trial) -> bool:
        """Whether the question, as it stands now, asks for the run of a trial."""
        flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
        settings = self.settings().values()
        return seed in self.question.seeds and any(flags == asked for asked in settings)

    def _give_up_the_dead(self) -> None:
        """Free the runs of workers that have ended without a word, so that others go on."""
        for trial in self.record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial):
                self.record.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        name = trial.user_attrs.get("worker", "")
        lock = self.workers / name
        if name == self.name:
            return False
        if name.startswith(f"{socket.gethostname()}.") and lock.exists():
            try:
                with FileLock(lock, timeout=0):
                    lock.unlink(missing_ok=True)
                return True
            except Timeout:
                return False
        started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        return time.time() - max(started, trial.user_attrs.get("heard", 0.0)) > SILENCE

    def outcomes(self) -> list[Outcome]:
        """Return the finished runs that the question asks for."""
        names = {json.dumps(f, sort_keys=True): name for name, f in self.settings().items()}
        found = []
        for trial in self.trials():
            flags, seed = self._key(trial)  # type: ignore[misc]
            if trial.state.is_finished() and seed in self.question.seeds and flags in names:
                attrs = trial.user_attrs
                found.append(Outcome(names[flags], seed, attrs["rows"], attrs.get("ended", "")))
        return found


# ------------------------------------------------------------------------------------- the work


@dataclass
class Running:
    """A run under way in a child process."""

    trial: optuna.Trial
    name: str
    process: BaseProcess
    slot: int
    rows: list[Row] = field(default_factory=list)
    ended: str = ""  # why, if not by its last epoch
    bar: TaskID | None = None


def shares(jobs: int) -> list[tuple[str | None, int]]:
    """Return for each of `jobs` the GPUs that are its own, None if there are none, and its cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [(None, threads)] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(count)]
    return [(",".join(gpus[i::jobs] or [gpus[i % count]]), threads) for i in range(jobs)]


def machine(threads: int) -> str:
    """Return what a run's speed, and the last digits of its results, depend on."""
    device = f"{threads} of {os.cpu_count()} cores of {processor()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return f"{device}, torch {torch.__version__}, lightning {lightning.__version__}"


class Lab:
    """Runs a study: takes runs from the record, has each done in a process, keeps what comes."""

    def __init__(
        self, question: Question, worker: Worker, folder: Path, epochs: dict[str, int], jobs: int
    ) -> None:
        self.question, self.worker, self.folder, self.epochs = question, worker, folder, epochs
        self.shares = shares(jobs)
        self.running: dict[Connection, Running] = {}
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["study"])
        self.heard = 0.0
        self.console = Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600,
        )
        self.total = self.progress.add_task("epochs", total=None, state="")

    def work(self) -> None:
        """Run until every run of the question is done, here or elsewhere."""
        try:
            with self.progress:
                while True:
                    idle = not self._start_what_can_be()
                    for link in wait(list(self.running), timeout=1.0) if self.running else []:
                        self._listen(link)  # type: ignore[arg-type]
                    self._say_how_far()
                    if not self.running and idle:
                        if not self._others():
                            return
                        time.sleep(1.0)
        finally:
            for one in self.running.values():
                one.process.terminate()
            for one in self.running.values():
                one.process.join(10)
                one.process.kill()
                self.worker.record.tell(one.trial, state=TrialState.FAIL, skip_if_finished=True)

    def _others(self) -> int:
        """Return how many runs other workers have under way."""
        trials = self.worker.trials()
        return sum(t.state == TrialState.RUNNING for t in trials) - len(self.running)

    def _start_what_can_be(self) -> bool:
        """Start as many runs as there are shares free; return whether any was started."""
        started = False
        while len(self.running) < len(self.shares) and (trial := self.worker.take()):
            started = True
            flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
            (setting,) = (
                self.question.named([flags])
                if not self.question.variants
                else ([name for name, own in self.question.settings().items() if own == flags][:1])
            )
            name = re.sub(r"[^\w.,=+-]+", "_", f"{setting},seed={seed}")
            slot = min(set(range(len(self.shares))) - {r.slot for r in self.running.values()})
            here, there = self.processes.Pipe()
            process = self.processes.Process(
                target=run,
                args=(
                    self.question.command(flags, seed, self.folder, name),
                    self.folder / name,
                    *self.shares[slot],
                    there,
                ),
            )
            process.start()
            there.close()
            bar = self.progress.add_task(
                f"  {setting}, seed {seed}",
                total=self.epochs.get(setting, max(self.epochs.values())),
                state="starts",
            )
            self.running[here] = Running(trial, name, process, slot, bar=bar)
        return started

    def _listen(self, link: Connection) -> None:
        """Take one message of a run."""
        one = self.running[link]
        try:
            kind, content = link.recv()
        except EOFError:
            one.process.join()
            kind, content = "failed", f"its process ended with {one.process.exitcode}"
        if kind == "epoch":
            with contextlib.suppress(OSError):  # it may have ended since
                link.send(self._stops(one, content))
            return
        del self.running[link]
        link.close()
        one.process.join()
        if one.bar is not None:
            self.progress.remove_task(one.bar)
        if kind == "done":
            one.rows = content
            self._keep(one)
        else:
            self._give_up(one, content)

    def _stops(self, one: Running, rows: list[Row]) -> bool:
        """Take over the epochs of a run, and return whether there is no sense in more."""
        for row in rows[len(one.rows) :]:
            one.trial.report(row[self.question.choose], int(row["epoch"]))
            if not math.isfinite(row.get("train/loss", 0.0)):
                one.ended = f"diverged in epoch {row['epoch']:.0f}"
        one.rows = rows
        if not one.ended and rows and one.trial.should_prune():
            one.ended = f"pruned after epoch {rows[-1]['epoch']:.0f}"
        if one.bar is not None and rows:
            state = f"epoch {rows[-1]['epoch']:.0f}, {self._quality(rows[-1])}"
            self.progress.update(one.bar, completed=len(rows), state=state)
        return bool(one.ended)

    def _quality(self, row: Row) -> str:
        key = self.question.choose
        return f"{key} {row[key]:.2%}" if key.endswith("acc") else f"{key} {row[key]:.4f}"

    def _keep(self, one: Running) -> None:
        """Put a finished run on record."""
        outcome = Outcome(one.name, one.trial.user_attrs["seed"], one.rows, one.ended)
        ended = outcome.diverged() or one.ended
        one.trial.set_user_attr("rows", one.rows)
        one.trial.set_user_attr("ended", ended)
        one.trial.set_user_attr("machine", machine(self.shares[one.slot][1]))
        best = outcome.best(self.question.choose)
        if ended or best is None:
            self.worker.record.tell(one.trial, state=TrialState.PRUNED)
            self._print(f"{one.name}: {ended}")
        else:
            self.worker.record.tell(one.trial, best[self.question.choose])
            test = f", test/acc {best['test/acc']:.2%}" if "test/acc" in best else ""
            self._print(
                f"{one.name}: {self._quality(best)} in epoch {best['epoch']:.0f}{test}, "
                f"{outcome.seconds():.0f} s"
            )

    def _give_up(self, one: Running, why: str) -> None:
        """Put on record that a run failed, which another start may try again."""
        key = Worker._key(one.trial)
        if key is not None:
            self.worker.failed[key] = f"{one.name}: {why.removeprefix('error: ')}"
        self.worker.record.tell(one.trial, state=TrialState.FAIL)
        self._print(f"{one.name}: failed: {why.removeprefix('error: ')}")

    def _print(self, line: str) -> None:
        """Print a line on a finished run, and how many there are."""
        trials = self.worker.trials()
        done = sum(trial.state.is_finished() for trial in trials)
        self.console.print(f"[{done}/{len(trials)}] {line}", markup=False, soft_wrap=True)

    def _say_how_far(self) -> None:
        """Show what is done, running and left; tell other workers that this one is alive."""
        now = time.time()
        if now - self.heard > HEARTBEAT:
            self.heard = now
            for one in self.running.values():
                one.trial.set_user_attr("heard", now)
        if self.progress.disable:
            return
        trials = self.worker.trials()
        done = [t for t in trials if t.state.is_finished()]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        longest = max(self.epochs.values(), default=1)
        left = len(trials) - len(done) - len(running)
        self.progress.update(
            self.total,
            total=longest * len(trials),
            completed=longest * len(done) + sum(len(t.intermediate_values) for t in running),
            state=f"{len(done)} runs done, {len(running)} running, {left} left",
        )


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    with errors_in_one_line():
        _main(sys.argv[1:] if args is None else args)


def _main(args: list[str]) -> None:
    parser = OneLineParser(prog="study.py", description="Answer a question by many runs.")
    parser.add_argument("--file", action=ActionConfigFile, help="the question (or as first word)")
    parser.add_class_arguments(Question)
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    parser.add_argument(
        "--storage", type=str | None, default=None, help="any of Optuna, or journal:FILE"
    )
    parser.add_argument("--folder", type=str | None, default=None, help="runs/<name of the file>")
    if args and not args[0].startswith("-"):
        args = ["--file", *args]
    typed = parser.parse_args(args)
    built = parser.instantiate_classes(typed).as_dict()
    # Flags are words to pass on, though some of them name classes.
    built |= {key: typed.as_dict()[key] for key in ("grid", "variants", "fixed")}
    files, jobs = built.pop("file"), built.pop("jobs")
    storage, folder = built.pop("storage"), built.pop("folder")
    question = Question(**built)
    if not files:
        raise MisconfigurationException("name the file of a study: python study.py FILE")
    if jobs < 1:
        raise MisconfigurationException(f"--jobs {jobs}: at least 1")
    folder = Path(folder or Path("runs", Path(str(files[-1])).stem))
    epochs = check(question, question.settings() or question.extremes())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    worker = Worker(question, open_record(question, folder, storage), folder)
    try:
        Lab(question, worker, folder, epochs, jobs).work()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    finally:
        worker.close()
    answer = Answer(question, worker.settings(), worker.outcomes())
    answer.write(folder)
    if worker.failed:
        sys.exit(f"error: {len(worker.failed)} failed, see above: the same command tries again")


if __name__ == "__main__":
    main()
