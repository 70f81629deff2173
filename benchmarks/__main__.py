"""Times this project and its peers side by side.

    python -m benchmarks                # about 8 minutes on two cores
    python -m benchmarks --rounds 2     # shorter, and less certain
    python -m benchmarks --device cuda --minutes 12 --reference airbench94_muon.py    # see gpu.py

Five programs train the report's network on 40,000 images, validate on 10,000, and write curves and
a checkpoint after every epoch: (a) to (d) of benchmarks/peers.py, and (e), this project's
`python train.py fit --config configs/base.yaml`. They take turns of an epoch or more, a b c d e,
e d c b a, ..., each stopped (SIGSTOP) while the others run. Ratios are of two turns of one round:
a slow minute counts for both. CPU seconds are user and system time of all processes of a program.
An epoch lasts from one checkpoint to the next. Then the same for a network that computes next to
nothing: what is left of a step is what its loop costs.
"""

import argparse
import contextlib
import fcntl
import json
import os
import pty
import signal
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
from benchmarks.common import HERE, machine, make_synthetic, summary

NAMES = {
    "a": "the report's loop",
    "b": "the usual Lightning way",
    "c": "a bare eager loop",
    "d": "the best bare loop",
    "e": "this project",
}


class Program:
    """A way of training: a process of its own, on a terminal of its own, that runs in its turns."""

    def __init__(self, command: list[str], checkpoints: Path) -> None:
        self.command, self.checkpoints = [sys.executable, *command], checkpoints
        self.wall: list[float] = []  # seconds an epoch, of each turn
        self.cpu: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.output = b""
        self.epochs, self.ended = 0, 0.0  # when the newest checkpoint was written
        self.stopped = 0.0

    def turn(self, at_least: float) -> None:
        """Run until an epoch ends after `at_least` seconds; the first turn starts the program."""
        if self.process is None:
            self.process = self._start()
            self._wait_for_epoch()
        else:
            began = self.ended + time.time() - self.stopped
            first, cpu = self.epochs, cpu_seconds(self.process.pid)
            os.killpg(self.process.pid, signal.SIGCONT)
            while self.ended - began < at_least:
                self._wait_for_epoch()
            epochs = self.epochs - first
            self.wall.append((self.ended - began) / epochs)
            self.cpu.append((cpu_seconds(self.process.pid) - cpu) / epochs)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.stopped = time.time()

    def _start(self) -> "subprocess.Popen[bytes]":
        terminal, its_end = pty.openpty()
        fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
        process = subprocess.Popen(
            self.command, stdout=its_end, stderr=its_end, cwd=HERE, start_new_session=True
        )
        os.close(its_end)

        def read() -> None:
            with contextlib.suppress(OSError):  # the program has ended
                while True:
                    self.output = (self.output + os.read(terminal, 65536))[-10_000:]

        threading.Thread(target=read, daemon=True).start()
        return process

    def _wait_for_epoch(self) -> None:
        while len(files := list(self.checkpoints.glob("epoch_*"))) == self.epochs:
            if self.process is not None and self.process.poll() is not None:
                time.sleep(0.1)  # for its last words
                sys.exit(
                    f"error: {' '.join(self.command)}:\n{self.output.decode(errors='replace')}"
                )
            time.sleep(0.01)  # seeing it late does no harm: the file knows when it was written
        self.epochs, self.ended = len(files), max(file.stat().st_mtime for file in files)

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it failed
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def cpu_seconds(group: int) -> float:
    """Return user and system seconds of a group's processes and of their children that ended; 0
    where there is no /proc."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = file.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def programs(args: argparse.Namespace, scratch: Path, network: str) -> dict[str, Program]:
    """Return the ways of training; a and b have the network as it is usually written."""
    ways, verify, size = {}, str(not args.synthetic).lower(), str(args.val_size)
    for way in "abcd" if network == "ConvNet" else "bc":
        name = "PlainConvNet" if network == "ConvNet" and way in "ab" else network
        command = ["-m", "benchmarks.peers", way, str(scratch / way), "--network", name]
        command += ["--root", args.root, "--val_size", size, "--verify", verify]
        ways[way] = Program([*command, "--device", args.device], scratch / way / "checkpoints")
    fit = ["train.py", "fit", "--config", "configs/base.yaml", "--data.root", args.root]
    fit += ["--data.val_size", size, "--data.verify", verify, "--trainer.accelerator", args.device]
    fit += ["--trainer.max_epochs", "1000000", "--trainer.default_root_dir", str(scratch / "e")]
    if network == "Tiny":
        fit += ["--model.network", "benchmarks.common.Tiny", "--trainer.enable_progress_bar=false"]
        # `auto` does not know that this network can be recorded.
        fit += ["--model.cuda_graph", str(args.device == "cuda").lower()]
    return ways | {"e": Program(fit, scratch / "e" / "base" / "version_0" / "checkpoints")}


def measure(ways: dict[str, Program], rounds: int, at_least: float) -> dict[str, Any]:
    """Let all take their turns; return seconds an epoch, and their ratios to those of c and e."""
    try:
        for number in range(rounds + 1):
            # Every other round goes backwards, so that a slow drift cancels out.
            for way in sorted(ways, reverse=number % 2 == 1):
                print(f"\r{number}/{rounds} {way} ", end="", file=sys.stderr, flush=True)
                ways[way].turn(at_least)
    finally:
        print("\r\033[K", end="", file=sys.stderr)
        for program in ways.values():
            program.end()
    found: dict[str, Any] = {way: {} for way in ways}
    for way, figures in found.items():
        for clock in ("wall", "cpu"):
            turns = getattr(ways[way], clock)
            figures[clock] = summary(turns)
            for other in "ce":
                pairs = zip(turns, getattr(ways[other], clock), strict=True)
                ratios = [turn / its for turn, its in pairs if its]  # 0: no /proc, or too short
                figures[f"{clock} / {other}"] = summary(ratios or [0.0])
    return found


def table_of(found: dict[str, Any], other: str, title: str, images: int, steps: int) -> Table:
    """Return a table of seconds an epoch, or of milliseconds a step if an epoch has `steps`."""
    table, scale = Table("", "", title=title, box=box.SIMPLE), 1000 / steps if steps else 1.0
    for clock in ("wall", "cpu"):
        for header in (f"{clock} {'ms' if steps else 's'}", f"{clock} / {other}, by turns"):
            table.add_column(header, justify="right")
    table.add_column("images/s", justify="right")
    for way, figures in found.items():
        row = []
        for clock in ("wall", "cpu"):
            row.append(f"{scale * figures[clock]['median']:.2f}")
            row.append(
                "{median:.2f} ({low:.2f} to {high:.2f})".format(**figures[f"{clock} / {other}"])
            )
        table.add_row(way, NAMES[way], *row, f"{images / figures['wall']['median']:,.0f}")
    return table


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, has_gpu = parser.add_argument, torch.cuda.is_available()
    option("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    option("--rounds", type=int, default=7, help="turns of each program (7)")
    # A GPU finishes what it was asked for while its program is stopped: turns must be long.
    option("--seconds", type=float, help="shortest turn (1, on a GPU 10)")
    option("--root", default="data", help="folder of the images (data)")
    option("--synthetic", type=int, metavar="N", help="train on N made-up images")
    option("--json", type=Path, default=Path("benchmarks.json"), help="receives all figures")
    option("--minutes", type=float, help="measure all that a GPU can show in this time instead")
    option("--reference", type=Path, help="airbench94_muon.py, to train in turn with fast94")
    option("--only", nargs="+", help="names of steps of --minutes (all)")
    option("--keep", type=Path, help="folder where runs and logs of --minutes stay")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    console, result = Console(width=110), {"machine": machine(args.device)}
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))

    def report(part: str, figures: dict[str, Any], table: Table) -> None:
        result[part] = figures
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(table)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        args.root = str(scratch / "data" if args.synthetic else Path(args.root).absolute())
        args.val_size = args.synthetic // 5 if args.synthetic else 10_000
        if args.synthetic:
            make_synthetic(Path(args.root), args.synthetic)
        if args.minutes:
            found = gpu.measure(args, args.keep or scratch)
            report("gpu", found, gpu.table_of(found))
            return
        images = (args.synthetic or 50_000) - args.val_size
        at_least = args.seconds or (1.0 if args.device == "cpu" else 10.0)
        found = measure(programs(args, scratch / "epochs", "ConvNet"), args.rounds, at_least)
        title = f"an epoch: {images:,} images trained, {args.val_size:,} validated"
        report("epochs", found, table_of(found, "e", title, images, 0))
        found = measure(programs(args, scratch / "steps", "Tiny"), args.rounds, at_least)
        title = "a step of a network that computes next to nothing"
        report("steps", found, table_of(found, "c", title, images, -(-images // 128)))
    console.print(f"medians; ratios turn by turn, with their range; all written to {args.json}")


if __name__ == "__main__":
    main()
