"""Times this project and its peers side by side.

    python -m benchmarks                  # a table, and benchmarks.json; under 10 minutes
    python -m benchmarks --rounds 2       # shorter, and less sure
    python -m benchmarks --minutes 8      # on a GPU: all recipes, and what a step costs

Five programs train the report's network on the same 40,000 images, validate on 10,000, write
TensorBoard curves and a checkpoint after every epoch:

    a  the report's loop           PIL, ToTensor, DataLoader, .item()
    b  the usual Lightning way     the same loader, self.log and a metric each step, progress bar
    c  a bare eager loop           tensors in memory, nothing else
    d  the best bare loop          c with its memory kept; on a GPU one compiled CUDA graph a step
    e  this project                python train.py fit --config configs/base.yaml

All are started, and stopped in their tracks (SIGSTOP) but for the one whose turn it is. They take
turns of one epoch or more, a b c d e, a b c d e, ..., so a machine that is slow for a while is slow
for all. An epoch lasts from one checkpoint to the next. Then the same for a network that computes
next to nothing: what is left of a step is what its loop costs.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import gpu
from benchmarks.common import BATCH_SIZE, VAL_SIZE, machine

HERE = Path(__file__).parent.parent
TRAIN_SIZE = 50_000 - VAL_SIZE
STEPS = -(-TRAIN_SIZE // BATCH_SIZE)
NAMES = {
    "a": "the report's loop",
    "b": "the usual Lightning way",
    "c": "a bare eager loop",
    "d": "the best bare loop",
    "e": "this project",
}


class Program:
    """A way of training: a process of its own, on a terminal of its own, that runs in its turns."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command = [sys.executable, *command]
        self.folder = folder
        self.seconds: list[float] = []  # an epoch, of each turn
        self.start = 0.0  # seconds to the end of the first epoch
        self.process: subprocess.Popen[bytes] | None = None
        self.output = b""
        self.epochs = 0
        self.ended = self.stopped = 0.0  # the newest checkpoint, the last turn

    def turn(self, at_least: float) -> None:
        """Run until an epoch ends after `at_least` seconds; keep the mean time of its epochs."""
        if self.process is None:
            began = time.time()
            self.process = self._started()
            self.start = self._next_epoch(0) - began
        else:
            began, first = self.ended + time.time() - self.stopped, self.epochs
            os.killpg(self.process.pid, signal.SIGCONT)
            while self._next_epoch(self.epochs) - began < at_least:
                pass
            self.seconds.append((self.ended - began) / (self.epochs - first))
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.stopped = time.time()

    def _started(self) -> subprocess.Popen[bytes]:
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))  # rows, columns
        process = subprocess.Popen(
            self.command, stdout=slave, stderr=slave, cwd=HERE, start_new_session=True
        )
        os.close(slave)

        def read() -> None:
            while True:
                try:
                    self.output = (self.output + os.read(master, 65536))[-10_000:]
                except OSError:
                    return

        threading.Thread(target=read, daemon=True).start()
        return process

    def _next_epoch(self, after: int) -> float:
        """Wait for more epochs than `after`; return when the last of them ended."""
        assert self.process is not None
        while True:
            marks = list(self.folder.glob("epoch_*"))
            if len(marks) > after:
                newest = max(marks, key=lambda path: (len(path.name), path.name))
                self.epochs, self.ended = len(marks), newest.stat().st_mtime_ns / 1e9
                return self.ended
            if self.process.poll() is not None:
                time.sleep(0.1)
                sys.exit(
                    f"error: {' '.join(self.command)}:\n{self.output.decode(errors='replace')}"
                )
            time.sleep(0.01)  # seeing it late does no harm: the file knows when it was written

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it failed
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def programs(scratch: Path, root: str, device: str, network: str) -> dict[str, Program]:
    """Return the ways of training; a and b have the network as it is usually written."""
    plain = "PlainConvNet" if network == "ConvNet" else network
    shared = ["--root", root, "--device", device]
    commands = {
        "a": ["-m", "benchmarks.report_loop", *shared, "--network", plain],
        "b": ["-m", "benchmarks.usual_lightning", *shared, "--network", plain],
        "c": ["-m", "benchmarks.bare_loop", *shared, "--network", network],
        "d": ["-m", "benchmarks.bare_loop", *shared, "--network", network, "--best"],
    }
    if network == "Nothing":
        del commands["a"], commands["d"]
        commands["b"].append("--in_memory")
    ways = {
        way: Program([*command, str(scratch / way)], scratch / way / "checkpoints")
        for way, command in commands.items()
    }
    fit = ["train.py", "fit", "--config", "configs/base.yaml", "--data.root", root]
    fit += ["--trainer.accelerator", device, "--trainer.max_epochs", "1000000"]
    fit += ["--trainer.default_root_dir", str(scratch / "e")]
    if network != "ConvNet":
        fit += ["--model.network", f"benchmarks.common.{network}"]
        fit += ["--trainer.enable_progress_bar", "false"]
    return ways | {"e": Program(fit, scratch / "e" / "base" / "version_0" / "checkpoints")}


def measured(ways: dict[str, Program], rounds: int, at_least: float) -> dict[str, Any]:
    """Let all take their turns; return seconds an epoch, and of the start with the first epoch."""
    try:
        for number in range(rounds + 1):
            for way, program in ways.items():
                print(f"\r{number}/{rounds} {way} ", end="", file=sys.stderr, flush=True)
                program.turn(at_least)
    finally:
        print("\r\033[K", end="", file=sys.stderr)
        for program in ways.values():
            program.end()
    return {
        way: {
            "seconds": [round(s, 4) for s in program.seconds],
            "median": round(statistics.median(program.seconds), 4),
            "start": round(program.start, 2),
        }
        for way, program in ways.items()
    }


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default=default_device, help="the GPU if there is one"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way (7)")
    # A GPU goes on with what it was asked for while the program is stopped: turns must be long.
    parser.add_argument("--seconds", type=float, help="shortest turn (1, on a GPU 10)")
    parser.add_argument("--root", default="data", help="folder of the images (data)")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks.json"), help="where to write all turns"
    )
    suite = parser.add_argument_group(
        "in a given time, all that a GPU can show (benchmarks/gpu.py)"
    )
    suite.add_argument("--minutes", type=float, help="the time; without it, the five programs")
    suite.add_argument("--reference", type=Path, help="airbench94_muon.py, to train beside fast94")
    suite.add_argument("--runs", type=int, default=5, help="of fast94 and the reference (5)")
    suite.add_argument(
        "--fast_flags",
        default="--model.compile default --trainer.benchmark true",
        help="flags for fast94",
    )
    suite.add_argument("--synthetic", type=int, help="train on as many made-up images")
    suite.add_argument("--keep", type=Path, help="where to leave runs and logs")
    args = parser.parse_args()
    if args.minutes:
        with tempfile.TemporaryDirectory() as scratch:
            gpu.run(args, args.keep or Path(scratch))
        return
    args.seconds = args.seconds or (1.0 if args.device == "cpu" else 10.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    console = Console()
    about = machine(args.device)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    root = str(Path(args.root).absolute())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        epochs = measured(
            programs(folder / "epochs", root, args.device, "ConvNet"), args.rounds, args.seconds
        )
        console.print(_epoch_table(epochs))
        steps = measured(
            programs(folder / "steps", root, args.device, "Nothing"), args.rounds, args.seconds
        )
        console.print(_step_table(steps))
    result = {"machine": about, "epochs": epochs, "steps": steps}
    args.json.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {args.json}")


def _epoch_table(epochs: dict[str, Any]) -> Table:
    table = Table("", "", title="an epoch: 40,000 images trained, 10,000 validated", box=box.SIMPLE)
    for header in ("seconds", "from - to", "images/s", "/ e", "start"):
        table.add_column(header, justify="right")
    for way, times in epochs.items():
        table.add_row(
            way,
            NAMES[way],
            f"{times['median']:.2f}",
            f"{min(times['seconds']):.2f} - {max(times['seconds']):.2f}",
            f"{TRAIN_SIZE / times['median']:,.0f}",
            f"{times['median'] / epochs['e']['median']:.2f}",
            f"{times['start']:.0f}",
        )
    table.caption = "/ e: how many times as long as this project; start: until the end of epoch 0"
    return table


def _step_table(steps: dict[str, Any]) -> Table:
    table = Table("", "", title="a step of a network that computes next to nothing", box=box.SIMPLE)
    for header in ("milliseconds", "beyond c"):
        table.add_column(header, justify="right")
    step = {way: 1000 * times["median"] / STEPS for way, times in steps.items()}
    for way, milliseconds in step.items():
        table.add_row(way, NAMES[way], f"{milliseconds:.2f}", f"{milliseconds - step['c']:.2f}")
    table.caption = "all on tensors in memory, without progress bars; an epoch / 313 steps"
    return table


if __name__ == "__main__":
    main()
