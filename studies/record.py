"""The record of a study, kept by Optuna: who does which run, and what came of it."""

import json
import socket
import time
import uuid
from pathlib import Path

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from callbacks.history import Row
from studies.answer import Outcome
from studies.question import Flags, Question, run_key

# A worker on another machine that has said nothing for so long is taken for dead. It says something
# once in `HEARTBEAT`. A dead worker on this machine is known at once, by its lock.
HEARTBEAT, SILENCE = 30.0, 300.0  # seconds


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
        return JournalStorage(JournalFileBackend(path))
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
        self.failed: set[tuple[str, int] | None] = set()
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
        return [t for t in found if t.state != TrialState.FAIL and self.key(t)]

    @staticmethod
    def key(trial: FrozenTrial | optuna.Trial) -> tuple[str, int] | None:
        """Return what no two runs have in common, if the trial is one already."""
        attrs = trial.user_attrs
        return run_key(attrs["flags"], attrs["seed"]) if "seed" in attrs else None

    def settings(self) -> dict[str, Flags]:
        """Return the settings that are known by now, by name."""
        if not self.question.search:
            return self.question.settings()
        picked = {self.key(t)[0]: t.user_attrs["flags"] for t in self.trials()}  # type: ignore[index]
        return self.question.named(list(picked.values()))

    def missing(self) -> list[tuple[Flags, int]]:
        """Return the runs that nobody has done or is to do, all settings of one seed first."""
        trials = self.trials()
        there = {self.key(trial) for trial in trials}
        if self.question.search:  # a setting that was not given up gets the other seeds too
            settings = [t.user_attrs["flags"] for t in trials if t.state == TrialState.COMPLETE]
        else:
            settings = list(self.settings().values())
        runs = {run_key(f, seed): (f, seed) for seed in self.question.seeds for f in settings}
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
            if self.key(trial) and not self._is_twice(trial) and self._is_asked(trial):
                return trial
            self.give_up(trial)

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

    def give_up(self, trial: optuna.Trial) -> None:
        """Leave a run to whoever comes next."""
        self.record.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def fail(self, trial: optuna.Trial) -> None:
        """Leave a run that failed here to others only."""
        self.failed.add(self.key(trial))
        self.give_up(trial)

    def _is_twice(self, trial: optuna.Trial) -> bool:
        """Whether another worker wanted the same run at the same moment: the earlier one counts."""
        key = self.key(trial)
        return any(t.number < trial.number and self.key(t) == key for t in self.trials())

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
            flags, seed = self.key(trial)  # type: ignore[misc]
            if trial.state.is_finished() and seed in self.question.seeds and flags in names:
                attrs = trial.user_attrs
                found.append(
                    Outcome(names[flags], seed, attrs["rows"], attrs["ended"], attrs["machine"])
                )
        return found
