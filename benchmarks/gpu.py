"""Everything to measure on a GPU in a given time; `fast94` beside its reference on any device.

    python -m benchmarks --device cuda --minutes 12 --reference airbench94_muon.py
    python -m benchmarks --device cpu --minutes 9 --rounds 1 --synthetic 400     # a rehearsal
    python -m benchmarks --device cpu --minutes 90 --rounds 2 --only fast94 \
        --reference airbench94_muon.py

Each step is a process with a time limit, the most informative first. A step that fails or times out
doesn't affect the others, and steps are skipped when no time is left.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count, pairwise, repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import profile

import optimization
import train
from benchmarks import common
from cifar10 import archive

RUN = common.DATA + " --trainer.default_root_dir {runs} --name {name}"
BASE, IMPROVED, RESNET18 = (
    f"--config configs/{recipe}.yaml --trainer.max_epochs {{epochs}} {RUN}"
    for recipe in ("base", "improved", "resnet18")
)
GRAPH, EAGER = "--model.cuda_graph true", "--model.cuda_graph false"
MIDDLE = "{runs}/base_graph/version_0/checkpoints/epoch_{middle:02d}.ckpt"
TEST = "train.py test --ckpt_path {out}/version_0/checkpoints/last.ckpt"
STUDY = "study.py configs/studies/batch_size.yaml --folder {out} --fixed {fixed} --grid {grid}"


# Code of the reference that a CPU can't run, and its replacement.
ON_CPU = {
    "@torch.compile": "", 'device("cuda")': 'device("cpu")', 'device="cuda"': 'device="cpu"',
    ".half()": ".bfloat16()", "torch.half": "torch.bfloat16", "torch.cuda.synchronize()": "",
    "torch.cuda.Event(enable_timing=True)": "Clock()",
}  # fmt: skip


def steps(is_real: bool, on_gpu: bool) -> list[tuple[str, float, str]]:
    """Return each step's name (also its folder's), time limit on a GPU in seconds, and command.
    Unless `is_real`, it is a small rehearsal."""
    compiled = "--model.compile default" if on_gpu else ""
    fast = "--trainer.benchmark true"
    if not on_gpu and optimization.bf16_is_slow():
        fast += " --trainer.precision 32-true"
    if not is_real:
        fast = "--model.network.widths [16,16,16] --trainer.precision 32-true"
        fast += " --trainer.max_epochs {epochs}"
    fast, airbench = (
        f"--config configs/{recipe}.yaml {RUN} {fast} {compiled}"
        for recipe in ("fast94", "airbench94")
    )
    on_all = "--data.val_size 0 --checkpoint.save_top_k -1"
    return [
        ("fast94", 300, f"-m benchmarks.gpu fast94 {{runs}} {{rounds}} {{reference}} {fast}"),
        ("base_graph", 90, f"train.py fit {BASE} {GRAPH}"),
        ("base_graph_compiled", 90, f"train.py fit {BASE} {GRAPH} {compiled}"),
        ("base_trace", 60, f"-m benchmarks.gpu trace {BASE} {GRAPH}"),
        ("improved", 90, f"train.py fit {IMPROVED} {GRAPH}"),
        ("improved", 60, TEST),
        ("again", 90, f"train.py fit {BASE} {GRAPH}"),
        ("resumed", 90, f"train.py fit --ckpt_path {MIDDLE} --name {{name}}"),
        ("study_jobs_8", 120, f"{STUDY} --jobs 8 --seeds {{seeds}}"),
        ("study_jobs_1", 90, f"{STUDY} --jobs 1 --seeds [100,101]"),
        ("base_eager", 90, f"train.py fit {BASE} {EAGER}"),
        ("base_compiled", 90, f"train.py fit {BASE} {EAGER} {compiled}"),
        ("bare", 90, f"{common.PEER} --way c --epochs {{epochs}}"),
        ("bare_best", 90, f"{common.PEER} --way d --epochs {{epochs}}"),
        ("airbench94_trace", 90, f"-m benchmarks.gpu trace {airbench} {GRAPH}"),
        ("resnet18", 180, f"train.py fit {RESNET18} {on_all}"),
        ("resnet18", 60, TEST),
    ]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the steps until time runs out; return their figures."""
    results: dict[str, Any] = {}
    runs, end = (folder / "runs").absolute(), time.monotonic() + 60 * args.minutes
    runs.mkdir(parents=True)
    is_real = not args.synthetic
    epochs, study_epochs, seeds = (30, 10, range(16)) if is_real else (2, 1, range(4))
    values = vars(args) | {"runs": runs, "epochs": epochs, "middle": epochs // 2 - 1}
    values |= {"reference": args.reference and args.reference.absolute(), "network": "ConvNet"}
    flags = common.words(f"{common.DATA} --trainer.max_epochs {study_epochs}", **values)
    fixed = {flag[2:]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    values |= {"fixed": json.dumps(fixed), "grid": '{"data.batch_size": [128]}', "seeds": [*seeds]}
    for name, limit, command in steps(is_real, args.device == "cuda"):
        if args.only and name not in args.only:
            continue
        figures, log, began = results.setdefault(name, {}), folder / f"{name}.log", time.monotonic()
        limit = min(limit if args.device == "cuda" else 3600 * limit, end - began)
        if limit < 5:
            figures.setdefault("failed", "skipped: no time left")
            continue
        words = common.words(command, **values, name=name, out=runs / name)
        with common.running(words, log) as process:
            try:
                failure = f"exit code {code}" if (code := process.wait(limit)) else ""
            except subprocess.TimeoutExpired:
                failure = f"took over {limit:.0f} s"
        seconds, output = time.monotonic() - began, log.read_text(errors="replace")
        figures.setdefault("process s", round(seconds, 1))
        try:
            figures |= read(name, runs / name, output, seconds)  # perhaps partial, if it failed
        except (OSError, LookupError, ValueError):
            failure = failure or "no figures"
        if failure:
            figures.setdefault("failed", f"{failure}: {output[-300:]}")
        print(f"{name}: {seconds:.0f} s {failure}", flush=True)
    return results


def read(name: str, out: Path, log: str, seconds: float) -> dict[str, Any]:
    """Return a step's figures from its folder, its log and its duration in seconds."""
    if name.startswith("study"):
        return {"runs a minute": round(60 * len(list(out.rglob("model.pth"))) / seconds, 1)}
    if name in ("again", "resumed"):
        first, last = out.with_name("base_graph"), "version_0/checkpoints/last.ckpt"
        files = [torch.load(folder / last, weights_only=True) for folder in (first, out)]
        one, other = (file["state_dict"] for file in files)
        return {"same to the bit": all(torch.equal(one[key], other[key]) for key in one)}
    if rows := [json.loads(line) for line in log.splitlines() if line.startswith('{"')]:
        return {key: common.summary([row[key] for row in rows]) for key in rows[0]}
    epoch = common.summary([round(b - a, 4) for a, b in pairwise(common.checkpoint_times(out))])
    figures = {"s an epoch": epoch, "30 epochs s": round(30 * epoch["median"], 2)}
    if (test := out / "version_0" / "test.json").exists():
        figures["test/acc"] = json.loads(test.read_text(encoding="utf-8"))["test/acc"]
    return figures


# -------------------------------------------------------------------------- programs run by steps


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
        figures = {
            "ms a step": self.ms,
            "ms of kernels": round(busy / steps, 4),
            "kernels a step": round(len(kernels) / steps, 1),
            "waits an epoch": sum(event.name.endswith("Synchronize") for event in events),
        }
        print(self.profiler.key_averages().table("self_device_time_total", row_limit=25))
        print(json.dumps(figures))


def _now() -> float:
    """Return the time in seconds, once a GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def fast94(runs: str, turns: str, path: str, *flags: str) -> None:
    """Train and test the reference and `fast94` in turn, on all images; print each turn as JSON."""
    data = archive.load(flags[flags.index("--data.root") + 1], verify=False)
    references = reference(path, data, runs) if path != "None" else repeat(dict[str, float]())
    for seed, row in zip(range(int(turns)), references, strict=False):
        out = Path(runs, f"fast94_{seed}")
        fit = ["train.py", "fit", *flags, "--data.val_size", "0", "--seed_everything", str(seed)]
        for command in ([*fit, "--name", out.name], common.words(TEST, out=out)):
            subprocess.run([sys.executable, *command], cwd=common.HERE, check=True)
        with (out / "version_0/metrics.csv").open() as file:
            rates = [float(epoch["images_per_second"]) for epoch in csv.DictReader(file)]
        seconds = sum(len(data.train_labels) / rate for rate in rates)
        figures = json.loads((out / "version_0/test.json").read_text(encoding="utf-8"))
        figures = {**row, "ours s": round(seconds, 4), "ours test/acc": figures["test/acc"]}
        if row:
            figures["ours / reference"] = seconds / row["reference s"]
        print(json.dumps(figures), flush=True)


def reference(path: str, data: archive.Arrays, folder: str) -> Iterator[dict[str, float]]:
    """Train the reference, a file of KellerJordan/cifar10-airbench, which times itself; yield the
    figures of each run. A GPU's first run, which compiles it, is left out. On a CPU it isn't
    compiled, and computes in bfloat16, or in 32 bits where `fast94` does."""
    Path(folder, "cifar10").mkdir()
    os.chdir(folder)  # where the reference looks for its images
    for part in ("train", "test"):
        images = getattr(data, f"{part}_images").permute(0, 2, 3, 1).contiguous()
        content = {"images": images, "labels": getattr(data, f"{part}_labels").long()}
        torch.save({**content, "classes": list(archive.CLASSES)}, f"cifar10/{part}.pt")
    text, has_gpu = Path(path).read_text(encoding="utf-8"), torch.cuda.is_available()
    in_32 = optimization.bf16_is_slow()
    for old, new in {} if has_gpu else ON_CPU.items():
        text = text.replace(old, new.replace("bfloat16", "float") if in_32 else new)
    module: Any = ModuleType("reference")
    module.Clock = Clock
    exec(compile(text, path, "exec"), vars(module))
    times: list[float] = []
    module.print_training_details = lambda row, is_final_entry: times.append(row["time_seconds"])
    network = module.CifarNet().to("cuda" if has_gpu else "cpu", memory_format=torch.channels_last)
    if has_gpu:
        network.compile(mode="max-autotune")
        module.main("warmup", network)
    for seed in count():
        result = module.main(seed, network)
        accuracy = result[1] if isinstance(result, tuple) else result
        yield {"reference s": times[-2], "reference test/acc": accuracy}  # [-1]: with test


class Clock:
    """Replaces `torch.cuda.Event` on a CPU."""

    def record(self) -> None:
        """Record the time."""
        self.time = time.perf_counter()

    def elapsed_time(self, later: "Clock") -> float:
        """Return the milliseconds until `later`."""
        return 1000 * (later.time - self.time)


if __name__ == "__main__":
    if sys.argv[1] == "fast94":
        fast94(*sys.argv[2:])
    else:
        trace = "--trainer.callbacks+=benchmarks.gpu.Trace"
        train.main(["fit", *sys.argv[2:], "--trainer.max_epochs", "3", trace])
