"""The runs of a study in Optuna's storage: its queue and its record.

A run is a trial. Its user attributes are its `flags`, its `seed`, the `worker` that took it, and in
the end its `record`. Of several trials for one run the first counts, so two workers that enqueue
the same one at once do no harm.
"""

import contextlib
import datetime
import json
import re
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from studies.question import Flags, Question, as_text, planned
from studies.record import Plan, Record, best_of, other_code

HEARTBEAT = 60  # seconds; a worker elsewhere that is silent for twice as long is taken for dead
DOUBLES = 20  # a search that picks known settings so often in a row has picked them all
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

Key = tuple[str, int]  # the flags of a run, as text, and its seed: what no two runs share


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


class Queue:
    """The runs that a question asks for: those that are done, under way, and missing.

    Args:
        question: Says what runs there are.
        plans: Those of its settings by name, as `check` returns them.
        folder: The study's.
        storage: As `open_storage` takes it.
        any_code: Whether runs by other code count too.

    """

    def __init__(
        self,
        question: Question,
        plans: dict[str, Plan],
        folder: Path,
        storage: str | None,
        any_code: bool,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", r"Heartbeat of storage is supposed to be used with")
        self.question, self.plans, self.any_code = question, plans, any_code
        self.space = question.distributions()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # two that make the tables at once get in each other's way
            self.storage = open_storage(storage or f"journal:{folder / 'journal.log'}")
            self.study = optuna.create_study(
                study_name=folder.name,
                storage=self.storage,
                direction="maximize" if question.choose.endswith("acc") else "minimize",
                sampler=question.sampler or TPESampler(constant_liar=True),  # minds what runs
                pruner=question.pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        self.failed: set[Key] = set()  # here
        self.left_out: dict[Key, list[str]] = {}  # as other code did them: what of it is other
        self.doubles = 0
        self.lock = threading.RLock()
        self.workers = folder / ".workers"
        self.name = f"{socket.gethostname()}.{uuid.uuid4().hex[:12]}"

    # ------------------------------------------------------------------------- what there is

    def plan(self, flags: Flags, seed: int) -> Plan:
        """Return what a run is."""
        name = self.question.name_of(flags)
        with self.lock:
            if name not in self.plans:  # picked by a search
                self.plans[name] = planned(self.question, flags)
        return self.plans[name].of(seed, "split" in self.question.vary)

    def settings(self) -> dict[str, Flags]:
        """Return the settings that are known by now, by name."""
        if not self.space:
            return self.question.settings()
        found = [trial.user_attrs.get("flags", {}) for trial in self.study.get_trials(False)]
        return self.question.named(flags for flags in found if flags.keys() == self.space.keys())

    def _asked(self) -> list[Key]:
        """Return the runs that the question asks for by now, all settings of one seed first. A
        setting of a search gets its other seeds when its first run was whole."""
        first, *others = self.question.seeds
        settings = good = [as_text(flags) for flags in self.settings().values()]
        if self.space:
            whole = {key_of(t) for t in self.study.get_trials(False, (TrialState.COMPLETE,))}
            good = [text for text in settings if (text, first) in whole]
        return [(text, first) for text in settings] + [(t, s) for s in others for t in good]

    def runs(self) -> dict[Key, FrozenTrial | None]:
        """Return all runs that the question asks for by now, each with the trial that counts."""
        found: dict[Key, FrozenTrial | None] = dict.fromkeys(self._asked())
        for trial in self.study.get_trials(deepcopy=False):
            key, record = key_of(trial), trial.user_attrs.get("record")
            if key in found and found[key] is None and trial.state != TrialState.FAIL:
                text, seed = key
                if record is None or self.counts(record, self.plan(json.loads(text), seed)):
                    found[key] = trial
        return found

    def counts(self, record: Record, plan: Plan) -> bool:
        """Return whether a run that was done is the one of a plan, and by the same code."""
        changed = other_code(record) if plan.is_of(record) and not self.any_code else []
        if changed:
            self.left_out[as_text(record["flags"]), record["seed"]] = changed
        return plan.is_of(record) and not changed

    def records(self) -> list[tuple[str, Record]]:
        """Return the finished runs with the names of their settings, in the question's order."""
        names = {as_text(flags): name for name, flags in self.settings().items()}
        done = {key: trial.user_attrs["record"] for key, trial in self.runs().items()
                if trial and "record" in trial.user_attrs}  # fmt: skip
        seeds = sorted(self.question.seeds)
        return [(names[t], done[t, s]) for t in names for s in seeds if (t, s) in done]

    def total(self) -> int:
        """Return how many runs there will be in all, at most."""
        to_pick = self.question.trials - len(self.settings()) if self._may_pick() else 0
        return len(self._asked()) + to_pick * len(self.question.seeds)

    def take_over(self, records: list[Record]) -> int:
        """Put runs that were done elsewhere on record, as far as the question asks for them and
        they are not done here; return how many."""
        picked = (r for r in records if r["flags"].keys() == self.space.keys())
        keys = {(as_text(record["flags"]), record["seed"]) for record in picked}
        done, taken = self.runs(), 0
        for text, seed in keys if self.space else done:
            flags, there = json.loads(text), done.get((text, seed))
            plan = self.plan(flags, seed)
            same = [record for record in records if self.counts(record, plan)]
            if not same or (there and "record" in there.user_attrs):
                continue
            record = {**same[0], "flags": flags}
            best = best_of(record, self.question.choose)
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

    # ---------------------------------------------------------------------------- taking runs

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Show other workers on this machine that this one is alive, by a lock."""
        self.workers.mkdir(exist_ok=True)
        with FileLock(self.workers / self.name):
            yield
        (self.workers / self.name).unlink(missing_ok=True)

    def take(self) -> optuna.Trial | None:
        """Return a trial that from now on is this worker's; None if there is none to be had now."""
        with self.lock:
            while True:
                self._free_the_dead()
                runs, states = self.runs(), set()
                for (text, seed), trial in runs.items():
                    if trial is None and (text, seed) not in self.failed:
                        flags = json.loads(text)
                        params = flags if self.space else {}
                        self.study.enqueue_trial(params, {"flags": flags, "seed": seed})
                        states.add(TrialState.WAITING)
                    elif trial is not None:
                        states.add(trial.state)
                if TrialState.WAITING not in states and not self._may_pick():
                    return None
                ours = self.study.ask(self.space)
                if self._accepts(ours):
                    return ours
                self.study.tell(ours, state=TrialState.FAIL)

    def _accepts(self, trial: optuna.Trial) -> bool:
        """Whether a trial is a run to do; a new one of a search becomes one."""
        trial.set_user_attr("worker", self.name)
        if "seed" not in trial.user_attrs:
            is_known = trial.params in self.settings().values()
            self.doubles = self.doubles + 1 if is_known else 0
            if is_known or not self._may_pick():
                return False
            trial.set_user_attr("flags", trial.params)
            trial.set_user_attr("seed", self.question.seeds[0])
        first = self.runs().get(key_of(trial))
        return first is not None and first.number == trial.number

    def _may_pick(self) -> bool:
        """Whether the search is to pick more settings."""
        is_open = bool(self.space) and self.doubles < DOUBLES
        return is_open and len(self.settings()) < self.question.trials

    def are_others_at_work(self) -> bool:
        """Whether runs are under way, which others may leave to this worker if they die."""
        return any(trial and trial.state == TrialState.RUNNING for trial in self.runs().values())

    def say_alive(self, trial: optuna.Trial) -> None:
        """Show workers on other machines that a trial is under way."""
        if isinstance(self.storage, RDBStorage):
            self.storage.record_heartbeat(trial._trial_id)

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


def key_of(trial: FrozenTrial | optuna.Trial) -> Key:
    """Return which run a trial is; one that no question asks for if it is none yet."""
    attrs = trial.user_attrs
    return as_text(attrs.get("flags")), attrs.get("seed", -1)
