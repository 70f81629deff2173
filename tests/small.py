"""Networks that train in a moment, for tests about something else, and callbacks that wait for a
test. They have their own module because child processes of the tests import it too."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

STARTED = time.monotonic()


class Flat(nn.Sequential):
    """One layer, which compiles in seconds."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))


class Small(nn.Sequential):
    """A convolution, batch norm and a dense layer: 1,632 parameters. It learns the made-up data set
    slowly, so its metrics differ from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 2, 16, stride=16), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 10),
        )  # fmt: skip


class Fails(nn.Module):
    """Fails in training steps while the file `fail` exists; works otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Flat()

    def forward(self, images: Tensor) -> Tensor:
        if self.training and Path("fail").exists():
            raise RuntimeError("out of luck")
        return self.layers(images)


class Dies(nn.Module):
    """Kills its process in a training step, as the OOM killer would."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Flat()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(images)


WAIT_SECONDS = 300  # after which a wait that nobody ended fails, so that no process is left behind


def wait() -> None:
    """Sleep briefly; fail after `WAIT_SECONDS`."""
    assert time.monotonic() - STARTED < WAIT_SECONDS, "nobody ended the wait"
    time.sleep(0.01)


class Waits(Callback):
    """Waits in the middle of an epoch to be killed, from the epoch in the file `wait_in` on, while
    that file exists. It leaves the file `waits`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        file = Path("wait_in")
        while batch_idx == 3 and file.exists() and trainer.current_epoch >= int(file.read_text()):
            Path("waits").touch()
            wait()


class Meets(Callback):
    """Waits until two runs of the study `question` have started."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while len(list(Path("runs/question").glob("*/fit.log"))) < 2:
            wait()


class Slow(Callback):
    """Adds a second and a half to each epoch, so that a pruner sees all of them."""

    takes_many_steps = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(1.5)


def untyped(width: int = 8):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Return a network, without an annotation."""
    return Flat()
