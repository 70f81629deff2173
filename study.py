"""Command-line entry point: many runs that answer one question.

    python study.py configs/studies/batch_size.yaml
    python study.py configs/studies/batch_size.yaml --jobs 2              # two runs at a time
    python study.py configs/studies/batch_size.yaml --jobs 0              # the answer so far
    python study.py configs/studies/batch_size.yaml --seeds '[0, 1, 2, 3]'  # the new seed only

Every run is one of `python train.py fit`, in runs/<study>/<setting>,seed=<seed>/version_0/. The
same command resumes a study that was stopped, in whatever way; started again while it runs, here or
on another machine, it takes its share. Optuna keeps the record, from which the answer is made:
`answer.md`, `answer.csv` and two figures in runs/<study>/.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import torch
from jsonargparse import ActionConfigFile
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from runs import Row
from studies.answer import Answer, Outcome
from studies.one_run import fit
from studies.question import Question, check
from studies.record import HEARTBEAT, STORAGE_ERRORS, Worker, open_record, without_password
from terminal import ShortParser, quieten, short_errors

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


class Runner:
    """Runs a study: takes runs from the record, has each done in a process, keeps what comes."""

    def __init__(
        self, question: Question, worker: Worker, folder: Path, epochs: dict[str, int], jobs: int
    ) -> None:
        self.question, self.worker, self.folder, self.epochs = question, worker, folder, epochs
        self.shares = shares(jobs)
        self.running: dict[Connection, Running] = {}
        # A run starts at once, in a fork of a process that has imported these and done nothing.
        if "forkserver" in multiprocessing.get_all_start_methods():
            from multiprocessing import forkserver  # not there on every system

            self.processes: Any = multiprocessing.get_context("forkserver")
            self.processes.set_forkserver_preload(SLOW_TO_IMPORT)
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process,
            forkserver.ensure_running()  # which ends the others
            signal.signal(signal.SIGINT, before)
        else:
            self.processes = multiprocessing.get_context("spawn")
        self.heard = self.started = time.monotonic()
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
            for link, one in self.running.items():
                one.process.terminate()
                link.close()  # it may wait for an answer
            for one in self.running.values():
                _end(one.process)

    def _start_what_can_be(self) -> bool:
        """Start as many runs as there are shares free; return whether any was started."""
        before = len(self.running)
        while len(self.running) < len(self.shares) and (trial := self.worker.take()):
            flags, seed = trial.user_attrs["flags"], trial.user_attrs["seed"]
            setting, name = self.question.name_of(flags), self.question.folder_of(flags, seed)
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
            bar = self.progress.add_task(
                escape(f"  {setting}, seed {seed}"),
                total=self.epochs.get(setting, max(self.epochs.values())),
                state="starts",
            )
            process.start()
            self.running[here] = Running(trial, name, process, slot, bar)
            there.close()
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
            kind, *content = link.recv()
        except (EOFError, OSError):
            one.process.join()
            kind, content = "failed", [f"its process ended with exit code {one.process.exitcode}"]
        try:
            if kind == "epoch":
                with contextlib.suppress(OSError):  # it may have ended since
                    link.send(self._stops(one, *content))
                return
            if kind == "done":
                self._keep(one, *content)
            elif kind == "diverged":
                how, machine = content
                one.ended = f"diverged: {how}"
                self._keep(one, one.rows, machine)
            else:
                self._fail(one, content[0].removeprefix("error: "))
        except optuna.exceptions.UpdateFinishedTrialError:
            self._print(
                f"{one.name}: taken over by another worker, which heard nothing of this one"
            )
            one.process.kill()
        del self.running[link]
        link.close()
        _end(one.process)
        self.progress.remove_task(one.bar)

    def _stops(self, one: Running, rows: list[Row]) -> bool:
        """Take over the epochs of a run, and return whether there is no sense in more."""
        choose = self.question.choose
        for row in rows[len(one.rows) :]:
            if choose in row:
                one.trial.report(row[choose], int(row["epoch"]))
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

    def _keep(self, one: Running, rows: list[Row], where: str) -> None:
        """Put a finished run on record."""
        outcome = Outcome(one.name, one.trial.user_attrs["seed"], rows, one.ended)
        best = outcome.best(self.question.choose)
        ended = one.ended or outcome.diverged() or ("" if best else "without a validation")
        self.worker.finish(one.trial, rows, ended, where, best)
        if where.startswith("taken"):
            self._print(f"{one.name}: {where}")
            return
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
        ended, total = len(self.worker.outcomes()), self.worker.total()
        rest = ""
        if total > ended and self.done:
            minutes = (time.monotonic() - self.started) / self.done * (total - ended) / 60
            rest = f"; {total - ended} left, about {max(1, round(minutes))} min"
        self.console.print(f"[{ended}/{total}] {line}{rest}", markup=False, soft_wrap=True)

    def _say_how_far(self) -> None:
        """Show what is done, running and left; tell other workers that this one is alive."""
        now = time.monotonic()
        if now - self.heard > HEARTBEAT:
            self.heard = now
            for one in self.running.values():
                self.worker.say_alive(one.trial)
        if self.progress.disable:
            return
        done, total = len(self.worker.outcomes()), self.worker.total()
        running = [t for t in self.worker.trials() if t.state == TrialState.RUNNING]
        longest = max(self.epochs.values())
        self.progress.update(
            self.total,
            total=longest * total,
            completed=longest * done + sum(len(t.intermediate_values) for t in running),
            state=f"{done} runs done, {len(running)} running, {total - done - len(running)} left",
        )


def _end(process: BaseProcess) -> None:
    """Wait until a process has ended, and see to it."""
    process.join(30)
    process.kill()
    process.join()


def _with_file(args: list[str]) -> list[str]:
    """Put the study's file first and its flag before it: flags override it."""
    for i, word in enumerate(args):
        is_file = not i or (Path(word).suffix in (".yaml", ".yml") and args[i - 1][:1] != "-")
        if is_file and not word.startswith("-"):
            return ["--file", word, *args[:i], *args[i + 1 :]]
    if not {"--file", "--help", "-h"} & {word.partition("=")[0] for word in args}:
        raise MisconfigurationException("name the file of a study: python study.py FILE")
    return args


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    with short_errors():
        _main(sys.argv[1:] if args is None else args)


def _main(args: list[str]) -> None:
    parser = ShortParser(prog="study.py", description="Answer a question by many runs.")
    parser.add_argument("--file", action=ActionConfigFile, help="the question (or as first word)")
    parser.add_class_arguments(Question)
    parser.add_argument(
        "--jobs", type=NonNegativeInt, default=1, help="runs at a time; 0: the answer so far"
    )
    parser.add_argument(
        "--storage", type=str | None, default=None, help="any of Optuna's, or journal:FILE"
    )
    parser.add_argument("--folder", type=str | None, default=None, help="runs/<name of the file>")
    given = parser.parse_args(_with_file(args))
    settings = parser.instantiate_classes(given).as_dict()
    # Flags are words to pass on, though some of them name classes.
    settings |= {key: given.as_dict()[key] for key in ("grid", "variants", "fixed")}
    names = [field.name for field in dataclasses.fields(Question)]
    question = Question(**{name: settings[name] for name in names})
    folder = Path(given.folder or Path("runs", Path(str(given.file[-1])).stem))
    epochs = check(question, question.settings() or question.extremes())
    nothing = MisconfigurationException(f"{folder}: no run has ended yet, so there is no answer")
    if not (given.jobs or given.storage or folder.exists()):
        raise nothing
    try:
        worker = Worker(question, open_record(question, folder, given.storage), folder)
        if given.jobs:
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            try:
                with worker:
                    Runner(question, worker, folder, epochs, given.jobs).work()
            finally:
                signal.signal(signal.SIGTERM, before)
        settings, outcomes = worker.settings(), worker.outcomes()
    except (KeyboardInterrupt, SystemExit) as stop:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT)
    except STORAGE_ERRORS as error:
        reason = str(error).splitlines()[0]
        raise MisconfigurationException(
            f"the storage failed ({reason}): the same command resumes"
        ) from error
    if not outcomes:
        raise nothing
    answer = Answer(
        question.question,
        without_password(shlex.join(["python", "study.py", *args])),
        question.choose,
        question.levels(settings),
        outcomes,
        question.baseline,
        is_search=bool(question.search),
    )
    terminal = Console(highlight=False)
    answer.write(folder, terminal if terminal.is_terminal else Console(width=120, highlight=False))
    if worker.failed:
        sys.exit(f"error: {len(worker.failed)} failed, see above: the same command tries again")


if __name__ == "__main__":
    main()
