"""The model card: what a run was, so that it can be repeated, and what came of it."""

import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import lightning
import torch
import torchvision

from callbacks.history import Row
from cifar10 import archive
from runs import processor

RESULT = "\n## On the test set\n"


def commit() -> str:
    """Return the git commit of this code, and whether it was changed since."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *words], cwd=here, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not in a git checkout"


def model_card(
    folder: Path,
    settings: dict[str, Any],
    network: torch.nn.Module,
    device: torch.device,
    rows: list[Row],
    best: Row | None,
    code: str,
) -> str:
    """Return the card of a run that has been trained, as Markdown.

    Args:
        folder: The run's.
        settings: As in its `config.yaml`.
        network: What was trained.
        device: Where.
        rows: Its epochs.
        best: The epoch that validation chose.
        code: The commit that it was trained by.

    """
    model, data, trainer = (settings[part] for part in ("model", "data", "trainer"))
    config = shlex.quote(str(folder / "config.yaml"))
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores, " if device.type == "cpu" else ""
    val_size = data["val_size"]
    steps = [_call(step) for step in data["augment"]] or ["none"]
    lines = {
        "Repeat": f"`python train.py fit --config {config}`",
        "Code": f"commit {code}",
        "Network": f"{_call(model['network'])}, {sum(p.numel() for p in network.parameters()):,} "
        "parameters",
        "Data": f"CIFAR-10, python version, md5 {archive.ARCHIVE_MD5}"
        + ("" if data["verify"] else "; not verified: other images were admitted"),
        "Split": f"{val_size:,} of the training images held out for validation, split_seed "
        f"{data['split_seed']}; the test set chose nothing",
        "Augmentation": ", ".join(steps),
        "Training": f"{len(rows)} of {trainer['max_epochs']} epochs of batches of "
        f"{data['batch_size']}, {_call(model['optimizer'])}, seed {settings['seed_everything']}, "
        f"precision {trainer['precision'] or '32-true'}"
        + (f", {_call(model['lr_scheduler'])}" if model["lr_scheduler"] else "")
        + (f", label smoothing {model['label_smoothing']}" if model["label_smoothing"] else "")
        + (", softmax before the loss" if model["softmax_before_loss"] else "")
        + (f"; evaluated with {model['tta']} views" if model["tta"] != "none" else ""),
        "Time": f"{sum(row['seconds'] for row in rows):.0f} s on {cores}{hardware}",
        "Versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}, lightning "
        f"{lightning.__version__}, Python {platform.python_version()}, {platform.system()}",
        "Classes": ", ".join(archive.CLASSES) + "; it has no answer for anything else",
    }
    if best is not None and "val/acc" in best:
        lines["Validation"] = f"accuracy {best['val/acc']:.2%} in the chosen epoch, {best['epoch']}"
    text = "\n".join(f"- **{key}**: {value}" for key, value in lines.items())
    return f"# {settings['name']}, {folder.name}\n\n{text}\n"


def with_result(card: str, checkpoint: str, summary: str) -> str:
    """Return a card with the result of a test in place of that of an earlier one."""
    lines = "\n".join(f"- {line}" for line in summary.splitlines())
    return f"{card.partition(RESULT)[0]}{RESULT}\nOf `{checkpoint}`:\n\n{lines}\n"


def _call(settings: Any) -> str:
    """Return a class and its arguments, as in `Adam(lr=0.0005)`; those that are null left out."""
    if not isinstance(settings, dict):
        return f"`{settings}`"
    arguments = settings.get("init_args", {})
    said = ", ".join(f"{key}={value}" for key, value in arguments.items() if value is not None)
    return f"`{settings['class_path'].rpartition('.')[2]}({said})`"
