"""All that is worth knowing about a GPU, in a given time.

    python -m benchmarks --device cuda --minutes 8 --reference airbench94_muon.py

Each step is a process of its own with a time limit: one that fails or takes too long takes no other
along. Steps come in the order of their worth and are left out when the time is over. With
`--device cpu` the same on two made-up epochs, to see that it works.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine

HERE = Path(__file__).parent.parent
GRAPHS = ("--model.cuda_graph", "true")
NO_GRAPHS = ("--model.cuda_graph", "false")
BASES = {
    "base, recorded": GRAPHS,
    "base, recorded and compiled": (*GRAPHS, "--model.compile", "default"),
    "base, eager": NO_GRAPHS,
    "base, reduce-overhead": (*NO_GRAPHS, "--model.compile", "reduce-overhead"),
    "base, compile default": (*NO_GRAPHS, "--model.compile", "default"),
}


class Suite:
    """Runs steps until the time is over, and keeps what they found."""

    def __init__(self, scratch: Path, args: Any) -> None:
        self.scratch, self.args = scratch, args
        self.end = time.monotonic() + 60 * args.minutes
        self.root = str(Path(args.root).absolute())
        self.is_trial = args.device == "cpu"
        self.flags = ["--data.root", self.root, "--trainer.accelerator", args.device]
        if args.synthetic:
            self.root = str(scratch / "data")
            _write_made_up(scratch / "data" / "cifar-10-arrays", args.synthetic)
            self.flags[1] = self.root
            self.flags += ["--data.verify", "false", "--data.val_size", str(args.synthetic // 5)]
        self.found: dict[str, Any] = {}

    def log(self, name: str) -> Path:
        """Return where a step's output goes."""
        return self.scratch / f"{name.replace(' ', '_').replace(',', '')}.log"

    def run(self, name: str, command: list[str], limit: float) -> float | None:
        """Run a program; return its seconds, or None if it failed or had no time."""
        limit = min(limit, self.end - time.monotonic())
        if limit < 5:
            self.found[name] = {"left out": "no time"}
            return None
        began = time.monotonic()
        log = self.log(name)
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=output, stderr=output, cwd=HERE,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"over {limit:.0f} s"
        seconds = time.monotonic() - began
        if code:
            print(f"{name}: {code}\n{log.read_text()[-1500:]}", flush=True)
            self.found[name] = {"failed": str(code)}
            return None
        self.found[name] = {"process": round(seconds, 2)}
        print(f"{name}: {seconds:.1f} s", flush=True)
        return seconds

    def fit(self, name: str, recipe: str, *flags: str, epochs: int = 30, limit: float = 90) -> Path:
        """Train a recipe; keep the seconds of its epochs, from one checkpoint to the next."""
        folder = self.scratch / "runs" / name.replace(" ", "_").replace(",", "")
        epochs = min(epochs, 2) if self.is_trial else epochs
        command = ["train.py", "fit", "--config", f"configs/{recipe}.yaml", *self.flags]
        command += ["--trainer.default_root_dir", str(folder.parent), "--name", folder.name]
        command += ["--trainer.max_epochs", str(epochs), *flags]
        if self.run(name, command, limit) is not None:
            self.found[name] |= _epochs(folder / "version_0" / "checkpoints")
        return folder / "version_0"

    def test(self, name: str, folder: Path) -> None:
        """Test the last epoch; keep its accuracy."""
        files = sorted((folder / "checkpoints").glob("epoch_*.ckpt"))
        if files and self.run(
            f"{name}, test", ["train.py", "test", "--ckpt_path", str(files[-1])], 60
        ):
            result = json.loads((folder / "test.json").read_text())
            self.found[name]["accuracy"] = result["test/acc"]

    def bare(self, name: str, *flags: str) -> None:
        """Run the loop without Lightning."""
        folder = self.scratch / name.replace(" ", "_")
        command = ["-m", "benchmarks.bare_loop", "--root", self.root, "--device", self.args.device]
        command += ["--epochs", "2" if self.is_trial else "30", *flags, str(folder)]
        if self.args.synthetic:
            command += ["--val_size", str(self.args.synthetic // 5), "--unverified"]
        if self.run(name, command, 90) is not None:
            self.found[name] |= _epochs(folder / "checkpoints")

    def study(self, jobs: int, runs: int) -> None:
        """Let a study make some short runs of `base`; keep how many a minute."""
        name = f"study, {jobs} at a time"
        fixed: dict[str, Any] = dict(
            zip(map(_bare_flag, self.flags[::2]), self.flags[1::2], strict=True)
        )
        fixed["trainer.max_epochs"] = 2 if self.is_trial else 10
        fixed = {key: yaml.safe_load(str(value)) for key, value in fixed.items()}
        question = {"question": "How many runs a minute?", "config": "configs/base.yaml",
                    "grid": {"data.batch_size": [128]}, "fixed": fixed,
                    "seeds": [100 * jobs + i for i in range(runs)]}  # fmt: skip
        file = self.scratch / f"jobs_{jobs}.yaml"
        file.write_text(yaml.safe_dump(question))
        folder = self.scratch / "studies" / file.stem
        command = ["study.py", str(file), "--jobs", str(jobs), "--folder", str(folder)]
        seconds = self.run(name, command, 120)
        if seconds:
            self.found[name]["runs a minute"] = round(60 * runs / seconds, 1)

    def bits(self, folder: Path) -> None:
        """Train `base` again, and from the middle on; compare."""
        whole = folder / "checkpoints" / "last.ckpt"
        again = self.fit("base, again", "base", *GRAPHS) / "checkpoints" / "last.ckpt"
        middle = sorted((folder / "checkpoints").glob("epoch_*.ckpt"))
        if not middle:
            return
        command = ["train.py", "fit", "--ckpt_path", str(middle[len(middle) // 2 - 1])]
        self.run("base, resumed", command, 60)
        resumed = folder.with_name("version_1") / "checkpoints" / "last.ckpt"
        same = {"again": _is_same(whole, again), "resumed": _is_same(whole, resumed)}
        self.found["to the bit"] = same

    def speedrun(self, limit: float) -> None:
        """Train `fast94` and its reference in turn."""
        file = self.scratch / "speedrun.json"
        command = ["-m", "benchmarks.speedrun", "--root", self.root, "--json", str(file.absolute())]
        command += ["--runs", str(self.args.runs), *self.args.fast_flags.split(), *self.flags[2:]]
        if self.args.reference:
            command += ["--reference", str(self.args.reference)]
        if self.is_trial:
            command += ["--trainer.max_epochs", "1", "--model.network.widths", "[24,32,32]"]
        self.run("fast94", command, limit)
        if file.exists():
            self.found["fast94"] |= json.loads(file.read_text())

    def profile(self, recipe: str, *flags: str) -> None:
        """Keep what a step costs beyond its kernels."""
        name, trace = f"{recipe}, profile", self.scratch / f"{recipe}.json"
        command = ["-m", "benchmarks.profile", str(trace), "--config", f"configs/{recipe}.yaml"]
        if self.run(name, [*command, *self.flags, *flags], 60):
            self.found[name] |= json.loads(self.log(name).read_text().strip().splitlines()[-1])

    def all(self) -> None:
        """Run all steps, the most telling first; side by side where seconds do not matter."""
        fast = self.args.fast_flags.split()
        first, *others = BASES.items()
        self.speedrun(0.6 * (self.end - time.monotonic()))
        base = self.fit(first[0], "base", *first[1])
        self.fit(others[0][0], "base", *others[0][1])
        self.bare("bare loop, graph", "--best")
        improved = self.fit("improved", "improved", *GRAPHS)
        with ThreadPoolExecutor() as pool:
            pool.submit(self.bits, base)
            pool.submit(self.test, "improved", improved)
            whole = ("--data.val_size", "0", "--checkpoint.save_top_k", "-1")
            resnet = pool.submit(self.fit, "resnet18", "resnet18", *whole, *GRAPHS).result()
            self.test("resnet18", resnet)
        self.study(8, 16)
        self.study(1, 2)
        self.fit(others[1][0], "base", *others[1][1])
        self.profile("base", *GRAPHS)
        self.profile("fast94", *fast, *GRAPHS)
        self.bare("bare loop")
        for name, flags in others[2:]:
            self.fit(name, "base", *flags)


def run(args: Any, scratch: Path) -> None:
    """Run the suite; print the table, write the JSON."""
    console = Console(width=110)
    scratch.mkdir(parents=True, exist_ok=True)
    suite = Suite(scratch, args)
    try:
        suite.all()
    finally:
        result = {"machine": machine(), "steps": suite.found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        console.print(_table(suite.found))
        console.print(", ".join(f"{key} {value}" for key, value in machine().items()))


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE)
    for header in ("", "process, s", "an epoch, s", "30 epochs, s", "and"):
        table.add_column(header, justify="left" if header in ("", "and") else "right")
    for name, values in found.items():
        values = dict(values)
        epoch = values.pop("epoch", None)
        process = values.pop("process", None)
        for key in ("epochs", "machine", "flags"):
            values.pop(key, None)
        for who in ("ours", "reference"):
            runs = values.pop(who, [])
            if runs:
                seconds = [run["seconds"] for run in runs]
                accuracy = statistics.mean(run["accuracy"] for run in runs)
                values[who] = f"{statistics.median(seconds):.3f} s, {accuracy:.4f} (n {len(runs)})"
        table.add_row(
            name,
            f"{process:.1f}" if process else "",
            f"{epoch:.4f}" if epoch else "",
            f"{30 * epoch:.2f}" if epoch else "",
            ", ".join(f"{key} {value}" for key, value in values.items()),
        )
    return table


def _epochs(folder: Path) -> dict[str, Any]:
    """Return the seconds of all epochs but the first, and their median."""
    times = [file.stat().st_mtime for file in sorted(folder.glob("epoch_*"))]
    epochs = [round(b - a, 4) for a, b in pairwise(times)]
    return {"epoch": statistics.median(epochs), "epochs": epochs} if epochs else {}


def _is_same(one: Path, other: Path) -> bool | str:
    if not (one.exists() and other.exists()):
        return "not there"
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in (one, other))
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _bare_flag(flag: str) -> str:
    return flag.removeprefix("--")


def _write_made_up(folder: Path, size: int) -> None:
    """Write images whose classes are patterns of colour and noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 128, (10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    for part, count in (("train", size), ("test", size // 5)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        noise = rng.integers(0, 128, (count, 3, 32, 32), dtype=np.uint8)
        np.save(folder / f"{part}_images.npy", patterns[labels].astype(np.uint8) + noise)
        np.save(folder / f"{part}_labels.npy", labels)
