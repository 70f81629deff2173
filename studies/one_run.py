"""One run of a study: `train.py fit` in a process of its own."""

import contextlib
import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from filelock import FileLock
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

import train
from runs import Row, claim, code_version, processor, read_checkpoint
from studies.question import ELSEWHERE, DryRun
from terminal import quieten, short_errors


class Reporter(Callback):
    """Tells the study of every epoch, and stops the run if the study says so."""

    takes_many_steps = True

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def rows(self, trainer: Trainer) -> list[Row]:
        """Return the rows of the run's history."""
        return next(c for c in trainer.callbacks if isinstance(c, train.History)).rows  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was done before the run was stopped."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send all rows, and wait for the answer."""
        self.connection.send(("epoch", self.rows(trainer)))
        try:
            trainer.should_stop = self.connection.recv() or trainer.should_stop
        except EOFError:
            sys.exit("stopped with its study")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what the run's speed and its last digits depend on."""
        device = trainer.strategy.root_device
        name = f"{torch.get_num_threads()} of {os.cpu_count()} cores of {processor()}"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        versions = f"torch {torch.__version__}, lightning {lightning.__version__}"
        self.machine = f"{name}, {versions}"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep all rows."""
        self.kept = self.rows(trainer)


def fit(
    command: list[str], folder: Path, devices: str | None, threads: int, link: Connection
) -> None:
    """Run `train.py fit` in this process, a child of the study, from the last epoch that is kept.

    Args:
        command: The command line, should nothing be kept yet.
        folder: Holds the run's `version_<n>`, and `fit.log` for what it prints.
        devices: The value of CUDA_VISIBLE_DEVICES, if this run has GPUs of its own.
        threads: How many cores it may use.
        link: Takes ("epoch", rows), answers whether to stop; at last ("done", rows, machine), in
            place of the machine the study that a run was taken from, ("diverged", how, machine) or
            ("failed", why).

    """
    threading.Thread(target=_die_with_parent, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "fit.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.argv = ["train.py", *command]
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    torch.set_num_threads(threads)
    quieten()
    train.keep_freed_memory()
    try:
        # A process that lost its parent may take a moment to end.
        with FileLock(folder / ".lock", timeout=60), short_errors():
            settings = settings_of(command)
            newest = newest_kept(folder, settings)
            if newest is None and (twin := find_twin(folder, settings)):
                print(f"the same run as {twin}: taken from there")
                copy_whole(twin, claim(folder))
                link.send(("done", rows_of(twin), f"taken from the study {twin.parents[1].name}"))
                return
            if newest:
                here = tuple(f"--{flag}=" for flag in ELSEWHERE)
                own = [word for word in command if word.startswith(here)]
                command = ["fit", f"--ckpt_path={newest}", *own]
            reporter = Reporter(link)
            try:
                train.CLI(command, [reporter])
            except train.Diverged as error:
                link.send(
                    (
                        "diverged",
                        str(error).partition(", at ")[0].partition(": ")[2],
                        reporter.machine,
                    )
                )
                return
        link.send(("done", reporter.kept, reporter.machine))
    except (SystemExit, Exception) as error:
        why = str(error)
        if isinstance(error, Exception):
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}, see {folder / 'fit.log'}"
        with contextlib.suppress(OSError):  # nobody may be there any more
            link.send(("failed", why))


def settings_of(command: list[str]) -> dict[str, Any]:
    """Return all settings that a command line of `fit` comes to, but for what it writes where."""
    return _common(DryRun(command).config_dump)


def _settings_in(version: Path) -> dict[str, Any] | None:
    """Return the settings of a run that has been trained, as `settings_of` does."""
    try:
        return _common(yaml.safe_load((version / "config.yaml").read_text()))
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
        return None  # damaged, or another's


def _common(settings: dict[str, Any]) -> dict[str, Any]:
    for key in ("name", "ckpt_path", "config", "trainer.default_root_dir", *ELSEWHERE):
        part, _, name = key.rpartition(".")
        (settings[part] if part else settings).pop(name, None)
    return settings


def newest_kept(folder: Path, settings: dict[str, Any]) -> Path | None:
    """Return the newest whole checkpoint of a run with these settings, if it was stopped, and
    remove what was stopped before it had one."""
    steps: dict[int, Path] = {}
    for version in folder.glob("version_*"):
        paths = list(version.glob("checkpoints/*.ckpt"))
        if not paths and not (version / "model.pth").exists():
            shutil.rmtree(version)
        elif _settings_in(version) == settings:
            for path in paths:
                with contextlib.suppress(MisconfigurationException):  # damaged
                    steps[read_checkpoint(path)["global_step"]] = path
    return steps[max(steps)] if steps else None


def find_twin(folder: Path, settings: dict[str, Any]) -> Path | None:
    """Return a run of another study, trained to its last epoch by the same code, that has the same
    settings and so the same results."""
    seed = folder.name.rpartition(",")[2]
    for weights in sorted(folder.parents[1].glob(f"*/*,{seed}/version_*/model.pth")):
        version = weights.parent
        if _settings_in(version) != settings:
            continue
        with contextlib.suppress(MisconfigurationException, KeyError):  # damaged, or another's
            last = read_checkpoint(version / "checkpoints" / "last.ckpt")
            is_whole = last["epoch"] + 1 == settings["trainer"]["max_epochs"]
            if is_whole and last["run"]["code"] == code_version():
                return version
    return None


def copy_whole(version: Path, to: Path) -> None:
    """Copy a run to an empty folder, whole or not at all; on one disk it takes no space twice."""

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # not every disk has links
            shutil.copy2(source, target)

    scratch = to.with_name(f".{to.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(version, scratch, copy_function=link_or_copy)
    to.rmdir()
    scratch.rename(to)


def rows_of(version: Path) -> list[Row]:
    """Return the epochs of a run by its last checkpoint."""
    checkpoint = read_checkpoint(version / "checkpoints" / "last.ckpt")
    rows: list[Row] = checkpoint["callbacks"]["History"]["rows"]
    return rows


def _die_with_parent() -> None:
    """End this process when the study has ended, however it did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
