"""One run of a study: `train.py fit` in a process of its own."""

import multiprocessing
import os
import shutil
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer

import train
from callbacks import History
from callbacks.history import Row
from runs import forget, is_newest, read_checkpoint
from studies.question import DryRun
from terminal import errors_in_one_line, quieten


class Reporter(Callback):
    """Tells the study of every epoch, and stops the run if the study says so."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def rows(self, trainer: Trainer) -> list[Row]:
        """Return the rows of the run's history."""
        return next(c for c in trainer.callbacks if isinstance(c, History)).rows  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was done before the run was stopped."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send all rows, and wait for the answer."""
        self.connection.send(("epoch", self.rows(trainer)))
        trainer.should_stop = trainer.should_stop or self.connection.recv()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send all rows for the last time."""
        self.final = self.rows(trainer)


def fit(
    command: list[str], folder: Path, devices: str | None, threads: int, link: Connection
) -> None:
    """Run `train.py fit` in this process, a child of the study, from the last epoch that is kept.

    Args:
        command: The command line, should nothing be kept yet.
        folder: Holds the run's `version_0`, and `fit.log` for what it prints.
        devices: The value of CUDA_VISIBLE_DEVICES, if this run has GPUs of its own.
        threads: How many cores it may use.
        link: Takes ("epoch", rows), answers whether to stop; at last ("done", rows) or
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
        with FileLock(folder / ".lock", timeout=60), errors_in_one_line():
            for version in folder.glob("version_*"):
                forget(version)  # if it was stopped in its first epoch
            kept = [path for path in folder.glob("version_*/checkpoints/*.ckpt") if is_newest(path)]
            if not kept and (twin := find_twin(command, folder)):
                print(f"the same run as {twin}: taken from there")
                shutil.copytree(twin, folder / "version_0", copy_function=os.link)
                link.send(("done", _rows_kept(twin)))
                return
            reporter = Reporter(link)
            train.CLI(["fit", f"--ckpt_path={kept[0]}"] if kept else command, [reporter])
        link.send(("done", reporter.final))
    except SystemExit as stop:
        link.send(("failed", str(stop.code)))
    except Exception as error:
        traceback.print_exc()
        link.send(("failed", f"{type(error).__name__}: {error}, see {folder / 'fit.log'}"))


def find_twin(command: list[str], folder: Path) -> Path | None:
    """Return a whole run of another study that has the same settings and so the same results."""

    def common(settings: dict[str, Any]) -> dict[str, Any]:
        for key in ("name", "ckpt_path", "config"):
            settings.pop(key, None)
        del settings["trainer"]["default_root_dir"]
        return settings

    cli = DryRun(command)
    own = common(yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"])
    studies, seed = folder.parents[1], folder.name.rpartition(",")[2]
    for weights in studies.glob(f"*/*,{seed}/version_*/model.pth"):
        config = weights.with_name("config.yaml")
        if config.exists() and common(yaml.safe_load(config.read_text())) == own:
            return weights.parent
    return None


def _rows_kept(version: Path) -> list[Row]:
    """Return the epochs of a run by its last checkpoint."""
    checkpoint = version / "checkpoints" / "last.ckpt"
    if not checkpoint.exists():
        return []
    rows: list[Row] = read_checkpoint(checkpoint)["callbacks"]["History"]["rows"]
    return rows


def _die_with_parent() -> None:
    """End this process when the study has ended, however it did."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
