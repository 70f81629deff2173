"""The record of a study, kept by Optuna: who does which run, and what came of it."""

import contextlib
import re
import socket
import time
import uuid
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.samplers import TPESampler
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from runs import Row
from studies.answer import Outcome
from studies.question import Flags, Question, as_text, run_key

# A worker on another machine that has said nothing for so long is taken for dead. It says something
# once in `HEARTBEAT`. A dead worker on this machine is known at once, by its lock.
HEARTBEAT, SILENCE = 30.0, 300.0  # seconds
DOUBLES = 20  # a search that picks known settings so often in a row has picked them all

STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


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
                sampler=question.sampler or TPESampler(constant_liar=True),  # minds what runs
                pruner=question.pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
    except (*STORAGE_ERRORS, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(without_password(f"storage {storage}: {reason}")) from error
    recipe = record.user_attrs.get("recipe")
    if recipe is None:
        record.set_user_attr("recipe", question.recipe())
    elif recipe != question.recipe():
        raise MisconfigurationException(
            f"{folder} was begun with another recipe: config, fixed, search or choose has changed "
            "since. Give this one a folder of its own with --folder"
        )
    return record


def without_password(text: str) -> str:
    """Return a text without the passwords of its URLs."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]+@", r"\1:...@", text)


def _storage(url: str) -> optuna.storages.BaseStorage:
    if url.startswith("journal:"):
        path = url.removeprefix("journal:")
        return JournalStorage(JournalFileBackend(path))
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=patience)


class Worker:
    """Takes runs of a study, each for itself alone, and returns them finished.

    A trial of Optuna is one run. Its user attributes hold its `flags`, its `seed`, who runs it, and
    in the end all epochs, so that the storage alone is enough for the answer. Inside `with` it may
    take runs: then others on this machine see by its lock that it is alive.
    """

    def __init__(self, question: Question, record: optuna.Study, folder: Path) -> None:
        self.question = question
        self.record = record
        self.distributions = question.distributions()
        self.failed: set[tuple[str, int] | None] = set()
        self.doubles = 0
        self.heard: dict[int, tuple[object, float]] = {}  # what others said last, and since when
        self.name = f"{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
        self.workers = folder / ".workers"
        self.alive = FileLock(self.workers / self.name)
        self.turn = FileLock(folder / ".lock")

    def __enter__(self) -> "Worker":
        self.workers.mkdir(exist_ok=True)
        self.alive.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is not finished to others."""
        with contextlib.suppress(*STORAGE_ERRORS):
            for trial in self.record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if trial.user_attrs.get("worker") == self.name:
                    self.give_up(trial.number)
        self.alive.release()
        (self.workers / self.name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------- what there is

    def trials(self) -> list[FrozenTrial]:
        """Return the trials that count: not those that were given up for another try."""
        found = self.record.get_trials(deepcopy=False)
        return [t for t in found if t.state != TrialState.FAIL and self.key(t)]

    @staticmethod
    def key(trial: FrozenTrial | optuna.Trial) -> tuple[str, int] | None:
        """Return what no two runs have in common, if the trial is one already."""
        attrs = trial.user_attrs
        return run_key(attrs["flags"], attrs["seed"]) if "seed" in attrs else None

    def picked(self) -> dict[str, Flags]:
        """Return the settings that a search has picked, by their text."""
        found = [t.user_attrs for t in self.record.get_trials(deepcopy=False)]
        return {as_text(a["flags"]): a["flags"] for a in found if "picked" in a and "flags" in a}

    def settings(self) -> dict[str, Flags]:
        """Return the settings that are known by now, by name."""
        search = self.question.search
        return self.question.named(self.picked().values()) if search else self.question.settings()

    def asked(self) -> list[tuple[Flags, int]]:
        """Return the runs that the question asks for by now, all settings of one seed first. A
        setting of a search gets its other seeds when its first run was whole."""
        first, *others = self.question.seeds
        settings = list(self.settings().values())
        if not self.question.search:
            return [(flags, seed) for seed in (first, *others) for flags in settings]
        whole, hopeless = (
            {as_text(t.user_attrs["flags"]) for t in self.trials() if t.state == state}
            for state in (TrialState.COMPLETE, TrialState.PRUNED)
        )
        good = [f for f in settings if as_text(f) in whole - hopeless]
        return [(f, first) for f in settings] + [(f, seed) for seed in others for f in good]

    def missing(self) -> list[tuple[Flags, int]]:
        """Return the runs that nobody has done or is to do."""
        there = {self.key(trial) for trial in self.trials()} | self.failed
        return [run for run in self.asked() if run_key(*run) not in there]

    def total(self) -> int:
        """Return how many runs there will be in all, at most."""
        to_pick = self.question.trials - len(self.picked()) if self._may_pick() else 0
        return len(self.asked()) + to_pick * len(self.question.seeds)

    # ---------------------------------------------------------------------------- taking runs

    def take(self) -> optuna.Trial | None:
        """Return a trial that from now on is this worker's; None if there is none to be had now.

        Optuna hands out waiting trials in the order of their numbers. So of two workers that want
        the same run at once, the one with the lower number has it before the other looks. From
        SQLite it can hand out one trial twice: workers that share the folder take turns.
        """
        with self.turn:
            self._free_the_dead()
            return self._take()

    def _take(self) -> optuna.Trial | None:
        while True:
            if not any(t.state == TrialState.WAITING and self._wants(t) for t in self.trials()):
                if missing := self.missing():
                    flags, seed = missing[0]
                    params = flags if self.question.search else {}
                    self.record.enqueue_trial(params, {"flags": flags, "seed": seed})
                elif not self._may_pick():
                    return None
            trial = self.record.ask(self.distributions)
            trial.set_user_attr("worker", self.name)
            self.say_alive(trial)
            if is_new := "seed" not in trial.user_attrs and self._may_pick():
                trial.set_user_attr("picked", True)
                trial.set_user_attr("flags", trial.params)
                trial.set_user_attr("seed", self.question.seeds[0])
            if self._wants(trial) and not self._is_twice(trial):
                self.doubles = 0
                return trial
            self.doubles += is_new
            self.give_up(trial.number)

    def finish(
        self, trial: optuna.Trial, rows: list[Row], ended: str, machine: str, best: Row | None
    ) -> None:
        """Put a finished run on record. One that diverged or was pruned counts as finished too, but
        its value does not."""
        for name, value in (("rows", rows), ("ended", ended), ("machine", machine)):
            trial.set_user_attr(name, value)
        if best is None or ended:
            self.record.tell(trial, state=TrialState.PRUNED)
        else:
            self.record.tell(trial, best[self.question.choose])

    def fail(self, trial: optuna.Trial) -> None:
        """Leave a run that failed here to others only."""
        self.failed.add(self.key(trial))
        self.give_up(trial.number)

    def give_up(self, number: int) -> None:
        """Leave a run to whoever comes next."""
        self.record.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def say_alive(self, trial: optuna.Trial) -> None:
        """Show workers elsewhere that the run of a trial is under way."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            trial.set_user_attr("heard", time.time())

    def _may_pick(self) -> bool:
        """Whether the search is to pick more settings."""
        is_open = bool(self.distributions) and self.doubles < DOUBLES
        return is_open and len(self.picked()) < self.question.trials

    def _wants(self, trial: FrozenTrial | optuna.Trial) -> bool:
        """Whether the question, as it stands now, asks for the run of a trial, and this worker has
        not failed at it."""
        key = self.key(trial)
        return key not in self.failed and key in {run_key(*run) for run in self.asked()}

    def _is_twice(self, trial: optuna.Trial) -> bool:
        """Whether an earlier trial is the same run."""
        key = self.key(trial)
        return any(t.number < trial.number and self.key(t) == key for t in self.trials())

    def _free_the_dead(self) -> None:
        """Free the runs of workers that have ended without a word, so that others go on."""
        for trial in self.record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self._is_dead(trial):
                self.give_up(trial.number)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        name = trial.user_attrs.get("worker", "")
        lock = self.workers / name
        if name == self.name:
            return False
        if name.startswith(f"{socket.gethostname()}.") and lock.exists():
            try:
                with FileLock(lock, timeout=0):
                    return True
            except Timeout:
                return False
        # Clocks of machines differ: what counts is for how long nothing new has come.
        now, said = time.monotonic(), trial.user_attrs.get("heard")
        before, since = self.heard.get(trial.number, (None, now))
        if trial.number not in self.heard or said != before:
            self.heard[trial.number] = (said, now)
            return False
        return now - since > SILENCE

    # ------------------------------------------------------------------------------- the answer

    def outcomes(self) -> list[Outcome]:
        """Return the finished runs that the question asks for."""
        names = {as_text(flags): name for name, flags in self.settings().items()}
        found = {}
        for trial in self.trials():
            key = self.key(trial)
            flags, seed = key  # type: ignore[misc]
            if trial.state.is_finished() and seed in self.question.seeds and flags in names:
                rows, ended, machine = (trial.user_attrs[k] for k in ("rows", "ended", "machine"))
                found[key] = Outcome(names[flags], seed, rows, ended, machine)
        return list(found.values())
