"""Shared by all benchmarks: running programs, made-up images, and summaries of figures."""

import contextlib
import datetime
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from runs import processor

HERE = Path(__file__).parent.parent
DATA = (
    "--data.root {root} --data.val_size {val_size} --data.verify {verify} "
    "--trainer.accelerator {device}"
)
PEER = (
    "-m benchmarks.peers {out} --root {root} --val_size {val_size} --device {device} "
    "--network {network}"
)


def words(command: str, **values: Any) -> list[str]:
    """Split a command into words, replacing each {key} with its value."""
    return [word.format(**values) for word in command.split()]


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a Python program that writes to a log; at the end, kill it with all its children."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, cwd=HERE,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def checkpoint_times(folder: Path) -> list[float]:
    """Return the times at which a run's epoch checkpoints were written, in seconds, sorted."""
    return sorted(file.stat().st_mtime for file in folder.rglob("checkpoints/epoch_*"))


def make_synthetic(root: Path, size: int) -> None:
    """Write noise images in CIFAR-10's format."""
    (folder := root / "cifar-10-arrays").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", size), ("test", size // 5)):
        images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        np.save(folder / f"{part}_images.npy", images)
        np.save(folder / f"{part}_labels.npy", rng.integers(0, 10, count, dtype=np.uint8))


def machine(device: str) -> dict[str, Any]:
    """Return the hardware and versions behind the figures."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def summary(turns: Sequence[float]) -> dict[str, Any]:
    """Return the median and range of a figure, with all turns."""
    figures = {"median": statistics.median(turns), "low": min(turns), "high": max(turns)}
    return {**{key: round(value, 4) for key, value in figures.items()}, "turns": list(turns)}


def shown(figure: Any) -> str:
    """Return a figure as text: the median and range of turns, or all of several figures."""
    if not isinstance(figure, dict):
        return str(figure)
    if "turns" not in figure:
        return ", ".join(f"{key} {shown(value)}" for key, value in figure.items())
    if len(figure["turns"]) == 1:
        return "{median:.4g}".format(**figure)
    return "{median:.4g} ({low:.3g} to {high:.3g})".format(**figure)
