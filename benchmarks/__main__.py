"""Time this project and its peers side by side.

    python -m benchmarks                # about 8 minutes on two cores
    python -m benchmarks --rounds 2     # shorter, and less certain
    python -m benchmarks --device cuda --minutes 12 --reference airbench94_muon.py    # see gpu.py

Five programs train the report's network on 40,000 images, validate on 10,000, and write curves and
a checkpoint after every epoch: (a) to (d) of benchmarks/peers.py, and (e), this project's
`python train.py fit --config configs/base.yaml`. They take turns of an epoch or more, a b c d e,
e d c b a, ..., each stopped (SIGSTOP) while the others run. Ratios compare two turns of one round,
so a slow minute affects both. CPU seconds are user and system time of all processes of a program.
An epoch lasts from one checkpoint to the next. None draws a progress bar. The same is then timed
for a network that computes next to nothing, where a step costs little but its loop.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import common, gpu

NAMES = {
    "a": "the report's loop",
    "b": "the usual Lightning way",
    "c": "a bare eager loop",
    "d": "the best bare loop",
    "e": "this project",
}


def turns(
    command: list[str], folder: Path, at_least: float
) -> Generator[tuple[float, float], None, None]:
    """Run a program in turns; yield the wall and CPU seconds per epoch of each turn.

    A turn lasts until an epoch ends after `at_least` seconds; then the program is stopped until the
    next turn is requested. The first turn starts it and lasts one epoch: ignore its figures.
    """
    log = folder.with_suffix(".log")
    times, began, cpu = list[float](), 0.0, 0.0
    with common.running(command, log) as process:
        while True:
            done = len(times)
            while len(times) == done or times[-1] - began < at_least:
                if process.poll() is not None:
                    last_words = log.read_text(errors="replace")[-10_000:]
                    sys.exit(f"error: {' '.join(command)}:\n{last_words}")
                time.sleep(0.05)  # a delay is harmless: the file's mtime counts
                times = common.checkpoint_times(folder)
            os.killpg(process.pid, signal.SIGSTOP)
            stopped, previous, cpu = time.time(), cpu, cpu_seconds(process.pid)
            epochs = len(times) - done
            yield (times[-1] - began) / epochs, (cpu - previous) / epochs
            began = times[-1] + time.time() - stopped  # excludes the pause
            os.killpg(process.pid, signal.SIGCONT)


def cpu_seconds(pid: int) -> float:
    """Return user and system seconds of a process and its children, including those that ended."""
    process = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:4]) for p in (process, *process.children(recursive=True)))


def programs(args: argparse.Namespace, scratch: Path, network: str) -> dict[str, list[str]]:
    """Return the commands, which train in scratch/<way>; a and b train `PlainConvNet` instead of
    `ConvNet`."""
    fit = f"train.py fit --config configs/base.yaml {common.DATA} --trainer.max_epochs 1000000"
    fit += " --trainer.default_root_dir {out}"
    if network == "Tiny":  # `auto` can't tell that it can be recorded
        fit += " --model.network benchmarks.peers.Tiny --model.cuda_graph "
        fit += "true" if args.device == "cuda" else "false"
    commands = {}
    for way in "abcde" if network == "ConvNet" else "bce":
        name = "PlainConvNet" if network == "ConvNet" and way in "ab" else network
        command = fit if way == "e" else f"{common.PEER} --way {way}"
        commands[way] = common.words(command, **vars(args), out=scratch / way, network=name)
    return commands


def measure(
    ways: dict[str, list[str]], scratch: Path, rounds: int, at_least: float, unit: float = 1.0
) -> dict[str, Any]:
    """Run all turns; return the time per epoch in 1/unit seconds, and ratios to (c) and (e)."""
    scratch.mkdir()
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        programs = {
            way: stack.enter_context(contextlib.closing(turns(command, scratch / way, at_least)))
            for way, command in ways.items()
        }
        for number in range(rounds + 1):
            # Reverse every other round, so that a slow drift cancels out.
            for way in sorted(ways, reverse=number % 2 == 1):
                print(f"{number}/{rounds} {way}", end="\r", file=sys.stderr, flush=True)
                taken[way].append(next(programs[way]))
    figures: dict[str, Any] = {way: {} for way in ways}
    for number, clock in enumerate(("wall", "cpu")):
        times = {way: [unit * turn[number] for turn in taken[way][1:]] for way in ways}
        for way, other in product(ways, "ce"):
            ratios = [a / b for a, b in zip(times[way], times[other], strict=True)]
            figures[way][clock] = common.summary(times[way])
            figures[way][f"{clock} / {other}"] = common.summary(ratios)
    return figures


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option, has_gpu = parser.add_argument, torch.cuda.is_available()
    option("--device", choices=["cpu", "cuda"], default="cuda" if has_gpu else "cpu")
    option("--rounds", type=int, default=7, help="turns per program (7)")
    # A GPU finishes queued work while its program is stopped, so turns must be long.
    option("--seconds", type=float, help="minimum seconds per turn (1, on a GPU 10)")
    option("--root", default="data", help="folder of the images (data)")
    option("--synthetic", type=int, metavar="N", help="train on N synthetic images")
    option("--json", type=Path, default=Path("benchmarks.json"), help="file for all figures")
    option("--minutes", type=float, help="run the GPU benchmarks instead, for this long")
    option("--reference", type=Path, help="airbench94_muon.py, to alternate with fast94")
    option("--only", nargs="+", help="steps of --minutes to run (all)")
    option("--keep", type=Path, help="keep runs and logs of --minutes in this folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    console, result = Console(width=110), {"machine": common.machine(args.device)}
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))

    def report(part: str, data: Any, title: str, columns: list[str], rows: dict[str, Any]) -> None:
        result[part] = data
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        table = Table("", *columns, title=title, box=box.SIMPLE)
        for name, figures in rows.items():
            table.add_row(name, *(common.shown(figures[column]) for column in columns))
        console.print(table)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        args.root = str(scratch / "data" if args.synthetic else Path(args.root).absolute())
        args.verify, args.val_size = str(not args.synthetic).lower(), 10_000
        if args.synthetic:
            args.val_size = args.synthetic // 5
            common.make_synthetic(Path(args.root), args.synthetic)
        if args.minutes:
            data = gpu.measure(args, args.keep or scratch)
            rows = {name: {"figures": figures} for name, figures in data.items()}
            report("gpu", data, "medians (range)", ["figures"], rows)
            return
        images = (args.synthetic or 50_000) - args.val_size
        at_least = args.seconds or (1.0 if args.device == "cpu" else 10.0)
        for part, network, other, unit, title in (
            ("epochs", "ConvNet", "e", 1.0, f"seconds per epoch of {images:,} images"),
            ("steps", "Tiny", "c", 1000 / -(-images // 128), "milliseconds per step, tiny network"),
        ):
            commands = programs(args, scratch / part, network)
            data = measure(commands, scratch / part, args.rounds, at_least, unit)
            rows = {}
            for way, figures in data.items():
                wall, cpu = (figures[clock]["median"] for clock in ("wall", "cpu"))
                figures["images/s"] = round(images * unit / wall)
                rows[f"{way}  {NAMES[way]}"] = figures | {"wall": wall, "cpu": cpu}
            columns = ["wall", f"wall / {other}", "cpu", f"cpu / {other}", "images/s"]
            report(part, data, f"{title}; ratios turn by turn (range)", columns, rows)


if __name__ == "__main__":
    main()
