"""Fault injection: how often a run survives, and what it loses.

    python -m tests.faults kill --times 50     # kill -9 at any moment, and while files are written
    python -m tests.faults stop --times 20     # SIGTERM and Ctrl-C
    python -m tests.faults disk                # a disk that fills up (root, Linux: mounts a tmpfs)
    python -m tests.faults resume              # stopped after each epoch
    python -m tests.faults processes           # kill -9 to one of two that train together
    python -m tests.faults read_only           # a read-only data folder (as `disk`)
    python -m tests.faults sick                # a learning rate that makes the weights NaN

A run survives if the checkpoints and config in its folder are intact and, once resumed, it ends
with exactly the weights of an undisturbed run. Runs are small: a thousand made-up images and
networks of a few thousand parameters, but with everything that draws random numbers.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

import train
from cifar10 import archive
from runs import read_checkpoint
from tests.conftest import made_up, official, tar

ROOT = Path(__file__).parents[1]
EPOCHS = 5
IMPROVED = [
    *("fit", "--config", str(ROOT / "configs" / "improved.yaml"), "--model.network.channels"),
    *("[4,4,8]", "--model.network.dense_units", "8", "--data.batch_size", "50"),
]
FAST = [
    *("fit", "--config", str(ROOT / "configs" / "airbench94.yaml"), "--model.network.widths"),
    *("[4,4,8]", "--data.batch_size", "100"),
]
SMALL = [
    *("--data.verify", "false", "--data.val_size", "200", "--trainer.accelerator", "cpu"),
    *("--trainer.max_epochs", str(EPOCHS), "--name", "run", "--data.download", "false"),
]
RECIPES = {"improved": [*IMPROVED, *SMALL], "airbench94": [*FAST, *SMALL]}


CHOICE = random.Random(0)
CODES = {  # exit codes that a signal may lead to
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM},  # before and during training
    signal.SIGINT: {128 + signal.SIGINT},
}


class Run(NamedTuple):
    """A fork of this process, which has already imported everything, and its log."""

    pid: int
    log: Path

    def wait(self) -> int:
        """Wait and return the exit code, negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> list[str]:
        """Return its error lines."""
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def epochs(self) -> int:
        """Return how many epochs it has reported."""
        return len(re.findall(r"^ +\d+ +\d", self.said(), re.M))


def start(words: list[str], folder: Path, deadly: tuple[str, int] = ("", 0)) -> Run:
    """Run `python train.py ...` in a folder, in its own process; `deadly` is a file pattern, and
    which write to a matching file kills it."""
    log = folder / f"log_{time.monotonic_ns()}"
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # the fork may have done so, or even have ended
            os.setpgid(pid, pid)
        return Run(pid, log)
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in case this process ignores it
        os.chdir(folder)
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
        sys.argv = ["train.py", *words]
        die_at(*deadly)
        train.main(words)
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:  # before `train.main` catches it
        code = 128 + signal.SIGINT
    finally:
        sys.stdout.flush()
        os._exit(code)


def die_at(pattern: str, count: int) -> None:
    """Kill this process the `count`-th time that it opens or renames a file that matches, after
    truncating the file at a random size."""

    def look(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        is_opened = event == "open" and "w" in str(args[1])
        if (is_opened or event == "os.rename") and fnmatchcase(str(args[0]), pattern):
            count -= 1
            if count == 0:
                file = Path(args[0])
                if file.is_file() and file.stat().st_nlink == 1:  # not a link to a complete file
                    os.truncate(file, CHOICE.randint(0, file.stat().st_size))
                os.kill(os.getpid(), signal.SIGKILL)

    if pattern:
        sys.addaudithook(look)


def digest(folder: Path) -> str:
    """Return the SHA-256 of a finished run's last weights."""
    state = torch.load(folder / "runs/run/version_0/model.pth", weights_only=True)
    content = b"".join(name.encode() + t.numpy().tobytes() for name, t in sorted(state.items()))
    return hashlib.sha256(content).hexdigest()


def kept(folder: Path) -> list[int]:
    """Return the epochs of the checkpoints in a folder. All of them, `last` and the config must be
    intact."""
    for file in folder.glob("runs/run/version_*/config.yaml"):
        assert "checkpoint" in yaml.safe_load(file.read_text())
    files = sorted(folder.glob("runs/run/version_*/checkpoints/*.ckpt"))
    epochs = {file.name: read_checkpoint(file)["epoch"] for file in files}
    return [epoch for name, epoch in epochs.items() if name != "last.ckpt"]


@contextlib.contextmanager
def empty_folder(packed: bytes) -> Iterator[Path]:
    """A folder with the data set as an unconverted archive."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        (folder / "data" / archive.ARCHIVE).write_bytes(packed)
        yield folder


def go_on(words: list[str], folder: Path) -> Run:
    """Resume a run from `last`, as a user would, or restart it if nothing is kept."""
    last = folder / "runs/run/version_0/checkpoints/last.ckpt"
    if not last.exists():
        shutil.rmtree(folder / "runs", ignore_errors=True)
        return start(words, folder)
    return start(["fit", "--ckpt_path", "last", "--name", "run"], folder)


class Table:
    """Counts the outcomes of runs, and prints them as rows."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()
        self.survived: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()

    def add(self, fault: str, survived: bool, lost: int = 0) -> None:
        """Count one run: whether it survived, and how many reported epochs it lost."""
        self.times[fault] += 1
        self.survived[fault] += survived
        self.lost[fault] += lost
        print("." if survived else "!", end="", flush=True)

    def print(self) -> None:
        """Print a row for every fault."""
        print()
        for fault, times in self.times.items():
            print(f"| {fault} | {times} | {self.survived[fault]} | {self.lost[fault]} |")


def broken(
    fault: str, words: list[str], packed: bytes, expected: str, table: Table,
    number: signal.Signals = signal.SIGKILL, within: float = 0, deadly: tuple[str, int] = ("", 0),
) -> None:  # fmt: skip
    """Start a run, and signal it `within` some seconds or have it die; check what it left, resume
    it, and compare."""
    with empty_folder(packed) as folder:
        run = start(words, folder, deadly)
        codes = signalled(run, number, within) if within else {-signal.SIGKILL}
        is_expected = run.wait() in codes
        reported, saved = run.epochs(), kept(folder)
        lost = max(0, reported - len(saved))
        rerun = go_on(words, folder)
        survived = rerun.wait() == 0 and digest(folder) == expected and saved == sorted(set(saved))
        if not survived or not is_expected:
            print(f"\n{fault}: {run.said()}\n{rerun.said()}")
        table.add(fault, survived and is_expected, lost)


def signalled(run: Run, number: signal.Signals, within: float) -> set[int]:
    """Send a signal at a random moment; return the exit codes that it may lead to."""
    time.sleep(CHOICE.uniform(0, within))
    has_ended = os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    may_end_well = run.epochs() >= EPOCHS - 1  # a signal in the last steps may come too late
    os.killpg(run.pid, number)
    return {0} if has_ended else CODES[number] | ({0} if may_end_well else set())


def kill(times: int, packed: bytes, table: Table) -> None:
    """Kill -9: at random moments from start to end, and while a file is being written."""
    writing = {  # file pattern, and how often such a file is opened or moved
        "while the arrays are written": ("*/.fetching-*", 5),
        "while config.yaml is written": ("*/.config.yaml.*", 2),
        # `last.ckpt` is a link, which is only moved.
        "while a checkpoint is written": ("*/checkpoints/.*", 3 * EPOCHS),
    }
    for name, words in RECIPES.items():
        expected, seconds = unbroken(words, packed)
        for _ in range(times):
            fault = f"kill -9 at any moment, {name}"
            broken(fault, words, packed, expected, table, within=seconds)
        for moment, (pattern, count) in writing.items():
            for _ in range(max(1, times // 5)):
                deadly = (pattern, CHOICE.randint(1, count))
                fault = f"kill -9 {moment}, {name}"
                broken(fault, words, packed, expected, table, deadly=deadly)


def unbroken(words: list[str], packed: bytes) -> tuple[str, float]:
    """Return the digest of an undisturbed run, and its seconds."""
    with empty_folder(packed) as folder:
        began = time.monotonic()
        run = start(words, folder)
        assert run.wait() == 0, run.said()
        return digest(folder), time.monotonic() - began


def stop(times: int, packed: bytes, table: Table) -> None:
    """Stop gracefully: SIGTERM, as from a cluster, and SIGINT, as from Ctrl-C."""
    words = RECIPES["improved"]
    expected, seconds = unbroken(words, packed)
    for number in (signal.SIGTERM, signal.SIGINT):
        for _ in range(times):
            broken(f"{number.name} at any moment", words, packed, expected, table, number, seconds)


def resume(times: int, packed: bytes, table: Table) -> None:
    """Resume from the checkpoint of every epoch, in a new folder."""
    for name, words in RECIPES.items():
        with empty_folder(packed) as folder:
            run = start(words, folder)
            assert run.wait() == 0, run.said()
            expected = digest(folder)
            (folder / "runs/run/version_0").rename(folder / "whole")
            for epoch in range(EPOCHS - 1):
                path = f"whole/checkpoints/epoch_{epoch:02d}.ckpt"
                rerun = start(["fit", "--ckpt_path", path], folder)
                survived = rerun.wait() == 0 and digest(folder) == expected
                if not survived:
                    print(f"\n{rerun.said()}")
                lost = max(0, rerun.epochs() - len(kept(folder)))
                table.add(f"resumed after any epoch, {name}", survived, lost)
                shutil.rmtree(folder / "runs", ignore_errors=True)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Callable[[str], object]]:
    """Mount a disk in memory; yield a function that remounts it with other options."""

    def mount(options: str) -> object:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, check=True)

    folder.mkdir(exist_ok=True)
    mount(options)
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", folder], check=True)


def disk(times: int, packed: bytes, table: Table) -> None:
    """Fill a small disk that holds the runs; then make room and resume."""
    words = RECIPES["improved"]
    expected, _ = unbroken(words, packed)
    for size in range(60, 60 + 30 * times, 30):
        with empty_folder(packed) as folder, mounted(folder / "runs", f"size={size}k") as remount:
            run = start(words, folder)
            code, saved = run.wait(), kept(folder)
            is_told = code == 1 and len(run.errors()) == 1 and "free some space" in run.errors()[0]
            remount("size=64m")
            rerun = go_on(words, folder)
            survived = is_told and rerun.wait() == 0 and digest(folder) == expected
            if not survived:
                print(f"\n{size} kB, exit code {code}:\n{run.said()}\n{rerun.said()}")
            table.add("disk full", survived, max(0, run.epochs() - len(saved)))


def read_only(times: int, packed: bytes, table: Table) -> None:
    """Train with a read-only data folder: with the archive alone, and unpacked."""
    words = RECIPES["improved"]
    expected, _ = unbroken(words, packed)
    for is_unpacked in (False, True):
        for _ in range(max(1, times // 5)):
            with empty_folder(b"") as folder, mounted(folder / "data", "size=64m") as remount:
                (folder / "data" / archive.ARCHIVE).write_bytes(packed)
                if is_unpacked:
                    archive.load(folder / "data", verify=False)
                remount("ro")
                run = start(words, folder)
                survived = run.wait() == 0 and digest(folder) == expected
                if not survived:
                    print(f"\n{run.said()}")
                content = "unpacked" if is_unpacked else "the archive alone"
                lost = max(0, run.epochs() - len(kept(folder)))
                table.add(f"data folder read-only, {content}", survived, lost)


def sick(times: int, packed: bytes, table: Table) -> None:
    """Resume with a learning rate that makes the loss infinite; then with the run's own."""
    for name, words in RECIPES.items():
        lr = ["--model.optimizer." + ("groups.norms.lr" if name == "airbench94" else "lr"), "1e30"]
        for epoch in range(1, EPOCHS):
            with empty_folder(packed) as folder:
                assert start(words, folder).wait() == 0
                expected = digest(folder)
                (folder / "runs/run/version_0/model.pth").unlink()
                checkpoints = folder / "runs/run/version_0/checkpoints"
                for file in checkpoints.iterdir():
                    if read_checkpoint(file)["epoch"] >= epoch:
                        file.unlink()
                previous = kept(folder)
                command = ["fit", "--ckpt_path", f"{checkpoints}/epoch_{epoch - 1:02d}.ckpt"]
                run = start([*command, *lr], folder)
                is_told = run.wait() == 1 and len(run.errors()) == 1
                is_told &= f"in epoch {epoch}" in run.said() and command[-1] in run.said()
                is_kept, lost = kept(folder) == previous, len({*previous} - {*kept(folder)})
                rerun = start(command, folder)
                survived = is_told and is_kept and rerun.wait() == 0 and digest(folder) == expected
                if not survived:
                    print(f"\n{run.said()}\n{rerun.said()}")
                table.add(f"a learning rate of 1e30 from an epoch on, {name}", survived, lost)


def processes(times: int, packed: bytes, table: Table) -> None:
    """Kill -9 one of two processes, the first or the second, at any moment of the training."""
    words = [*RECIPES["improved"], "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    train_py = [sys.executable, str(ROOT / "train.py")]

    def exit_code(command: list[str], folder: Path) -> int:
        return subprocess.run([*train_py, *command], cwd=folder, capture_output=True).returncode

    with empty_folder(packed) as folder:
        archive.load(folder / "data", verify=False)  # here, where its checksum is patched
        assert exit_code(words, folder) == 0
        expected = digest(folder)
    for i in range(times):
        with empty_folder(packed) as folder:
            archive.load(folder / "data", verify=False)
            log = folder / "log"
            with log.open("w") as out:
                first = subprocess.Popen([*train_py, *words], cwd=folder, stdout=out, stderr=out)
            run = Run(first.pid, log)
            epochs = CHOICE.randint(1, EPOCHS - 2)
            while run.epochs() < epochs and first.poll() is None:
                time.sleep(0.01)
            children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            (second,) = (pid for pid in map(int, children) if "train.py" in command_of(pid))
            time.sleep(CHOICE.uniform(0, 0.1))
            os.kill((first.pid, second)[i % 2], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while first.poll() is None or command_of(second):
                if time.monotonic() > deadline:  # it hangs
                    os.kill((second, first.pid)[i % 2], signal.SIGKILL)
                time.sleep(0.1)
            ended = time.monotonic() < deadline
            lost = max(0, run.epochs() - len(kept(folder)))
            code = exit_code(["fit", "--ckpt_path", "last", "--name", "run"], folder)
            survived = ended and code == 0 and digest(folder) == expected
            if not survived:
                print(f"\n{run.said()}")
            table.add(
                f"kill -9 to the {('first', 'second')[i % 2]} of two processes", survived, lost
            )


def command_of(pid: int) -> str:
    """Return the command line of a process, or "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


FAULTS = {
    "kill": kill, "stop": stop, "resume": resume, "disk": disk, "processes": processes,
    "read_only": read_only, "sick": sick,
}  # fmt: skip


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument(
        "--times", type=int, default=10, help="repetitions; unused by resume and sick"
    )
    args = parser.parse_args()
    packed = tar(official(made_up()))
    archive.ARCHIVE_MD5 = hashlib.md5(packed).hexdigest()  # runs are forks of this process
    table = Table()
    FAULTS[args.fault](args.times, packed, table)
    table.print()
    sys.exit(table.survived != table.times)


if __name__ == "__main__":
    main()
