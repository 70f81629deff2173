"""Where the time of a recipe's steps goes on a GPU.

python -m benchmarks.profile trace.json --config configs/base.yaml
"""

import json
import sys
from collections import Counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import train
from benchmarks.common import now

SHOWN = 25  # kernels
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")


class Trace(Callback):
    """Times the steps of epoch 1, and traces those of epoch 2."""

    takes_many_steps = True

    found: dict[str, Any]

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        if trainer.current_epoch == 2:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profiler = profile(activities=activities)
            self.profiler.start()
        self.first, self.started = trainer.global_step, now()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop with the last step: what comes now is not training."""
        seconds, steps = now() - self.started, trainer.global_step - self.first
        if trainer.current_epoch == 1:
            self.found = {"ms a step": round(1000 * seconds / steps, 4)}
        if trainer.current_epoch == 2:
            self.profiler.stop()
            self.profiler.export_chrome_trace(self.path)
            events: Any = self.profiler.events()  # type: ignore[no-untyped-call]
            on_device = [e for e in events if e.device_type == DeviceType.CUDA]
            kernels: Counter[str] = Counter()
            for event in on_device:
                kernels[event.name] += event.time_range.elapsed_us()
            for name, microseconds in kernels.most_common(SHOWN):
                print(f"{microseconds / 1000 / steps:8.4f} ms a step  {name[:120]}")
            busy = kernels.total() / 1000
            self.found["ms of kernels a step"] = round(busy / steps, 4)
            self.found["kernels a step"] = round(len(on_device) / steps, 1)
            self.found["waits an epoch"] = sum(e.name in WAITS for e in events)


def main() -> None:
    """Train three epochs; print what was found as JSON on the last line."""
    trace = Trace(sys.argv[1])
    flags = ["--trainer.max_epochs", "3", "--trainer.default_root_dir", f"{sys.argv[1]}_runs"]
    train.quieten()
    train.CLI(["fit", *sys.argv[2:], *flags], [trace])
    print(json.dumps(trace.found))


if __name__ == "__main__":
    main()
