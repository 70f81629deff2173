"""Executes a study: each run is a `train.py` process with its share of the machine."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import TrialState

import runs
from studies.question import Flags
from studies.queue import Queue, is_free
from studies.record import Plan, best_of, finished, other_code, read_run, rows_of

TRAIN = Path(__file__).parents[1] / "train.py"


def shares(jobs: int) -> list[tuple[str | None, int]]:
    """Return each job's GPU, None if there are none, and its number of cores."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    numbers = visible.split(",") if visible else [str(i) for i in range(count)]
    gpus: Sequence[str | None] = numbers[:count] or [None]
    return [(gpus[i % len(gpus)], max(1, cores // jobs)) for i in range(jobs)]


@dataclass
class Work:
    """Executes the runs of a queue, several at a time."""

    queue: Queue
    stopped: int = 0  # the signal that stopped it
    is_urgent: bool = False  # whether it came twice

    def __post_init__(self) -> None:
        self.question, self.folder = self.queue.question, self.queue.folder
        self.code = runs.code_version()
        self.seconds: list[float] = []  # of the runs that this worker recorded

    def do_all(self, jobs: int) -> None:
        """Execute all missing runs; other workers may execute some at the same time.

        Raises:
            SystemExit: Ctrl-C or SIGTERM stopped it.
        """
        total, done = self.queue.total(), len(self.queue.records())
        print(
            f"{total} runs in {self.folder}: {done} done, {total - done} to do, {jobs} at a time",
            flush=True,
        )
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            stack.enter_context(self.queue.at_work)
            pool = stack.enter_context(ThreadPoolExecutor(jobs))
            started = [pool.submit(self._do_some, *share) for share in shares(jobs)]
        for job in started:
            job.result()
        if self.stopped:
            print("stopped; run the same command to resume", file=sys.stderr)
            sys.exit(128 + self.stopped)

    def _stop(self, number: int, _frame: Any = None) -> None:
        """On a signal, make every thread stop its run and take no other; on a second one, kill
        the runs."""
        self.is_urgent, self.stopped = bool(self.stopped), number

    def _do_some(self, gpu: str | None, threads: int) -> None:
        """Execute runs on a share of this machine until none is left."""
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        study = self.queue.study
        try:
            while not self.stopped:
                if trial := self.queue.take():
                    state, value = TrialState.FAIL, None
                    # Another worker takes over a run whose heartbeat has stopped.
                    lost = contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError)
                    with lost, get_heartbeat_thread(trial._trial_id, study._storage):
                        state, value = self._do(trial, env)
                    study.tell(trial, value, state, skip_if_finished=True)
                elif any(t and t.state == TrialState.RUNNING for t in self.queue.runs().values()):
                    time.sleep(2)  # this worker takes over the runs of others that die
                else:
                    return
        except BaseException:
            self._stop(signal.SIGTERM)  # stop the other threads too
            raise

    def _do(self, trial: optuna.Trial, env: dict[str, str]) -> tuple[TrialState, float | None]:
        """Execute and record a run; return how it ended."""
        name, seed = self.queue.key_of(trial)
        flags, choose = self.queue.settings()[name], self.question.choose
        folder = self.question.folder_of(flags, seed)
        try:
            plan = self.queue.plan(flags, seed)  # raises if a search picked what can't be run
            kept, ended = self._train(trial, flags, plan, env)
        except MisconfigurationException as error:
            self.queue.failed.add((name, seed))
            self._say(folder, f"failed: {error}")
            return TrialState.FAIL, None
        if self.stopped:
            return TrialState.FAIL, None
        record = finished(kept, plan, flags, choose, ended)
        best, outcome = best_of(record, choose), record["ended"]
        seconds = sum(row["seconds"] for row in rows_of(record))
        result: tuple[TrialState, float | None] = TrialState.PRUNED, None
        if best and not outcome:
            result = TrialState.COMPLETE, best[choose]
            value = f"{best[choose]:.2%}" if choose.endswith("acc") else f"{best[choose]:.4f}"
            test = f", test/acc {best['test/acc']:.2%}" if "test/acc" in best else ""
            outcome = f"{choose} {value} in epoch {best['epoch']:.0f}{test}, {seconds:.0f} s"
        with self.queue.lock:  # so that the printed counts rise in order
            self.seconds.append(seconds)
            trial.set_user_attr("record", record)
            self._say(folder, outcome)
        return result

    def _train(
        self, trial: optuna.Trial, flags: Flags, plan: Plan, env: dict[str, str]
    ) -> tuple[Path | None, str]:
        """Start a run, or resume it from its last checkpoint, unless it has ended; return its
        folder, if it has one, and why it ended early, if it did.

        Raises:
            MisconfigurationException: The run failed.
        """
        seed = plan.settings["seed_everything"]
        parent = self.folder / self.question.folder_of(flags, seed)
        parent.mkdir(parents=True, exist_ok=True)
        has_warned = False
        while not all(map(is_free, parent.glob("version_*/.lock"))):
            if self.stopped:
                return None, ""
            if not has_warned:
                print(
                    f"waiting for {parent}: its study was killed, but the run continues", flush=True
                )
            has_warned = True
            time.sleep(0.5)
        kept = _kept(parent, plan)
        if kept and _has_ended(kept):
            if self.question.pruner:
                self._report(trial, kept, -1)
            return kept, ""
        command = self.question.command(flags, seed, self.folder)
        step, checkpoint = runs.newest(kept / "checkpoints") if kept else (-1, parent)
        if step >= 0:
            root = [word for word in command if word.startswith("--data.root=")]
            command = ["fit", f"--ckpt_path={checkpoint}", *root]
        code, ended, last = self._run(trial, command, parent, plan, env)
        kept = _kept(parent, plan)
        if ended and not kept and not self.code.items() <= runs.code_version().items():
            raise MisconfigurationException("the code changed while it ran")
        if not (ended or self.stopped) and (code or not kept or not _has_ended(kept)):
            reason = f"exit code {code}" if code < 0 else last.removeprefix("error: ")
            reason = reason if code else "the code or the recipe changed while it ran"
            raise MisconfigurationException(f"{reason}, see {parent / 'fit.log'}")
        return kept, ended

    def _run(
        self, trial: optuna.Trial, command: list[str], parent: Path, plan: Plan, env: dict[str, str]
    ) -> tuple[int, str, str]:
        """Run `train.py`; return its exit code, why it ended early if it diverged or was pruned,
        and the last line that it printed."""
        first = self.question.seeds[0]
        # A search prunes only a setting's first run: if it survives, the other seeds run in full.
        is_first = not self.queue.space or plan.settings["seed_everything"] == first
        is_watched = bool(self.question.pruner) and is_first
        last_epoch = plan.settings["trainer"]["max_epochs"] - 1
        reported, ended, log = -1, "", parent / "fit.log"
        with log.open("ab") as output:
            offset = output.tell()
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *command],
                env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            while process.poll() is None:
                if self.stopped:
                    process.kill() if self.is_urgent else process.terminate()
                elif is_watched and not ended and (kept := _kept(parent, plan)):
                    reported = self._report(trial, kept, reported)
                    if 0 <= reported < last_epoch and trial.should_prune():
                        ended = f"pruned after epoch {reported}"
                        process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1.0)
        finally:
            process.terminate()  # if the storage or the pruner failed; a no-op if it ended
        text = log.read_bytes()[offset:].decode(errors="replace")
        last = text.strip().rpartition("\n")[2]
        diverged = re.search(r"error: training (diverged.*?), at ", last)
        return process.returncode, diverged[1] if diverged else ended, last

    def _report(self, trial: optuna.Trial, kept: Path, after: int) -> int:
        """Report a run's epochs later than `after` to the pruner; return the last one."""
        for row in rows_of(read_run(kept)):
            if row["epoch"] > after and self.question.choose in row:
                after = int(row["epoch"])
                trial.report(row[self.question.choose], after)
        return after

    def _say(self, name: str, outcome: str) -> None:
        """Print how a run ended, how many of all have ended, and about how long the rest takes."""
        count, total = len(self.queue.records()), self.queue.total()
        rest = ""
        if self.seconds and count < total:
            states = [trial.state for trial in self.queue.runs().values() if trial]
            seconds = sum(self.seconds) / len(self.seconds) * (total - count)
            minutes = seconds / max(1, states.count(TrialState.RUNNING)) / 60
            rest = f"; {total - count} left, about {math.ceil(minutes)} min"
        print(f"[{count}/{total}] {name}: {outcome}{rest}", flush=True)


def _kept(parent: Path, plan: Plan) -> Path | None:
    """Return the newest version of a run that matches the plan and the current code, preferring
    those that have ended."""
    candidates = [
        (_has_ended(folder), number, folder) for number, folder in runs.versions(parent).items()
    ]
    for _, _, version in sorted(candidates, reverse=True):
        if (version / "run.json").exists():  # otherwise training hasn't started
            record = read_run(version)
            if not plan.differs(record) and not other_code(record):
                return version
    return None


def _has_ended(version: Path) -> bool:
    """Return whether a run finished training."""
    return (version / "model.md").exists()
