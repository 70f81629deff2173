"""`fast94` and its reference, trained in turn in one process.

    python -m benchmarks.speedrun --reference airbench94_muon.py --runs 5

The reference is a file of KellerJordan/cifar10-airbench or one that descends from it; it is run
unchanged and timed as it times itself: from whitening to the last step, evaluation in between left
out; kernels are chosen and compiled in a run before. Here the same is timed: whitening and eight
epochs, each from its start to its end, with metrics and history; compilation and recording come
before, checkpoints are written in between. Accuracy is of the test images, six views each.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import train
from benchmarks.common import machine, now
from cifar10 import archive
from cuda_graph import WARM_UP

RECIPE = Path(__file__).parent.parent / "configs" / "fast94.yaml"


class Clock(Callback):
    """Times whitening and epochs; makes the first steps, which compile and record, beforehand."""

    takes_many_steps = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Time what the network makes of training images before it begins."""
        network: Any = pl_module.network
        whiten = network.init_from
        self.seconds = 0.0

        def timed(images: Any) -> None:
            self._start()
            whiten(images)
            self._stop()

        network.init_from = timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step, and put everything back as it was."""
        module: Any = pl_module
        if not module.steps_a_call:
            return
        before = {key: value.clone() for key, value in module.state_dict().items()}
        batch = next(iter(trainer.train_dataloader))  # type: ignore[arg-type]
        size = trainer.train_dataloader.step_size  # type: ignore[union-attr]
        for _ in range(WARM_UP + 2):
            with trainer.precision_plugin.train_step_context():
                module.recorded(*(tensor[:size] for tensor in batch))
        module.load_state_dict(before)
        for state in trainer.optimizers[0].state.values():
            state["momentum_buffer"].zero_()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._start()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._stop()

    def _start(self) -> None:
        self.started = now()

    def _stop(self) -> None:
        self.seconds += now() - self.started


def ours(seed: int, root: str, flags: list[str]) -> dict[str, float]:
    """Train and test `fast94`; return seconds and accuracy."""
    torch._dynamo.reset()  # else it would give up compiling after a few models
    clock = Clock()
    name = f"--name=seed_{seed}"
    common = ["--data.root", root, "--seed_everything", str(seed), name, *flags]
    began = time.perf_counter()
    train.CLI(["fit", "--config", str(RECIPE), *common, "--data.val_size", "0"], [clock])
    whole = time.perf_counter() - began
    folder = Path("runs") / f"seed_{seed}" / "version_0"
    train.CLI(["test", "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")])
    accuracy = json.loads((folder / "test.json").read_text())["test/acc"]
    return {"seconds": clock.seconds, "whole": whole, "accuracy": accuracy}


class Reference:
    """The reference: a module whose `main` trains once."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("reference", path)
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.module = module
        module.print_training_details = self._note
        self.network = self.module.CifarNet().cuda().to(memory_format=torch.channels_last)
        self.network.compile(mode="max-autotune")
        self.times: list[float] = []

    def _note(self, variables: dict[str, Any], is_final_entry: bool) -> None:
        self.times.append(variables["time_seconds"])

    def run(self, number: int | str) -> dict[str, float]:
        """Train once; return seconds to the end of training, with the evaluation, and accuracy."""
        torch.backends.cudnn.benchmark = True
        self.times = []
        result = self.module.main(number, self.network)
        accuracy = result[1] if isinstance(result, tuple) else result
        before = self.times[-2] if len(self.times) > 1 else self.times[-1]
        return {"seconds": before, "with_views": self.times[-1], "accuracy": accuracy}


def main() -> None:
    """Train in turn, print a line a run, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, help="its file; without, only ours")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--root", default="data", help="folder of the images")
    parser.add_argument("--json", type=Path, help="where to write all runs")
    args, flags = parser.parse_known_args()
    root = str(Path(args.root).absolute())
    json_file = args.json and args.json.absolute()
    path = args.reference and args.reference.absolute()
    train.quieten()
    results: dict[str, Any] = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        reference = None
        if path:
            _write_for_reference(Path("cifar10"), root)
            reference = Reference(path)
            reference.run("warmup")
        for seed in range(args.runs):
            for name, run in (("reference", reference and reference.run),
                              ("ours", lambda seed: ours(seed, root, flags))):  # fmt: skip
                if run:
                    results[name].append(run(seed))
                    print(f"{name:10}", results[name][-1], flush=True)
            if json_file:
                json_file.write_text(json.dumps({"machine": machine(), "flags": flags, **results}))
        os.chdir("/")
    sys.stdout.flush()


def _write_for_reference(folder: Path, root: str) -> None:
    """Write the images as the reference keeps them."""
    data = archive.load(root, verify=False)
    folder.mkdir()
    for part in ("train", "test"):
        images = getattr(data, f"{part}_images").permute(0, 2, 3, 1).contiguous()
        labels = getattr(data, f"{part}_labels").long()
        content = {"images": images, "labels": labels, "classes": list(archive.CLASSES)}
        torch.save(content, folder / f"{part}.pt")


if __name__ == "__main__":
    main()
