"""All that a GPU can show, in a given time.

    python -m benchmarks --device cuda --minutes 12 --reference airbench94_muon.py
    python -m benchmarks --device cpu --minutes 2 --synthetic 400     # a rehearsal, two epochs each

Each step is a process with a time limit, the most telling first: one that fails or takes too long
takes no other along, and steps for which no time is left are left out.
"""

import argparse
import csv
import importlib.util
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import box
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import profile

import train
from benchmarks.common import HERE, shown, summary
from cifar10 import archive
from terminal import quieten

# ------------------------------------ how figures are read from a step's folder, output and seconds


def epochs(out: Path, text: str, seconds: float) -> dict[str, Any]:
    """Read the seconds from one checkpoint to the next."""
    times = sorted(file.stat().st_mtime for file in out.rglob("checkpoints/epoch_*"))
    found = summary([round(b - a, 4) for a, b in pairwise(times)])
    return {"s an epoch": found, "30 epochs s": round(30 * found["median"], 2)}


def accuracy(out: Path, text: str, seconds: float) -> dict[str, Any]:
    """Read the test accuracy."""
    return {"test/acc": json.loads((out / "version_0" / "test.json").read_text())["test/acc"]}


def same(out: Path, text: str, seconds: float) -> dict[str, Any]:
    """Compare the last weights with those of the first run of `base`."""
    folders = (out.with_name("base_graph"), out)
    files = [folder / "version_0" / "checkpoints" / "last.ckpt" for folder in folders]
    one, other = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    return {"same to the bit": all(torch.equal(one[name], other[name]) for name in one)}


def rate(out: Path, text: str, seconds: float) -> dict[str, Any]:
    """Read how many runs a minute a study has made."""
    return {"runs a minute": round(60 * len(list(out.rglob("model.pth"))) / seconds, 1)}


def printed(out: Path, text: str, seconds: float) -> dict[str, Any]:
    """Read the lines of JSON, one a turn."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    return {key: summary([row[key] for row in rows]) for key in rows[0]}


# Name, also of the folder; seconds that it may take; command; what reads its figures.
STEPS: list[tuple[str, float, str, Callable[[Path, str, float], dict[str, Any]]]] = [
    ("fast94", 300, "-m benchmarks.gpu fast94 {fast} {turns}", printed),
    ("base_graph", 90, "{fit}/base.yaml {flags} {graph}", epochs),
    ("base_graph_compiled", 90, "{fit}/base.yaml {flags} {graph} {compiled}", epochs),
    ("base_trace", 60, "-m benchmarks.gpu trace --config configs/base.yaml {flags} {graph}",
     printed),
    ("improved", 90, "{fit}/improved.yaml {flags} {graph}", epochs),
    ("improved", 60, "{test}", accuracy),
    ("again", 90, "{fit}/base.yaml {flags} {graph}", same),
    ("resumed", 90, "train.py fit --ckpt_path {middle} --name resumed", same),
    ("study_jobs_8", 120, "{study} --jobs 8 --seeds {seeds}", rate),
    ("study_jobs_1", 90, "{study} --jobs 1 --seeds [100,101]", rate),
    ("base_eager", 90, "{fit}/base.yaml {flags} --model.cuda_graph false", epochs),
    ("base_compiled", 90, "{fit}/base.yaml {flags} --model.cuda_graph false {compiled}", epochs),
    ("bare", 90, "-m benchmarks.peers c {out} {peer}", epochs),
    ("bare_best", 90, "-m benchmarks.peers d {out} {peer}", epochs),
    ("fast94_trace", 90, "-m benchmarks.gpu trace {fast} {graph}", printed),
    ("resnet18", 180, "{fit}/resnet18.yaml {flags} --data.val_size 0 --checkpoint.save_top_k -1",
     epochs),
    ("resnet18", 60, "{test}", accuracy),
]  # fmt: skip


def words_of(args: argparse.Namespace, runs: Path, name: str) -> dict[str, str]:
    """Return what stands in the braces of the commands; in a rehearsal all is small."""
    real, verify, quote = args.device == "cuda", str(not args.synthetic).lower(), shlex.quote
    root, out, count = quote(args.root), quote(str(runs / name)), 30 if real else 2
    flags = (
        f"--data.root {root} --data.val_size {args.val_size} --data.verify {verify} "
        f"--trainer.accelerator {args.device} --trainer.max_epochs {count} "
        f"--trainer.default_root_dir {quote(str(runs))} --name {name}"
    )
    small = "--model.network.widths [16,16,16] --trainer.precision 32-true --trainer.max_epochs 1"
    fast = "--model.compile default --trainer.benchmark true --trainer.max_epochs 8"
    fixed = {
        **{"data.root": args.root, "data.val_size": args.val_size, "data.verify": verify == "true"},
        **{"trainer.accelerator": args.device, "trainer.max_epochs": 10 if real else 1},
    }
    middle = runs / "base_graph/version_0/checkpoints" / f"epoch_{count // 2 - 1:02d}.ckpt"
    return {
        "flags": flags,
        "fit": "train.py fit --config configs",
        "graph": "--model.cuda_graph true",
        "compiled": f"--model.compile {'default' if real else 'off'}",
        "fast": f"--config configs/fast94.yaml {flags} {fast if real else small}",
        "turns": f"{args.rounds} {quote(str(args.reference and args.reference.absolute()))}",
        "test": f"train.py test --ckpt_path {out}/version_0/checkpoints/last.ckpt",
        "middle": quote(str(middle)),
        "study": f"study.py configs/studies/batch_size.yaml --folder {out} --grid "
        f"'{{\"data.batch_size\": [128]}}' --fixed {quote(json.dumps(fixed))}",
        "seeds": json.dumps(list(range(16 if real else 4))).replace(" ", ""),
        "out": out,
        "peer": f"--root {root} --val_size {args.val_size} --verify {verify} "
        f"--device {args.device} --epochs {count}",
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the steps until the time is over; return what they found."""
    found: dict[str, Any] = {}
    runs, end = (folder / "runs").absolute(), time.monotonic() + 60 * args.minutes
    runs.mkdir(parents=True)
    for name, limit, command, read in STEPS:
        if args.only and name not in args.only:
            continue
        figures, log, began = found.setdefault(name, {}), folder / f"{name}.log", time.monotonic()
        if end - began < 5:
            figures["failed"] = "left out: no time"
            continue
        words = shlex.split(command.format(**words_of(args, runs, name)))
        why = _run(words, min(limit, end - began), log)
        seconds = time.monotonic() - began
        figures.setdefault("process s", round(seconds, 1))
        try:
            figures |= read(runs / name, log.read_text(), seconds)  # if it failed, perhaps a part
        except (OSError, LookupError, ValueError):
            why = why or f"no figures in {log}"
        figures |= {"failed": why} if why else {}
        print(f"{name}: {seconds:.0f} s {why}", flush=True)
    return found


def _run(command: list[str], limit: float, log: Path) -> str:
    """Run a program; return why it failed, or nothing."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, cwd=HERE,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"took over {limit:.0f} s"
        finally:
            if process.poll() is None:  # with all its children
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"exit code {code}: {log.read_text()[-300:]}" if code else ""


def table_of(found: dict[str, Any]) -> Table:
    """Return a table of all figures."""
    table = Table("", "process s", "figures: medians (range)", box=box.SIMPLE)
    for name, figures in found.items():
        rest = [f"{key} {shown(value)}" for key, value in figures.items() if key != "process s"]
        table.add_row(name, f"{figures.get('process s', '')}", ", ".join(rest))
    return table


# ------------------------------------------------------------------ programs of which steps consist


class Trace(Callback):
    """Times the steps of epoch 1, and traces the kernels of epoch 2."""

    takes_many_steps = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        if trainer.current_epoch == 2:
            self.profiler = profile()
            self.profiler.start()
        self.first, self.started = trainer.global_step, _now()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last step; print the figures."""
        seconds, steps = _now() - self.started, trainer.global_step - self.first
        if trainer.current_epoch == 1:
            self.ms = round(1000 * seconds / steps, 4)
        if trainer.current_epoch != 2:
            return
        self.profiler.stop()
        events: Any = self.profiler.events()  # type: ignore[no-untyped-call]
        on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
        kernels = [event for event in on_gpu if not event.is_user_annotation]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1000
        found = {"ms a step": self.ms, "ms of kernels": round(busy / steps, 4)}
        found["kernels a step"] = round(len(kernels) / steps, 1)
        found["waits an epoch"] = sum(event.name.endswith("Synchronize") for event in events)
        print(self.profiler.key_averages().table("self_device_time_total", row_limit=25))
        print(json.dumps(found))


def _now() -> float:
    """Return the time in seconds, once a GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fast94(flags: list[str], rounds: int, path: str) -> None:
    """Train the reference, as it times itself, and `fast94` in turn; print each turn as JSON."""
    data = archive.load(_value(flags, "--data.root"), verify=False)
    folder = _value(flags, "--trainer.default_root_dir")
    run = reference(path, data, folder) if path != "None" else None
    for seed in range(rounds):
        row = run(seed) if run else {}
        row |= ours(flags, seed, len(data.train_labels))
        if run:
            row["ours / reference"] = row["ours s"] / row["reference s"]
        print(json.dumps(row), flush=True)


def ours(flags: list[str], seed: int, images: int) -> dict[str, float]:
    """Train `fast94` on all images and test it; return seconds, at its median of images a second,
    which leaves out compilation, and test accuracy."""
    name = f"fast94_{seed}"
    folder = Path(_value(flags, "--trainer.default_root_dir"), name, "version_0")
    test = ["test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    fit = ["fit", *flags, "--data.val_size", "0", "--seed_everything", f"{seed}", "--name", name]
    for words in (fit, test):
        subprocess.run([sys.executable, "train.py", *words], cwd=HERE, check=True)
    with (folder / "metrics.csv").open() as file:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    found = json.loads((folder / "test.json").read_text())
    seconds = len(rates) * images / statistics.median(rates)
    return {"ours s": round(seconds, 4), "ours test/acc": found["test/acc"]}


def reference(path: str, data: archive.CIFAR10, folder: str) -> Callable[[int], dict[str, float]]:
    """Return a function that trains the reference, a file of KellerJordan/cifar10-airbench, which
    is compiled in a run before."""
    Path(folder, "cifar10").mkdir()
    os.chdir(folder)  # where it looks for its images
    for part in ("train", "test"):
        images = getattr(data, f"{part}_images").permute(0, 2, 3, 1).contiguous()
        content = {"images": images, "labels": getattr(data, f"{part}_labels").long()}
        torch.save({**content, "classes": list(archive.CLASSES)}, f"cifar10/{part}.pt")
    spec: Any = importlib.util.spec_from_file_location("reference", path)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    times: list[float] = []
    module.print_training_details = lambda row, is_final_entry: times.append(row["time_seconds"])
    network = module.CifarNet().cuda().to(memory_format=torch.channels_last)
    network.compile(mode="max-autotune")
    module.main("warmup", network)

    def run(seed: int) -> dict[str, float]:
        result = module.main(seed, network)
        accuracy = result[1] if isinstance(result, tuple) else result
        return {"reference s": times[-2], "reference test/acc": accuracy}  # times[-1]: with test

    return run


def _value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


if __name__ == "__main__":
    if sys.argv[1] == "fast94":
        fast94(sys.argv[2:-2], int(sys.argv[-2]), sys.argv[-1])
    else:
        quieten()
        train.CLI(["fit", *sys.argv[2:], "--trainer.max_epochs", "3"], [Trace()])
