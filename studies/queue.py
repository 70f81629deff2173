"""The runs of a study in Optuna's storage: its queue and its record.

A run is a trial. Its user attributes are its `flags`, its `seed`, the `worker` that took it, and in
the end its `record`. Of several trials for one run the first counts, so two workers that enqueue
the same one at once do no harm.
"""

import contextlib
import datetime
import itertools
import re
import threading
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from studies.question import Flags, Question, planned
from studies.record import Plan, Record, best_of, other_code

HEARTBEAT = 60  # seconds; a worker elsewhere that is silent for twice as long is taken for dead
DOUBLES = 20  # a search that picks known settings so often in a row has picked them all
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

Key = tuple[str, int]  # the name of a run's setting and its seed: what no two runs share


def without_password(text: str) -> str:
    """Return a text without the passwords of its URLs."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]+@", r"\1:...@", text)


def is_free(lock: Path) -> bool:
    """Return whether no process holds a lock; the system frees it when its holder dies."""
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open `journal:FILE` or a database.

    Raises:
        MisconfigurationException: It can't be opened.
    """
    try:
        if url.startswith("sqlite:"):  # its transactions don't keep two workers apart
            raise ValueError("SQLite can hand one run to two workers: use journal:FILE")
        if url.startswith("journal:"):
            return JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        return RDBStorage(url, heartbeat_interval=HEARTBEAT)
    except (*STORAGE_ERRORS, ImportError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(without_password(f"storage {url}: {reason}")) from error


@dataclass
class Queue:
    """The runs that a question asks for: those that are done, under way, and missing."""

    question: Question
    plans: dict[str, Plan]  # of its settings by name, as `check` returns them
    folder: Path  # of the study
    url: str | None  # of the storage, as `open_storage` takes it; None: a journal in the folder
    any_code: bool  # whether runs by other code count too

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", r"Heartbeat of storage is supposed to be used with")
        question, folder, self.workers = self.question, self.folder, self.folder / ".workers"
        self.space = question.distributions()
        self.workers.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # two that make the tables at once get in each other's way
            self.study = optuna.create_study(
                study_name=folder.name,
                storage=open_storage(self.url or f"journal:{folder / 'journal.log'}"),
                direction="maximize" if question.choose.endswith("acc") else "minimize",
                # Its default ignores the settings that other workers are trying.
                sampler=question.sampler or optuna.samplers.TPESampler(constant_liar=True),
                pruner=question.pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        self.failed: set[Key] = set()  # here
        self.left_out: dict[Key, list[str]] = {}  # as other code did them: what of it is other
        self.doubles = 0
        self.lock = threading.RLock()
        self.name = uuid.uuid4().hex
        self.at_work = FileLock(self.workers / self.name)  # free when this worker is dead

    def settings(self, more: Iterable[Flags] = ()) -> dict[str, Flags]:
        """Return the settings that are known by now, by name; of a search also those among more
        that it can have picked."""
        if not self.space:
            return self.question.settings()
        known = [trial.user_attrs.get("flags", {}) for trial in self.study.get_trials(False)]
        flags = itertools.chain(known, more)
        return self.question.named(f for f in flags if f.keys() == self.space.keys())

    def key_of(self, trial: FrozenTrial | optuna.Trial) -> Key:
        """Return which run a trial is; one that no question asks for if it is none yet."""
        flags = trial.user_attrs.get("flags", {})
        return self.question.name_of(flags), trial.user_attrs.get("seed", -1)

    def plan(self, flags: Flags, seed: int) -> Plan:
        """Return what a run is."""
        name = self.question.name_of(flags)
        with self.lock:
            if name not in self.plans:  # picked by a search
                self.plans[name] = planned(self.question, flags)
        return self.plans[name].of(seed, "split" in self.question.vary)

    def runs(self) -> dict[Key, FrozenTrial | None]:
        """Return all runs that the question asks for by now, each with the trial that counts: all
        settings of one seed first. A setting of a search gets its other seeds when its first run
        was whole."""
        settings, first = self.settings(), self.question.seeds[0]
        trials = self.study.get_trials(deepcopy=False)
        whole = {self.key_of(trial) for trial in trials if trial.state == TrialState.COMPLETE}
        found: dict[Key, FrozenTrial | None] = {
            (name, seed): None
            for seed, name in itertools.product(self.question.seeds, settings)
            if seed == first or not self.space or (name, first) in whole
        }
        for trial in trials:
            key, record = self.key_of(trial), trial.user_attrs.get("record")
            is_open = key in found and found[key] is None and trial.state != TrialState.FAIL
            if is_open and (not record or self._counts(record, settings[key[0]], key[1])):
                found[key] = trial
        return found

    def _counts(self, record: Record, flags: Flags, seed: int) -> bool:
        """Return whether a run that was done is the one with these flags, and by the same code."""
        if not self.plan(flags, seed).is_of(record):
            return False
        key, changed = (self.question.name_of(flags), seed), other_code(record)
        if changed and not self.any_code:
            self.left_out[key] = changed
            return False
        self.left_out.pop(key, None)
        return True

    def records(self) -> dict[Key, Record]:
        """Return the records of the runs that are done, setting by setting."""
        found = {key: trial.user_attrs.get("record") for key, trial in self.runs().items() if trial}
        order = itertools.product(self.settings(), sorted(self.question.seeds))
        return {key: record for key in order if (record := found.get(key))}

    def total(self) -> int:
        """Return how many runs there will be in all, at most."""
        to_pick = self.question.trials - len(self.settings()) if self._may_pick() else 0
        return len(self.runs()) + to_pick * len(self.question.seeds)

    def take_over(self, records: list[Record]) -> int:
        """Put runs that were done elsewhere on record, as far as the question asks for them and
        they are not done here; return how many."""
        settings, done = self.settings(r["flags"] for r in records), self.records()
        taken = 0
        for (name, flags), seed in itertools.product(settings.items(), self.question.seeds):
            same = [record for record in records if self._counts(record, flags, seed)]
            if not same or (name, seed) in done:
                continue
            record = same[0] | {"flags": flags}
            best = best_of(record, self.question.choose)
            with contextlib.suppress(ValueError):  # outside of the ranges of this question
                trial = optuna.create_trial(
                    state=TrialState.PRUNED if record["ended"] else TrialState.COMPLETE,
                    value=best[self.question.choose] if best else None,
                    params=flags if self.space else {},
                    distributions=self.space,
                    user_attrs={"flags": flags, "seed": seed, "record": record},
                )
                self.study.add_trial(trial)
                taken += 1
        return taken

    def take(self) -> optuna.Trial | None:
        """Return a trial that from now on is this worker's; None if there is none to be had now."""
        with self.lock:
            while True:
                self._free_the_dead()
                settings, runs = self.settings(), self.runs()
                missing = [k for k, trial in runs.items() if not trial and k not in self.failed]
                for name, seed in missing:
                    params = settings[name] if self.space else {}
                    self.study.enqueue_trial(params, {"flags": settings[name], "seed": seed})
                states = {trial.state for trial in runs.values() if trial}
                if not (missing or TrialState.WAITING in states or self._may_pick()):
                    return None
                trial = self.study.ask(self.space)
                if self._accepts(trial):
                    return trial
                self.study.tell(trial, state=TrialState.FAIL)

    def _accepts(self, trial: optuna.Trial) -> bool:
        """Return whether a trial is a run to do; a new one of a search becomes one."""
        trial.set_user_attr("worker", self.name)
        if "seed" not in trial.user_attrs:
            is_known = trial.params in self.settings().values()
            self.doubles = self.doubles + 1 if is_known else 0
            if is_known or not self._may_pick():
                return False
            trial.set_user_attr("flags", trial.params)
            trial.set_user_attr("seed", self.question.seeds[0])
        first = self.runs().get(self.key_of(trial))
        return first is not None and first.number == trial.number

    def _may_pick(self) -> bool:
        """Return whether the search is to pick more settings."""
        is_open = bool(self.space) and self.doubles < DOUBLES
        return is_open and len(self.settings()) < self.question.trials

    def _free_the_dead(self) -> None:
        """Free the runs of workers that have ended without a word."""
        optuna.storages.fail_stale_trials(self.study)  # of a database, by its heartbeats
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker, now = trial.user_attrs.get("worker"), datetime.datetime.now()
            # One that was killed between taking a trial and putting its name to it has no name.
            is_dead = now - (trial.datetime_start or now) > datetime.timedelta(minutes=1)
            if worker is not None:
                lock = self.workers / worker
                is_dead = worker != self.name and lock.exists() and is_free(lock)
            if is_dead:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
