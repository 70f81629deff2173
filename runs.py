"""Run folders, their checkpoints, and the config in them.

A run is a folder runs/<name>/version_<n>/ with `config.yaml`, TensorBoard events, `metrics.csv`,
figures, `model.pth` and `checkpoints/`.
"""

import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from filelock import FileLock, Timeout
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

WHERE = {  # locations: no result depends on them; the device is recorded separately
    "name", "ckpt_path", "config", "trainer.default_root_dir", "trainer.accelerator", "data.root",
    "data.sources", "data.download",
}  # fmt: skip
OFF = {"null", "false", "0", "0.0", '"off"', '"none"', '"auto"', '""', "[]", "{}"}  # as JSON
LATER = {("num_classes", "10")}  # arguments added later, with the value implied before, as JSON
RUN_SETTINGS = ("seed_everything", "name", "trainer", "checkpoint")
LARGE = 1e9  # bytes of checkpoints above which to print a note

Row = dict[str, float]  # the metrics of an epoch


# ------------------------------------------------------------------------------ files and folders


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically; raise MisconfigurationException if that fails."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise MisconfigurationException(f"{path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def versions(parent: Path) -> dict[int, Path]:
    """Return a recipe's run folders by number."""
    return {int(p.name[8:]): p for p in parent.glob("version_*") if p.name[8:].isdecimal()}


def claim(parent: Path) -> Path:
    """Create and return the next free `version_<n>` in `parent`, for this process alone."""
    parent.mkdir(parents=True, exist_ok=True)
    version = max(versions(parent), default=-1) + 1
    while True:
        try:
            (parent / f"version_{version}").mkdir()
            return parent / f"version_{version}"
        except FileExistsError:  # another process was faster
            version += 1


def forget(folder: Path) -> None:
    """Remove the folder of a run that failed before it produced anything, and its parents if they
    are then empty."""
    if not any((folder / name).exists() for name in ("checkpoints", "metrics.csv")):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder's lock, or raise if another process trains there. The system frees the lock
    if this process is killed."""
    lock = FileLock(folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise MisconfigurationException(f"{folder}: another process is training in it") from None


def code_version() -> dict[str, str]:
    """Return the start of the SHA-256 of every file imported from this project and the user's own
    folders, by module name."""
    hashes, stdlib = {}, sysconfig.get_path("stdlib")
    for name, module in sorted(sys.modules.copy().items()):  # another thread may import
        file = Path(getattr(module, "__file__", None) or "")
        is_installed = {"site-packages", "dist-packages"} & set(file.parts)
        is_kernel = name.startswith("torch.")  # written to /tmp by torch.compile
        is_stdlib = file.is_relative_to(stdlib)
        is_code = file.suffix == ".py" and file.is_file()
        if is_code and not (is_installed or is_kernel or is_stdlib):
            hashes[file.stem if name in ("__main__", "__mp_main__") else name] = file_version(file)
    return hashes


def file_version(file: Path) -> str:
    """Return the start of a file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def package_versions(settings: dict[str, Any]) -> dict[str, str]:
    """Return the versions of the packages that a run with these settings uses, and of the weights
    file that it starts from."""
    classes = [str(v) for key, v in flat(settings).items() if key.endswith("class_path")]
    names = {"torch", "torchvision", "lightning", *(c.partition(".")[0] for c in classes)}
    names = names & sys.modules.keys() | ({settings["model"].get("weights")} - {None})
    packages = {name: package_version(name) for name in sorted(names)}
    return {name: version for name, version in packages.items() if version}


def package_version(name: str) -> str:
    """Return the version of an imported package or a file; an empty string if it has none, like the
    user's own packages."""
    if Path(name).is_file():
        return file_version(Path(name))
    if version := getattr(sys.modules.get(name), "__version__", ""):
        return str(version)
    names = _distributions().get(name)
    return metadata.version(names[0]) if names else ""


_distributions = functools.cache(metadata.packages_distributions)  # by module; reads all packages


def machine(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of its cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores, {processor()}"


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------ checkpoints


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints atomically, and `last.ckpt` as a hard link to an epoch's file that has just
    been saved. Lightning copies files into place, which can stop halfway."""

    # Of the newest checkpoint: its loop state and keys, and its path.
    saved: tuple[Any, Path] = (None, Path())

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save the checkpoint to a local path."""
        path = Path(path)
        for half_written in path.parent.glob(".*.ckpt.*"):  # left by a killed run
            half_written.unlink(missing_ok=True)
        state, (saved_state, twin) = (checkpoint["loops"], [*checkpoint]), self.saved
        if path.name == "last.ckpt" and saved_state == state and twin.parent == path.parent:
            scratch = path.with_name(f".{path.name}.{os.getpid()}")
            with contextlib.suppress(OSError):  # the file may be gone, or the disk has no links
                scratch.hardlink_to(twin)
                scratch.replace(path)
                return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(path, content.getvalue())
        self.saved = (state, path)


class EpochCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; by default it keeps every epoch and names the best one.

    Args:
        monitor: Chooses the best epoch: `val/acc`, `val/loss`, or any logged metric.
        mode: `auto`: `min` for a metric with `loss` or `error` in its name, otherwise `max`.
        filename: File name of an epoch's checkpoint.
        save_top_k: How many of the best epochs to keep; -1: all.
        save_last: Keep `last.ckpt`, the newest state.

    """

    def __init__(
        self,
        monitor: str | None = "val/acc",
        mode: Literal["auto", "min", "max"] = "auto",
        filename: str = "epoch_{epoch:02d}",
        save_top_k: int = -1,
        save_last: bool = True,
        auto_insert_metric_name: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            monitor=monitor,
            mode=(natural_mode(monitor) or "max") if mode == "auto" else mode,
            filename=filename,
            save_top_k=save_top_k,
            auto_insert_metric_name=auto_insert_metric_name,
            **kwargs,
        )
        self.keeps_last = save_last

    def also_last(self) -> list[ModelCheckpoint]:
        """Return the callback for `last.ckpt`, as ModelCheckpoint's own covers only its top k."""
        interval, steps = self._train_time_interval, self._every_n_train_steps
        last = ModelCheckpoint(
            filename="last",
            save_weights_only=self.save_weights_only,
            every_n_train_steps=steps or None,
            train_time_interval=interval,
            save_on_train_epoch_end=None if steps or interval else True,
            enable_version_counter=False,
        )
        return [last] if self.keeps_last else []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; after the first epoch, print a note if all of them will take much space."""
        super().on_train_epoch_end(trainer, pl_module)
        path, epochs = Path(self._last_checkpoint_saved), trainer.max_epochs or 0
        if trainer.current_epoch == 0 and self.save_top_k == -1 and path.is_file():
            size = path.stat().st_size
            if size * epochs > LARGE and trainer.is_global_zero:
                print(
                    f"{epochs} checkpoints of {size / 1e6:.0f} MB will take "
                    f"{size * epochs / 1e9:.1f} GB: --checkpoint.save_top_k 3 keeps the best three"
                )


def natural_mode(monitor: str | None) -> Literal["min", "max"] | None:
    """Return whether lower or higher is better, or None if the metric's name does not say."""
    if any(word in str(monitor) for word in ("loss", "error")):
        return "min"
    return "max" if str(monitor).endswith("acc") else None


def check_monitors(settings: dict[str, Any]) -> None:
    """Raise if a monitor would choose on the test set, or choose the worst value: the default mode
    of Lightning's callbacks is `min` for any metric."""
    values = flat(settings)
    for key, monitor in values.items():
        if not key.endswith(".monitor"):
            continue
        name = f"{key.removesuffix('monitor')}mode"
        mode, natural = values.get(name), natural_mode(monitor)
        if str(monitor).startswith("test/"):
            raise MisconfigurationException(
                f"{key} {monitor} would choose on the test set: use val/acc or val/loss"
            )
        if mode in ("min", "max") and natural not in (None, mode):
            raise MisconfigurationException(
                f"{name} {mode} would choose the worst {monitor}: set it to {natural}"
            )


def keeper(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the ModelCheckpoint that names the best epoch: the first one."""
    callbacks = trainer.checkpoint_callbacks
    return next((c for c in callbacks if isinstance(c, ModelCheckpoint)), None)


def chosen(rows: list[Row], checkpoint: ModelCheckpoint) -> tuple[Row, Path] | None:
    """Return the epoch that validation chose, and its checkpoint: the best by the monitored metric,
    of equal ones the first. The checkpoint must exist and be from the step of the measurement."""
    for row in ranked(rows, str(checkpoint.monitor), checkpoint.mode):
        # Rows of versions up to 0.2.0 have no step.
        step = row.get("val/step", row.get("step"))
        metrics: dict[str, Any] = {**row, "epoch": int(row["epoch"]), "step": step or 0}
        path = Path(checkpoint.format_checkpoint_name(metrics))
        # ModelCheckpoint's second file of an epoch ends in -v1.
        for file in (path, *path.parent.glob(f"{glob.escape(path.stem)}-v*")):
            if file.is_file() and step in (None, read_checkpoint(file)["global_step"]):
                return row, file
    return None


def ranked(rows: list[Row], monitor: str, mode: str) -> list[Row]:
    """Return the epochs with a finite value of a metric, best first; ties keep their order."""
    sign = -1 if mode == "max" else 1
    measured = (row for row in rows if math.isfinite(row.get(monitor, math.nan)))
    return sorted(measured, key=lambda row: sign * row[monitor])


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the settings that differ, by dotted name, as [before, now], except locations. An
    argument that one side lacks differs unless it is off."""
    before, now = flat(before), flat(now)
    # In JSON, 1 is not 1.0.
    old, new = ({k: json.dumps(v, default=str) for k, v in side.items()} for side in (before, now))
    common, merged = old.keys() & new.keys(), {**old, **new}
    place = re.compile(rf"({'|'.join(map(re.escape, WHERE))})(\..*)?")
    argument = re.compile(r"(\w+\.|.*\.init_args\.)?\w+|.*\.(init_args|dict_kwargs)")
    changed = {}
    for key in sorted(merged):
        has_no_effect = merged[key] in OFF or (key.rpartition(".")[2], merged[key]) in LATER
        is_off = key not in common and has_no_effect and argument.fullmatch(key)
        if not (old.get(key) == new.get(key) or is_off or place.fullmatch(key)):
            changed[key] = [before.get(key), now.get(key)]
    return changed


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint as plain data, migrated to this version; none of its code runs.

    Raises:
        MisconfigurationException: The file is missing or not a checkpoint.
    """
    path, kind = Path(path), "a checkpoint of this project"
    checkpoint = _load(path, kind)
    keys = {"state_dict", "epoch", "global_step", "pytorch-lightning_version"}
    if not (isinstance(checkpoint, dict) and checkpoint.keys() >= keys):
        raise MisconfigurationException(f"{path} is not {kind}")
    return migrate(checkpoint)


def read_weights(path: str | Path) -> dict[str, Any]:
    """Load a network's weights by name, from a checkpoint or a file that holds only weights.

    Raises:
        MisconfigurationException: The file is missing or has no weights.
    """
    content = _load(Path(path), "a weights file", mmap=False)  # older files can't be mapped
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not (isinstance(weights, dict) and all(isinstance(v, Tensor) for v in weights.values())):
        raise MisconfigurationException(f"{path} contains no network weights")
    own = {k.removeprefix("network."): v for k, v in weights.items() if k.startswith("network.")}
    is_module = "state_dict" in content or len(own) == len(weights)  # not the bare network's
    return own if own and is_module else weights


def origin(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config of the run that wrote a weights file, and the images it was trained on:
    from the checkpoint, or from `config.yaml` and `run.json` next to `model.pth`. Empty if unknown.
    """
    content = _load(path, "a weights file", mmap=False)
    settings, made_by = path.with_name("config.yaml"), path.with_name("run.json")
    if isinstance(content, dict) and "val_size" in content.get("datamodule_hyper_parameters", {}):
        return settings_of(migrate(content)), images_of(content)
    if path.name == "model.pth" and settings.exists() and made_by.exists():
        images = json.loads(made_by.read_text(encoding="utf-8"))["images"]
        return yaml.safe_load(settings.read_text(encoding="utf-8")), images
    return {}, {}


def images_of(checkpoint: dict[str, Any]) -> dict[str, str]:
    """Return the identities of a checkpoint's training and test images, if known. Versions up to
    0.2.0 only recorded whether they were verified."""
    is_verified = checkpoint.get("datamodule_hyper_parameters", {}).get("verify")
    known = dict.fromkeys(("train", "test"), "CIFAR-10") if is_verified else {}
    return checkpoint.get("run", {}).get("images") or known


def refuse_other_images(source: str, known: dict[str, str], now: str) -> None:
    """Raise if the weights in `source` are known to be trained on images other than `now`: some of
    those may be in the validation set."""
    if known.get("train", now) != now:
        raise MisconfigurationException(
            f"{source} was trained on other images ({known['train']}), perhaps on some of this "
            "validation set: keep its data.root, or fit with data.val_size 0"
        )


def _load(path: Path, kind: str, mmap: bool = True) -> Any:
    """Load a file that PyTorch saved, as plain data."""
    if not path.is_file():
        folders = (path, path / "checkpoints", path.parent)
        candidates = sorted({str(file) for folder in folders for file in folder.glob("*.ckpt")})
        hint = f"; there is {' or '.join(candidates[-2:])}" if candidates else ""
        raise MisconfigurationException(f"no checkpoint {path}{hint}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a file that isn't a checkpoint can raise anything
        raise MisconfigurationException(
            f"{path} is not {kind}, or is damaged: not loaded ({type(error).__name__})"
        ) from error


def migrate(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Convert a checkpoint of any earlier version to this one.

    Up to 0.2.0, a step of `data.augment` normalised images, schedules had `total_steps`, and the
    monitor's mode was set separately.
    """
    run = checkpoint.get("run", {})
    if isinstance(run.get("code"), str):  # one hash of all files, up to 0.3.0
        run["code"] = {"train": run["code"]}
    model = checkpoint.get("hyper_parameters", {})
    data = checkpoint.get("datamodule_hyper_parameters", {})
    if "normalize" in model or "network" not in model:
        return checkpoint
    scheduler = model.get("lr_scheduler") or {}
    if str(scheduler.get("class_path")).startswith("optimization."):
        scheduler.get("init_args", {}).pop("total_steps", None)
        if not scheduler.get("init_args"):  # now absent if there are no arguments
            scheduler.pop("init_args", None)
    run.get("checkpoint", {}).pop("mode", None)
    run["chosen_by"] = {"monitor": run.get("checkpoint", {}).get("monitor")}
    model["normalize"], steps = None, []
    for step in data.get("augment", []):
        if step["class_path"] == "cifar10.augment.Normalize":
            arguments = step.get("init_args", {})
            model["normalize"] = {key: list(arguments[key]) for key in ("mean", "std")}
        elif step["class_path"] == "cifar10.augment.Cutout":  # it filled with zeros
            fill = model["normalize"]["mean"] if model["normalize"] else [0.0, 0.0, 0.0]
            steps.append({**step, "init_args": {**step.get("init_args", {}), "fill": fill}})
        else:
            steps.append(step)
    if "augment" in data:
        data["augment"] = steps
    return checkpoint


def settings_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the run that wrote a checkpoint, as in `config.yaml`."""
    run = checkpoint.get("run", {})
    settings = {key: run[key] for key in RUN_SETTINGS if key in run}
    for key, part in (("hyper_parameters", "model"), ("datamodule_hyper_parameters", "data")):
        settings[part] = {k: v for k, v in checkpoint.get(key, {}).items() if k != "_instantiator"}
    root = settings["data"].get("root", "")
    original = Path(run.get("started_in", ""), root)
    if not Path(root).is_dir() and original.is_dir():  # run from another folder
        settings["data"]["root"] = str(original)
    return settings


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; list items are named by index."""
    items = dict(enumerate(settings)) if isinstance(settings, list) else settings
    if not isinstance(items, dict) or not items:
        return {prefix: settings}
    parts = [flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in items.items()]
    return {key: value for part in parts for key, value in part.items()}


def run_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint; for one outside of a run, the folder next to it that
    has its name."""
    path = checkpoint if "checkpoints" in checkpoint.parent.parts else checkpoint.absolute()
    folders = (
        folder.parent
        for folder in path.parents
        if folder.name == "checkpoints"
        and any((folder.parent / name).exists() for name in ("config.yaml", "hparams.yaml"))
    )
    return next(folders, checkpoint.with_suffix("" if checkpoint.suffix else ".results"))


def newest(folder: Path) -> tuple[int, Path]:
    """Return the step and path of the newest checkpoint in a folder, `last.ckpt` in a tie; step -1
    if there is none."""
    steps = [(-1, folder)]
    for path in folder.glob("*.ckpt"):
        with contextlib.suppress(MisconfigurationException):  # damaged
            steps.append((read_checkpoint(path)["global_step"], path))
    return max(steps, key=lambda pair: (pair[0], pair[1].name == "last.ckpt"))


def named(path: str, parent: Path) -> Path:
    """Return the checkpoint that a command names: a path, or `last` or `best` of the newest run in
    `parent`, a recipe's folder, that has one."""
    if path not in ("last", "best"):
        return Path(path)
    for _, folder in sorted(versions(parent).items(), reverse=True):
        step, last = newest(folder / "checkpoints")
        if step >= 0:
            return last if path == "last" else best(last)
    others = sorted(p.name for p in parent.parent.glob("*") if versions(p) and p != parent)
    hint = (
        f"there are runs with --name {' or '.join(others)}"
        if others
        else "train one, or give a file"
    )
    raise MisconfigurationException(f"no run in {parent} has a checkpoint: {hint}")


def best(last: Path) -> Path:
    """Return the checkpoint that validation chose in the run whose last one is `last`."""
    checkpoint = read_checkpoint(last)
    if "run" not in checkpoint:
        raise MisconfigurationException(
            f"--ckpt_path best: {last} does not record the best epoch: give the file's path"
        )
    rows = checkpoint["callbacks"]["History"]["rows"]
    rule = checkpoint["run"]["chosen_by"]
    choice = chosen(rows, EpochCheckpoint(dirpath=last.parent, **rule)) if rule["monitor"] else None
    if choice is None:
        raise MisconfigurationException(
            f"--ckpt_path best: {run_of(last)} has no best epoch: use last, or give a file's path"
        )
    return last.parent / choice[1].relative_to(last.parent.resolve())  # relative if `last` is
