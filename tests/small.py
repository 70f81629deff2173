"""Networks that train in a moment, for the tests that are about something else, and callbacks that
wait for a test. They stand in a module of their own, as the processes that tests start import it
too."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

STARTED = time.monotonic()


class Flat(nn.Sequential):
    """One layer, which is compiled in seconds."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))


class Small(nn.Sequential):
    """A convolution, batch norm and a dense layer, of 1,632 parameters. On the made-up data set it
    learns slowly, so that its metrics differ from epoch to epoch."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 2, 16, stride=16), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 10),
        )  # fmt: skip


class Fails(nn.Module):
    """Maps as it should when it is looked at, and fails in a step, while a file is there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Flat()

    def forward(self, images: Tensor) -> Tensor:
        if self.training and Path("fail").exists():
            raise RuntimeError("out of luck")
        return self.layers(images)


class Dies(nn.Module):
    """Ends its process in a step, as a process does that the system kills for its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Flat()

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(images)


WAIT_SECONDS = 300  # after which a test that nobody ends has failed, and must not be left behind


def wait() -> None:
    """Sleep a little, until a test has plainly failed."""
    assert time.monotonic() - STARTED < WAIT_SECONDS, "nobody ended the wait"
    time.sleep(0.01)


class Waits(Callback):
    """Waits in the middle of an epoch to be killed, from the epoch on that the file `wait_in` has,
    while it is there; it leaves the file `waits`."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        file = Path("wait_in")
        while batch_idx == 3 and file.exists() and trainer.current_epoch >= int(file.read_text()):
            Path("waits").touch()
            wait()


class Meets(Callback):
    """Waits until two runs of the study `question` are under way."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while len(list(Path("runs/question").glob("*/fit.log"))) < 2:
            wait()


class Slow(Callback):
    """Takes a second and a half for an epoch, so that a pruner sees each."""

    takes_many_steps = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(1.5)


def untyped(width: int = 8):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Return a network, without saying so."""
    return Flat()
