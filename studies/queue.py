"""The queue and the record of a study's runs, in Optuna's storage.

A run is a trial. Its user attributes are its `flags`, its `seed`, the `worker` that took it and,
once it has ended, its `record`. If a run has several trials, the first counts, so two workers may
enqueue the same run at once.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import re
import threading
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, TrialState

from runs import ranked, write_whole
from studies.question import Flags, Question, planned
from studies.record import Plan, Record, best_of, other_code, rows_of

HEARTBEAT = 60  # seconds; a remote worker that is silent for twice as long is presumed dead
DRAWS = 10_000  # at random; if all are known settings, the search is exhausted
PRUNED = TrialState.PRUNED
# Reasons not to count a run.
SETTINGS, CODE = "have different settings", "were made by different code"
STORAGE_ERRORS = (
    sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, json.JSONDecodeError,
)  # fmt: skip

Key = tuple[str, int]  # a run's setting by name, and its seed; unique


def without_password(text: str) -> str:
    """Mask the passwords in a text's URLs."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]+@", r"\1:...@", text)


def is_free(lock: Path) -> bool:
    """Return whether no process holds a lock; the OS releases it when its holder dies."""
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open `journal:FILE` or a database."""
    if url.startswith("sqlite:"):  # its transactions don't isolate two workers
        raise ValueError("SQLite can hand one run to two workers: use journal:FILE")
    if url.startswith("journal:"):
        path = url.removeprefix("journal:")
        _mend(Path(path), lock := JournalFileOpenLock(path))
        return JournalStorage(JournalFileBackend(path, lock))
    return RDBStorage(url, heartbeat_interval=HEARTBEAT)


def _mend(journal: Path, lock: JournalFileOpenLock) -> None:
    """Cut off an incomplete last line, which a full disk leaves in a journal."""
    with get_lock_file(lock):
        content = journal.read_bytes() if journal.exists() else b""
        if content and not content.endswith(b"\n"):
            write_whole(journal, content[: content.rfind(b"\n") + 1])


@dataclass
class Queue:
    """The runs that a question asks for: done, running and missing."""

    question: Question
    plans: dict[str, Plan]  # by setting, as `check` returns them
    folder: Path  # of the study
    url: str | None  # of the storage, for `open_storage`; None: a journal in the folder
    any_code: bool  # whether runs by other code count

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", r"Heartbeat of storage is supposed to be used with")
        question, folder, self.space = self.question, self.folder, self.question.distributions()
        url, name = self.url or f"journal:{folder / 'journal.log'}", folder.name
        if self.space or question.pruner:  # they learn from all runs, so all must be comparable
            basis = list(map(vars, self.plans.values()))
            if not self.space:  # a new value keeps the existing runs
                basis = [{"images": basis[0]["images"], "device": basis[0]["device"]}]
                basis += [
                    {file: Path(file).read_text(encoding="utf-8")} for file in question.files()
                ]
            identity = [question.choose, question.fixed, basis]
            name += f" {hashlib.sha256(repr(identity).encode()).hexdigest()[:8]}"
        # Beside a journal, which may be on a disk that several machines share.
        place = Path(url.removeprefix("journal:")).parent if url.startswith("journal:") else folder
        self.workers, self.turn = place / ".workers", place / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.workers.mkdir(exist_ok=True)
            with FileLock(self.turn):  # two workers can't create the tables at once
                storage = open_storage(url)
        except (*STORAGE_ERRORS, ImportError, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise MisconfigurationException(without_password(f"storage {url}: {reason}")) from error
        with FileLock(self.turn):
            self.study = optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize" if question.choose.endswith("acc") else "minimize",
                # By default, TPE ignores the settings that other workers are trying.
                sampler=question.sampler or optuna.samplers.TPESampler(constant_liar=True),
                pruner=question.pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        self.tried: set[Key] = set()  # by this worker, which repeats no run
        self.failed: set[Key] = set()  # of those tried
        # What differs in finished runs that don't count, or are by other code.
        self.others: dict[str, dict[Key, list[str]]] = {SETTINGS: {}, CODE: {}}
        self.has_all = False  # whether the search is exhausted
        self.lock = threading.RLock()
        self.name = uuid.uuid4().hex
        self.at_work = FileLock(self.workers / self.name)  # released when this worker dies

    def settings(self, more: Iterable[Flags] = ()) -> dict[str, Flags]:
        """Return the settings known so far by name; for a search, also those in `more` that it
        could have picked."""
        if not self.space:
            return self.question.settings()
        known = [trial.user_attrs.get("flags", {}) for trial in self.study.get_trials(False)]
        flags = itertools.chain(known, more)
        return self.question.named(f for f in flags if f.keys() == self.space.keys())

    def key_of(self, trial: FrozenTrial | optuna.Trial) -> Key:
        """Return a trial's run; if it has none yet, one that no question asks for."""
        flags = trial.user_attrs.get("flags", {})
        return self.question.name_of(flags), trial.user_attrs.get("seed", -1)

    def plan(self, flags: Flags, seed: int) -> Plan:
        """Return the plan of a run."""
        name = self.question.name_of(flags)
        with self.lock:
            if name not in self.plans:  # picked by a search
                self.plans[name] = planned(self.question, flags)
        return self.plans[name].of(seed, "split" in self.question.vary)

    def runs(self) -> dict[Key, FrozenTrial | None]:
        """Return all runs that the question asks for so far, seed by seed, each with the trial that
        counts. A setting of a search gets its other seeds once its first run is complete."""
        settings, first = self.settings(), self.question.seeds[0]
        trials = self.study.get_trials(deepcopy=False)
        complete = {self.key_of(trial) for trial in trials if trial.state == TrialState.COMPLETE}
        runs: dict[Key, FrozenTrial | None] = {
            (name, seed): None
            for seed, name in itertools.product(self.question.seeds, settings)
            if seed == first or not self.space or (name, first) in complete
        }
        ranks: dict[Key, float] = dict.fromkeys(runs, 0)
        for trial in trials:
            key, record = self.key_of(trial), trial.user_attrs.get("record")
            if key in runs and trial.state != TrialState.FAIL:
                rank = self._rank(record, settings[key[0]], key[1]) if record else 0.5
                if rank > ranks[key]:
                    runs[key], ranks[key] = trial, rank
        return runs

    def _rank(self, record: Record, flags: Flags, seed: int) -> int:
        """Return 2 if a finished run has these flags and the same code, 1 if it counts despite
        other code, 0 if it does not count."""
        is_pruned = record["ended"].startswith("pruned") and not self.question.pruner
        settings = self.plan(flags, seed).differs(record) or (["pruner"] if is_pruned else [])
        code = other_code(record)
        if settings or code:
            others = self.others[SETTINGS if settings else CODE]
            others[self.question.name_of(flags), seed] = settings or code
        return 0 if settings else int(self.any_code) if code else 2

    def other(self) -> list[str]:
        """Say how many finished runs do not count for this answer, and why."""
        self.others[SETTINGS] = {}  # drop those that `take_over` tried and rejected
        done, messages = self.records(), []
        for words, others in self.others.items():
            uncounted = {key: names for key, names in others.items() if key not in done}
            if uncounted:
                names = sorted(set[str]().union(*uncounted.values()))
                more = ", ..." if len(names) > 4 else ""
                messages.append(f"{len(uncounted)} runs {words} ({', '.join(names[:4])}{more})")
        return messages

    def records(self) -> dict[Key, Record]:
        """Return the records of the finished runs, setting by setting."""
        done = {key: trial.user_attrs.get("record") for key, trial in self.runs().items() if trial}
        order = itertools.product(self.settings(), sorted(self.question.seeds))
        return {key: record for key in order if (record := done.get(key))}

    def total(self) -> int:
        """Return the maximum total number of runs."""
        runs, settings, seeds = self.runs(), len(self.settings()), self.question.seeds
        if not self.space:
            return len(runs)
        pruned = [t for (_, s), t in runs.items() if s == seeds[0] and t and t.state == PRUNED]
        settings = self.question.trials if self._may_pick() else settings
        return settings * len(seeds) - len(pruned) * (len(seeds) - 1)

    def take_over(self, records: list[Record]) -> int:
        """Record those runs done elsewhere that the question asks for and that are not done here;
        return how many."""
        settings, done = self.settings(r["flags"] for r in records), self.records()
        taken = 0
        for (name, flags), seed in itertools.product(settings.items(), self.question.seeds):
            candidates = [record for record in records if record["seed"] == seed]
            ranks = [self._rank(record, flags, seed) for record in candidates]
            if not any(ranks) or (name, seed) in done:
                continue
            record = candidates[ranks.index(max(ranks))] | {"flags": flags}
            best, choose = best_of(record, self.question.choose), self.question.choose
            rows = ranked(rows_of(record), choose, "")
            with contextlib.suppress(ValueError):  # outside this question's ranges
                trial = optuna.create_trial(
                    state=TrialState.PRUNED if record["ended"] else TrialState.COMPLETE,
                    value=best[choose] if best else None,
                    intermediate_values={int(row["epoch"]): row[choose] for row in rows},
                    params=flags if self.space else {},
                    distributions=self.space,
                    user_attrs={"flags": flags, "seed": seed, "record": record},
                )
                self.study.add_trial(trial)
                taken += 1
        return taken

    def take(self) -> optuna.Trial | None:
        """Claim a trial for this worker; return None if none is available now."""
        with self.lock, FileLock(self.turn):  # workers here don't pick the same setting at once
            while True:
                self._free_the_dead()
                settings, runs = self.settings(), self.runs()
                missing = [k for k, trial in runs.items() if not trial and k not in self.tried]
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
        """Return whether to run a trial; a search's new trial is first assigned a run."""
        trial.set_user_attr("worker", self.name)
        if "seed" not in trial.user_attrs:
            flags, known = self._flags(trial.params), [*self.settings().values()]
            if not self._may_pick():
                return False
            if flags in known:  # TPE may repeat its favourite forever
                random = optuna.create_study(sampler=optuna.samplers.RandomSampler(len(known)))
                picks = (random.ask(self.space).params for _ in range(DRAWS))
                other = next((pick for pick in picks if self._flags(pick) not in known), None)
                self.has_all = other is None
                if other:
                    self.study.enqueue_trial(other)
                return False
            trial.set_user_attr("flags", flags)
            trial.set_user_attr("seed", self.question.seeds[0])
        first = self.runs().get(self.key_of(trial))
        is_accepted = first is not None and first.number == trial.number
        if is_accepted:
            self.tried.add(self.key_of(trial))
        return is_accepted

    def _flags(self, params: dict[str, Any]) -> Flags:
        """Return the parameters that a search picked, as flags."""
        return {flag: self._rounded(flag, value) for flag, value in params.items()}

    def _rounded(self, flag: str, value: Any) -> Any:
        """Return a value that a search picked, a float rounded to four significant digits, as in
        its setting's name."""
        space = self.space[flag]
        if not isinstance(space, optuna.distributions.FloatDistribution):
            return value
        return min(max(float(f"{value:.4g}"), space.low), space.high)

    def _may_pick(self) -> bool:
        """Return whether the search may pick more settings."""
        is_open = bool(self.space) and not self.has_all
        return is_open and len(self.settings()) < self.question.trials

    def _free_the_dead(self) -> None:
        """Release the runs of workers that died."""
        optuna.storages.fail_stale_trials(self.study)  # in a database, by heartbeat
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        locks = (lock for lock in self.workers.iterdir() if lock.name != self.name)
        dead = {lock.name for lock in locks if is_free(lock)}
        for trial in running:
            now = datetime.datetime.now()
            # A worker killed right after taking a trial hasn't put its name on it.
            is_old = now - (trial.datetime_start or now) > datetime.timedelta(minutes=1)
            if trial.user_attrs["worker"] in dead if "worker" in trial.user_attrs else is_old:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
