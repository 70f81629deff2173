"""Where a run lies, and what its checkpoints say.

A run is a folder runs/<name>/version_<n>/ with `config.yaml`, TensorBoard events, `metrics.csv`,
figures, `model.pth` and `checkpoints/`.
"""

import argparse
import contextlib
import hashlib
import io
import os
import platform
import shlex
import shutil
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

CODE = ("train.py", "lightning_module.py", "cuda_graph.py", "optimization.py", "datamodule.py")
RUN_SETTINGS = ("seed_everything", "name", "trainer", "checkpoint")


def processor() -> str:
    """Return the name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def code_version() -> str:
    """Return what tells one version of the code that trains, and of PyTorch, from another."""
    here = Path(__file__).parent
    files = [here / name for name in CODE]
    files += sorted(file for room in ("cifar10", "networks") for file in (here / room).glob("*.py"))
    content = b"".join(file.read_bytes() for file in files) + torch.__version__.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


class WholeCheckpointIO(TorchCheckpointIO):
    """Saves a checkpoint that is never seen half-written. Lightning's own is written elsewhere and
    moved, which is a copy, and can end halfway, if the run lies on another disk than /tmp."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save the checkpoint to a local path."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for half_written in path.parent.glob(".*.ckpt.*"):  # by a run that was killed
            half_written.unlink(missing_ok=True)
        write_whole(path, content.getvalue())


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, of every epoch. `save_last` would keep it of those epochs only of which
    another checkpoint is kept."""

    def __init__(self, save_weights_only: bool) -> None:
        super().__init__(
            filename="last",
            save_weights_only=save_weights_only,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the best epoch is chosen by another."""
        return {}


def claim(parent: Path) -> Path:
    """Create and return the next free `version_<n>` of a folder, for this process alone."""
    taken = [int(p.name[8:]) for p in parent.glob("version_*") if p.name[8:].isdecimal()]
    version = max(taken, default=-1) + 1
    while True:
        try:
            (parent / f"version_{version}").mkdir(parents=True)
            return parent / f"version_{version}"
        except FileExistsError:  # another process was faster
            version += 1


def forget(folder: Path) -> None:
    """Remove the folder of a run that failed before it had anything to show, and the folders around
    it that this leaves empty."""
    if not any((folder / name).exists() for name in ("checkpoints", "metrics.csv")):
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
            folder.parent.parent.rmdir()


def relocate_state(state: dict[str, Any], folder: str) -> None:
    """Change the paths in the state of a ModelCheckpoint to `folder`, if its files lie there."""

    def moved(path: str) -> str:
        return str(Path(folder, Path(path).name)) if path else path

    if Path(moved(state["best_model_path"])).is_file():
        state["dirpath"] = folder
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = moved(state[key])
        state["best_k_models"] = {moved(p): score for p, score in state["best_k_models"].items()}


def run_of(checkpoint: Path) -> Path:
    """Return the folder of the run that wrote a checkpoint; its own, if it was moved away."""
    folder = checkpoint.parent
    return folder.parent if folder.name == "checkpoints" else folder


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint as plain data: whatever the file holds, no code of it is run.

    Raises:
        MisconfigurationException: No such file, or not a checkpoint.

    """
    path = Path(path)
    if not path.is_file():
        raise MisconfigurationException(f"no checkpoint {path}{_nearby(path)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "epoch", "global_step", "pytorch-lightning_version"):
            checkpoint[key]
    except Exception as error:  # a file that is no checkpoint can fail in any way
        raise MisconfigurationException(
            f"{path} is not a checkpoint of this laboratory, or it is damaged; it was not loaded "
            f"({type(error).__name__})"
        ) from error
    return checkpoint


def _nearby(path: Path) -> str:
    found = sorted(p.name for p in path.parent.glob("*.ckpt"))
    if len(found) > 4:
        found[2:-1] = ["..."]
    return f"; {path.parent} has {', '.join(found)}" if found else ""


def is_newest(path: Path) -> bool:
    """Whether no checkpoint beside this one is of a later step; damaged ones do not count."""

    def step(path: Path) -> int:
        try:
            return read_checkpoint(path)["global_step"]
        except MisconfigurationException:
            return -1

    return all(step(other) <= step(path) for other in path.parent.glob("*.ckpt"))


def with_checkpoint_settings(args: list[str], subcommands: Collection[str]) -> list[str]:
    """Put the settings of the checkpoint that a command line names before all that is typed.

    `fit` goes on with all of them; the others take network, data and precision. `--ckpt_path last`
    and `--ckpt_path best` mean the newest run of the recipe; without any, a job that SLURM has
    requeued goes on with its own.

    Raises:
        MisconfigurationException: No such checkpoint, not a checkpoint, or to `fit` one of weights
            only.
    """
    if not args or args[0] not in subcommands:
        if any(arg in subcommands for arg in args[1:]):
            raise MisconfigurationException(
                f"name the subcommand first: {' or '.join(subcommands)}"
            )
        return args
    subcommand, rest = args[0], _files_first(args[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", nargs="?", action="append", default=[])
    for flag in ("ckpt_path", "name", "trainer.default_root_dir"):
        parser.add_argument(f"--{flag}", nargs="?", dest=flag)
    typed = vars(parser.parse_known_args(rest)[0])
    files = [file for file in typed.pop("config") if file]
    settings = _configured(files) | {flag: value for flag, value in typed.items() if value}
    path = settings.get("ckpt_path")
    name = settings.get("name") or (Path(files[-1]).stem if files else "default")
    parent = Path(settings.get("trainer.default_root_dir", "runs"), name)
    if path is None:
        is_requeued = subcommand == "fit" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        last = _last_of_job(parent, job_of(args)) if is_requeued else None
        # The settings are those of the command, which is the same as before.
        going_on = ["--ckpt_path", str(_behind_last(last))] if last else []
        return [subcommand, *rest, *going_on]
    if path in ("last", "best"):
        path = _newest_run(parent, path)
    if subcommand == "fit" and Path(path).name == "last.ckpt":
        path = _behind_last(Path(path))
    checkpoint = read_checkpoint(path)
    if subcommand == "fit" and "optimizer_states" not in checkpoint:
        raise MisconfigurationException(
            f"{path} holds weights only: it can be tested, not gone on with"
        )
    restored = dict(checkpoint.get("run", {}))
    started_in = restored.pop("started_in", "")
    restored.pop("code", None)
    restored.pop("job", None)
    if subcommand != "fit":
        precision = restored.get("trainer", {}).get("precision")
        restored = {"name": restored.get("name"), "trainer": {"precision": precision}}
    for key, part in (("hyper_parameters", "model"), ("datamodule_hyper_parameters", "data")):
        restored[part] = {k: v for k, v in checkpoint.get(key, {}).items() if k != "_instantiator"}
    root = Path(restored["data"].get("root", ""))
    there = Path(started_in, root)
    if not root.is_dir() and there.is_dir():  # the command is given in another folder
        restored["data"]["root"] = str(there)
    text = yaml.safe_dump(restored, sort_keys=False)
    return [subcommand, "--config", text, *rest, "--ckpt_path", str(path)]


def _files_first(args: list[str]) -> list[str]:
    """Put config files before all flags, which win over them wherever they stand."""
    files: list[str] = []
    flags: list[str] = []
    words = iter(args)
    for word in words:
        if word in ("--config", "-c"):
            files += [word, *islice(words, 1)]
        else:
            (files if word.startswith(("--config=", "-c=")) else flags).append(word)
    return [*files, *flags]


def _configured(files: list[str]) -> dict[str, str]:
    """Return what config files say of the checkpoint to use and of where runs lie."""
    found: dict[str, str] = {}
    for file in files:
        try:
            settings = yaml.safe_load(Path(file).read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the parser will say what is wrong with it
        if isinstance(settings, dict):
            trainer = settings.get("trainer")
            root = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
            said = {**settings, "trainer.default_root_dir": root}
            keys = ("ckpt_path", "name", "trainer.default_root_dir")
            found |= {key: str(said[key]) for key in keys if said.get(key)}
    return found


def _behind_last(last: Path) -> Path:
    """Return what `last.ckpt` was about to become, if the run was killed when it had saved an epoch
    but not yet as the last one, too."""
    for path in last.parent.glob("*.ckpt"):
        with contextlib.suppress(FileNotFoundError, MisconfigurationException):
            if path.stat().st_mtime > last.stat().st_mtime and is_newest(path):
                return path
    return last


def job_of(args: list[str]) -> str | None:
    """Return what tells a command of a SLURM job from all others; outside of SLURM nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    return job and shlex.join([job, *args])


def _last_of_job(parent: Path, job: str | None) -> Path | None:
    """Return the last checkpoint that a command of a job saved before the job was requeued, if it
    did."""
    for path in reversed(_last_of_runs(parent)):
        with contextlib.suppress(MisconfigurationException):  # damaged
            if read_checkpoint(path).get("run", {}).get("job") == job:
                return path
    return None


def _last_of_runs(parent: Path) -> list[Path]:
    """Return the `last.ckpt` of all runs of a recipe, the newest run at the end."""
    found = parent.glob("version_*/checkpoints/last.ckpt")
    numbered = {int(n): path for path in found if (n := path.parts[-3][8:]).isdecimal()}
    return [numbered[version] for version in sorted(numbered)]


def _newest_run(parent: Path, which: str) -> Path:
    """Return the last or the best checkpoint of the newest run that has one."""
    found = _last_of_runs(parent)
    if not found:
        raise MisconfigurationException(f"--ckpt_path {which}: no run in {parent} has a checkpoint")
    last = found[-1]
    if which == "last":
        return last
    for state in read_checkpoint(last)["callbacks"].values():
        if path := state.get("best_model_path"):
            return last.with_name(Path(path).name)
    raise MisconfigurationException(f"--ckpt_path best: {run_of(last)} chose no best checkpoint")
