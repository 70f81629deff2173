"""The work of a study: each run is a program, `train.py`, with its share of the machine."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

import runs
from studies.queue import HEARTBEAT, Queue, is_free, key_of
from studies.record import (
    Plan,
    best_of,
    described,
    finished,
    other_code,
    read_run,
    rows_of,
)  # fmt: skip

TRAIN = Path(__file__).parents[1] / "train.py"
ELSEWHERE = ("--data.root=", "--data.sources=", "--data.download=", "--trainer.accelerator=")


def shares(jobs: int) -> list[tuple[str | None, int]]:
    """Return for each job its GPU, None if there are none, and how many cores are its own."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = max(1, cores // jobs)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [(None, threads)] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(count)]
    return [(gpus[i % count], threads) for i in range(jobs)]


class Work:
    """Does the runs of a queue in a folder, several at a time."""

    def __init__(self, queue: Queue, folder: Path) -> None:
        self.queue, self.folder, self.question = queue, folder, queue.question
        self.stopped = 0  # the signal that stopped it
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.started, self.done = time.monotonic(), 0

    def do_all(self, jobs: int) -> None:
        """Do every run that is missing; others may do some of them at the same time.

        Raises:
            SystemExit: It was stopped by Ctrl-C or SIGTERM.
        """
        with self.queue.at_work(), ThreadPoolExecutor(jobs) as pool, self._stoppable():
            started = [pool.submit(self._do_some, *share) for share in shares(jobs)]
            for job in wait(started, return_when=FIRST_EXCEPTION).done:
                job.result()
        if self.stopped:
            print("stopped; the same command resumes", file=sys.stderr)
            sys.exit(128 + self.stopped)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Stop the runs on Ctrl-C and SIGTERM, and if a thread fails."""

        def stop(number: int, _frame: Any = None) -> None:
            self.stopped = number
            for process in list(self.processes):
                process.terminate()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except BaseException:
            stop(signal.SIGTERM)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _do_some(self, gpu: str | None, threads: int) -> None:
        """Do runs until none is left, with a share of this machine."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        while not self.stopped:
            if trial := self.queue.take():
                state, value = TrialState.FAIL, None
                try:
                    state, value = self._do(trial, environment)
                finally:
                    self.queue.study.tell(trial, value, state, skip_if_finished=True)
            elif self.queue.are_others_at_work():
                time.sleep(0.5)
            else:
                return

    def _do(
        self, trial: optuna.Trial, environment: dict[str, str]
    ) -> tuple[TrialState, float | None]:
        """Do a run from its last checkpoint, or from its start; return how it ended."""
        flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
        name, plan = self.question.folder_of(flags, seed), self.queue.plan(flags, seed)
        parent, choose = self.folder / name, self.question.choose
        parent.mkdir(parents=True, exist_ok=True)
        while not all(map(is_free, parent.glob("version_*/.lock"))):
            time.sleep(0.5)  # a worker was killed, but not its run
        command = self.question.command(flags, seed, self.folder, name)
        kept, code, ended = _kept(parent, plan), 0, ""
        if kept is None or not (kept / "model.md").exists():  # with which a run ends
            step, checkpoint = runs.newest(kept / "checkpoints") if kept else (-1, parent)
            if step >= 0:
                here = [word for word in command if word.startswith(ELSEWHERE)]
                command = ["fit", f"--ckpt_path={checkpoint}", *here]
            code, ended = self._train(trial, command, parent, environment)
            kept = _kept(parent, plan)
        last = _last_line(parent / "fit.log")
        if code and (diverged := re.search(r"error: training (diverged.*?), at ", last)):
            code, ended = 0, diverged[1]
        if self.stopped:
            return TrialState.FAIL, None
        if (code and not ended) or (kept is None and not ended):
            self.queue.failed.add(key_of(trial))
            why = f"exit code {code}" if code < 0 else last.removeprefix("error: ")
            self._say(name, f"failed: {why}, see {parent / 'fit.log'}")
            return TrialState.FAIL, None
        record = finished(kept, plan, flags, choose, ended)
        trial.set_user_attr("record", record)
        best = best_of(record, choose)
        self._say(name, record["ended"] or described(record, choose), 1)
        if best is None or record["ended"]:
            return TrialState.PRUNED, None
        return TrialState.COMPLETE, best[choose]

    def _train(
        self, trial: optuna.Trial, command: list[str], parent: Path, environment: dict[str, str]
    ) -> tuple[int, str]:
        """Run `train.py` to its end; return its exit code, and why it was pruned, if it was."""
        flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
        plan, choose = self.queue.plan(flags, seed), self.question.choose
        # A setting of a search whose first run was not pruned is worth the runs of its other seeds.
        may_prune = self.question.pruner and (
            not self.queue.space or seed == self.question.seeds[0]
        )
        reported, heard, ended = -1, -math.inf, ""
        with (parent / "fit.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *command],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.processes.add(process)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1.0)
                break
            if self.stopped:
                process.terminate()  # it was started at that moment
            if time.monotonic() > heard + HEARTBEAT:
                heard = time.monotonic()
                self.queue.say_alive(trial)
            if may_prune and not ended and (kept := _kept(parent, plan)):
                for row in rows_of(read_run(kept)):
                    if row["epoch"] > reported and choose in row:
                        reported = int(row["epoch"])
                        trial.report(row[choose], reported)
                if reported >= 0 and trial.should_prune():
                    ended = f"pruned after epoch {reported}"
                    process.terminate()
        self.processes.discard(process)
        return process.returncode, ended

    def _say(self, name: str, how: str, ended: int = 0) -> None:
        """Print a line on a run, how many of all have ended, and about how long the rest takes."""
        with self.queue.lock:
            self.done += ended
            count, total = len(self.queue.records()), self.queue.total()
            rest = ""
            if total > count and self.done:
                minutes = (time.monotonic() - self.started) / self.done * (total - count) / 60
                rest = f"; {total - count} left, about {max(1, round(minutes))} min"
            print(f"[{count}/{total}] {name}: {how}{rest}", flush=True)


def _kept(parent: Path, plan: Plan) -> Path | None:
    """Return the newest version of a run that began as planned, by the code as it is now."""
    for _, version in sorted(runs.versions(parent).items(), reverse=True):
        if (version / "run.json").exists():  # else it has not begun to train
            record = read_run(version)
            if plan.is_of(record) and not other_code(record):
                return version
    return None


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "")
