"""The second door: many runs that answer one question.

    python study.py configs/studies/batch_size.yaml
    python study.py configs/studies/batch_size.yaml --jobs 2              # two runs at a time
    python study.py configs/studies/batch_size.yaml --jobs 0              # the answer so far
    python study.py configs/studies/batch_size.yaml --seeds '[0, 1, 2, 3]'  # the new seed only

Every run is one of `python train.py fit`, in runs/<study>/<setting>,seed=<seed>/version_0/. What
was stopped, in whatever way, goes on with the same command; the same command started once more
while it runs, here or on another machine, takes its share. Optuna keeps the record, from which the
answer is made: `answer.md`, `answer.csv` and two figures in runs/<study>/.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning
import optuna
import sqlalchemy
import torch
from jsonargparse import ActionConfigFile
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from callbacks.history import Row
from runs import processor
from studies.answer import Answer, Outcome
from studies.one_run import fit
from studies.question import Question, check
from studies.record import HEARTBEAT, Worker, open_record
from terminal import OneLineParser, errors_in_one_line, quieten

SLOW_TO_IMPORT = [
    *("lightning.pytorch.cli", "lightning.pytorch.loggers", "matplotlib.figure", "optuna", "tqdm"),
    *("torch.utils.tensorboard", "torchmetrics", "torchvision"),
]


@dataclass
class Running:
    """A run under way in a child process."""

    trial: optuna.Trial
    name: str
    process: BaseProcess
    slot: int
    bar: TaskID
    rows: list[Row] = field(default_factory=list)
    ended: str = ""  # why, if not by its last epoch


def shares(jobs: int) -> list[tuple[str | None, int]]:
    """Return for each job the GPUs that are its own, None if there are none, and its cores."""
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


class Runner:
    """Runs a study: takes runs from the record, has each done in a process, keeps what comes."""

    def __init__(
        self, question: Question, worker: Worker, folder: Path, epochs: dict[str, int], jobs: int
    ) -> None:
        self.question, self.worker, self.folder, self.epochs = question, worker, folder, epochs
        self.shares = shares(jobs)
        self.running: dict[Connection, Running] = {}
        # A run starts at once, in a fork of a process that has imported these and done nothing.
        has_server = "forkserver" in multiprocessing.get_all_start_methods()
        get = multiprocessing.get_context
        self.processes = get("forkserver") if has_server else get("spawn")
        self.processes.set_forkserver_preload(SLOW_TO_IMPORT)
        self.heard = self.started = time.time()
        self.done = 0
        self.waits = False
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
        self.total = self.progress.add_task("all", total=None, state="")

    def work(self) -> None:
        """Run until every run of the question is done, here or elsewhere."""
        try:
            with self.progress:
                while self._start_what_can_be() or self.running or self._others():
                    # mypy takes what is waited for to be any handle of the system
                    for link in wait(list(self.running), timeout=1.0) if self.running else ():
                        self._listen(link)  # type: ignore[arg-type]
                    if not self.running:
                        time.sleep(1.0)
                    self._say_how_far()
        finally:
            for one in self.running.values():
                one.process.terminate()
            for one in self.running.values():
                one.process.join(10)
                one.process.kill()
                self.worker.give_up(one.trial)

    def _start_what_can_be(self) -> bool:
        """Start as many runs as there are shares free; return whether any was started."""
        before = len(self.running)
        while len(self.running) < len(self.shares) and (trial := self.worker.take()):
            flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
            setting = self.question.name_of(flags)
            name = re.sub(r"[^\w.,=+-]+", "_", f"{setting},seed={seed}")
            slot = min(set(range(len(self.shares))) - {r.slot for r in self.running.values()})
            here, there = self.processes.Pipe()
            process = self.processes.Process(
                target=fit,
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
            self.running[here] = Running(trial, name, process, slot, bar)
        return len(self.running) > before

    def _others(self) -> bool:
        """Return whether other workers have runs under way."""
        others = any(t.state == TrialState.RUNNING for t in self.worker.trials())
        if others and not self.waits:
            self.console.print("waits for the runs of others")
        self.waits = others
        return others

    def _listen(self, link: Connection) -> None:
        """Take one message of a run."""
        one = self.running[link]
        try:
            kind, content = link.recv()
        except EOFError:
            one.process.join()
            kind, content = "failed", f"its process ended with exit code {one.process.exitcode}"
        try:
            if kind == "epoch":
                with contextlib.suppress(OSError):  # it may have ended since
                    link.send(self._stops(one, content))
                return
            if kind == "done":
                one.rows = content
                self._keep(one)
            else:
                self._fail(one, content.removeprefix("error: "))
        except optuna.exceptions.UpdateFinishedTrialError:
            self._print(
                f"{one.name}: taken over by another worker, which heard nothing of this one"
            )
            one.process.kill()
        del self.running[link]
        link.close()
        one.process.join()
        self.progress.remove_task(one.bar)

    def _stops(self, one: Running, rows: list[Row]) -> bool:
        """Take over the epochs of a run, and return whether there is no sense in more."""
        choose = self.question.choose
        for row in rows[len(one.rows) :]:
            if choose in row:
                one.trial.report(row[choose], int(row["epoch"]))
            if not math.isfinite(row.get("train/loss", 0.0)):
                one.ended = f"diverged: train/loss is no number in epoch {row['epoch']:.0f}"
        one.rows = rows
        if not one.ended and rows and one.trial.should_prune():
            one.ended = f"pruned after epoch {rows[-1]['epoch']:.0f}"
        if rows:
            state = f"epoch {rows[-1]['epoch']:.0f}, {self._quality(rows[-1])}"
            self.progress.update(one.bar, completed=len(rows), state=state)
        return bool(one.ended)

    def _quality(self, row: Row) -> str:
        key = self.question.choose
        if key not in row:
            return f"no {key}"
        return f"{key} {row[key]:.2%}" if key.endswith("acc") else f"{key} {row[key]:.4f}"

    def _keep(self, one: Running) -> None:
        """Put a finished run on record."""
        outcome = Outcome(one.name, one.trial.user_attrs["seed"], one.rows, one.ended)
        best = outcome.best(self.question.choose)
        ended = one.ended or outcome.diverged() or ("" if best else "without a validation")
        self.worker.finish(one.trial, outcome.rows, ended, machine(self.shares[one.slot][1]), best)
        self.done += 1
        if best is None or ended:
            self._print(f"{one.name}: {ended}")
            return
        test = f", test/acc {best['test/acc']:.2%}" if "test/acc" in best else ""
        self._print(
            f"{one.name}: {self._quality(best)} in epoch {best['epoch']:.0f}{test}, "
            f"{outcome.seconds():.0f} s"
        )

    def _fail(self, one: Running, why: str) -> None:
        """Say that a run failed, which another start may try again."""
        self.worker.fail(one.trial)
        self._print(f"{one.name}: failed: {why}")

    def _print(self, line: str) -> None:
        """Print a line on a run that has ended, how many there are, and how long the rest takes."""
        trials = self.worker.trials()
        ended = sum(trial.state.is_finished() for trial in trials)
        left = len(trials) - ended
        rest = ""
        if left and self.done:
            minutes = (time.time() - self.started) / self.done * left / 60
            rest = f"; {left} left, about {max(1, round(minutes))} min"
        self.console.print(f"[{ended}/{len(trials)}] {line}{rest}", markup=False, soft_wrap=True)

    def _say_how_far(self) -> None:
        """Show what is done, running and left; tell other workers that this one is alive."""
        now = time.time()
        if now - self.heard > HEARTBEAT:
            self.heard = now
            for one in self.running.values():
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    one.trial.set_user_attr("heard", now)
        if self.progress.disable:
            return
        trials = self.worker.trials()
        done = [t for t in trials if t.state.is_finished()]
        running = [t for t in trials if t.state == TrialState.RUNNING]
        longest = max(self.epochs.values())
        self.progress.update(
            self.total,
            total=longest * len(trials),
            completed=longest * len(done) + sum(len(t.intermediate_values) for t in running),
            state=f"{len(done)} runs done, {len(running)} running, "
            f"{len(trials) - len(done) - len(running)} left",
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
    parser.add_argument(
        "--jobs", type=NonNegativeInt, default=1, help="runs at a time; 0: the answer so far"
    )
    parser.add_argument(
        "--storage", type=str | None, default=None, help="any of Optuna's, or journal:FILE"
    )
    parser.add_argument("--folder", type=str | None, default=None, help="runs/<name of the file>")
    if args and not args[0].startswith("-"):
        args = ["--file", *args]
    if not args or args == ["--file"]:
        raise MisconfigurationException("name the file of a study: python study.py FILE")
    typed = parser.parse_args(args)
    settings = parser.instantiate_classes(typed).as_dict()
    # Flags are words to pass on, though some of them name classes.
    settings |= {key: typed.as_dict()[key] for key in ("grid", "variants", "fixed")}
    names = [field.name for field in dataclasses.fields(Question)]
    question = Question(**{name: settings[name] for name in names})
    folder = Path(typed.folder or Path("runs", Path(str(typed.file[-1])).stem))
    epochs = check(question, question.settings() or question.extremes())
    worker = Worker(question, open_record(question, folder, typed.storage), folder)
    try:
        if typed.jobs:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            Runner(question, worker, folder, epochs, typed.jobs).work()
    except (KeyboardInterrupt, SystemExit) as stop:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT)
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(
            f"the storage failed ({reason}): the same command goes on"
        ) from error
    finally:
        worker.close()
    if not worker.outcomes():
        raise MisconfigurationException(f"{folder}: no run has ended yet, so there is no answer")
    answer = Answer(
        question.question,
        f"python study.py {' '.join(map(str, typed.file))}",
        question.choose,
        question.levels(worker.settings()),
        worker.outcomes(),
        question.baseline,
    )
    terminal = Console(highlight=False)
    answer.write(folder, terminal if terminal.is_terminal else Console(width=120, highlight=False))
    if worker.failed:
        sys.exit(f"error: {len(worker.failed)} failed, see above: the same command tries again")


if __name__ == "__main__":
    main()
