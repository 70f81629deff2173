"""The model card: how to repeat a run, and what it achieved."""

import copy
import inspect
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cifar10 import archive
from runs import Row

LIMITS = (  # trainer arguments that the card names unless they are the defaults
    "max_steps", "max_time", "limit_val_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "accumulate_grad_batches", "gradient_clip_val",
)  # fmt: skip
FLAWS = (
    "CIFAR-10 (Krizhevsky, 2009) comes without a licence. Its images are from Tiny Images, which "
    "was withdrawn in 2020 for offensive labels. "
    "3.25 % of the test images have near-duplicates in the training or test set (ciFAIR), and "
    "about 0.5 % of the test labels are wrong (Northcutt et al., 2021)"
)
RESULT, OTHERS = "\n## On the test set\n", "\n## On other test sets\n"


def commit() -> str:
    """Return the git commit of this code, and whether it has changed since."""
    description = _git("ls-files", "train.py") and _git(
        "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= with changes"
    )
    return description or "unknown: not in a git checkout"


def untracked(code: dict[str, str]) -> dict[str, str]:
    """Return the entries of a run's `code`, by module, that this project's git does not track."""
    git = _git("ls-files")
    tracked = {
        f.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in git.splitlines()
    }
    return {name: version for name, version in code.items() if git and name not in tracked}


def _git(*command: str) -> str:
    """Return git's output in this project's folder; nothing without git or a checkout."""
    project = Path(__file__).parents[1]
    if not shutil.which("git"):
        return ""
    result = subprocess.run(["git", *command], cwd=project, capture_output=True, text=True)
    return result.stdout.strip()


def model_card(
    folder: Path,
    settings: dict[str, Any],
    run: dict[str, Any],
    trainer: Trainer,
    rows: list[Row],
    best: Row | None,
) -> str:
    """Return the card of a trained run as Markdown. `settings` is its `config.yaml`, `rows` are its
    epochs, and `best` is the one that validation chose. `run` has what `run.json` has, the `commit`
    of the code, and the `temperature` of the chosen checkpoint."""
    model, data, weights = settings["model"], settings["data"], settings["model"]["weights"]
    parts, images = run["parts"], run["images"]
    other = "not CIFAR-10 as published"
    is_cifar10 = set(images.values()) == {"CIFAR-10"}
    module: Any = trainer.lightning_module
    size = sum(p.numel() for p in module.network.parameters())
    used, total = trainer.num_training_batches, len(trainer.train_dataloader)  # type: ignore[arg-type]
    done: int = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    defaults = inspect.signature(Trainer.__init__).parameters
    limits = {key: settings["trainer"][key] for key in LIMITS}
    batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
    held_out = len(trainer.datamodule.val_set)  # type: ignore[attr-defined]
    lines = {
        "Command": f"`{run['command']}`" if run["command"] else "",
        "Repeat": f"`python train.py fit --config {shlex.quote(str(folder / parts[0]['config']))}`"
        + (", then resume" if len(parts) > 1 else ""),
        "Code": f"commit {run['commit']}",
        "Files outside this project's commits": ", ".join(
            f"`{name}`, SHA-256 {version}..." for name, version in untracked(run["code"]).items()
        ),
        "Network": f"{_call(model['network'])}, {size:,} parameters, "
        f"{flops(module.network) / 1e6:,.1f} million FLOPs an image",
        "Data": f"CIFAR-10, python version, md5 {archive.ARCHIVE_MD5}"
        if is_cifar10
        else ("other images, of which nothing was verified" if model["classes"] else other)
        + f": SHA-256 of training images and labels {images['train']}, "
        f"of test images and labels {images['test']}",
        "Split": f"{held_out:,} of the training images held out for validation"
        + (f", as fold {data['fold']} of {data['folds']}" if data["folds"] else "")
        + f", split_seed {data['split_seed']}"
        + (", stratified" if data["stratify"] else "")
        + ("" if data["train_size"] is None else f"; {data['train_size']:,} of the others trained")
        + "; the test set chose nothing",
        "Augmentation": ", ".join(_call(step) for step in data["augment"]),
        "Normalisation": model["normalize"] or "",
        "Epochs": f"{len(rows)} of {settings['trainer']['max_epochs']}"
        + (f", each with {used} of {total} batches" if used < total else "")
        + (f", the last one stopped after {done} of its batches" if done < used else "")
        + "".join(f"; stopped early: {reason}" for reason in early_stops(trainer)),
        "Batches": f"{batch_size} images"
        + (", found by BatchSizeFinder" if batch_size != data["batch_size"] else ""),
        "Weights": f"at first those of {weights}, SHA-256 {run['versions'].get(weights)}..."
        if weights
        else "",
        "Optimizer": _call(model["optimizer"])
        + (f", learning rate {module.lr:.3g} found by LearningRateFinder" if module.lr else "")
        + (", weight decay of matrices only" if model["decay_matrices_only"] else ""),
        "Schedule": _call(model["lr_scheduler"]) if model["lr_scheduler"] else "",
        "Loss": ", ".join(
            text
            for text, applies in (
                (f"label smoothing {model['label_smoothing']}", model["label_smoothing"]),
                (f"class weights {model['class_weights']}", model["class_weights"]),
                ("softmax before the cross entropy", model["softmax_before_loss"]),
            )
            if applies
        ),
        "Seed": settings["seed_everything"],
        "Precision": trainer.precision_plugin.precision,
        "Trainer": ", ".join(f"{k} {v}" for k, v in limits.items() if v != defaults[k].default),
        "Evaluated": f"with {model['tta']} views" if model["tta"] != "none" else "",
        "Probabilities": said_of_probabilities(model["calibrate"], run["temperature"]),
    }
    for i, part in enumerate(parts[1:], 1):
        changes = ", ".join(f"{k} {new} (was {old})" for k, (old, new) in part["changed"].items())
        lines[f"Resumed ({i})"] = f"from epoch {part['from_epoch']} with {changes}"
    lines |= {
        "Time": f"{sum(row['seconds'] for row in rows):.0f} s on {run['machine']}",
        "Versions": "".join(f"{n} {v}, " for n, v in run["versions"].items() if n != weights)
        + f"Python {platform.python_version()}, {platform.system()}",
        "Classes": ", ".join(module.classes) + "; it has no answer for anything else",
        "Known flaws": FLAWS if is_cifar10 else "",
    }
    if best is not None and "val/acc" in best:
        lines["Validation"] = f"accuracy {best['val/acc']:.2%} in the chosen epoch, {best['epoch']}"
    text = "\n".join(f"- **{key}**: {value}" for key, value in lines.items() if value != "")
    return f"# {settings['name']}, {folder.name}\n\n{text}\n"


def flops(network: nn.Module) -> float:
    """Return a network's floating-point operations per image. A multiply-add counts as two; only
    convolutions and matrix products count."""
    copied = copy.deepcopy(network).cpu().float().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copied(torch.zeros(2, 3, 32, 32))
    return counter.get_total_flops() / 2


def said_of_probabilities(calibrate: bool | str, temperature: float | None) -> str:
    """Say whether probabilities are calibrated, given `model.calibrate`, and how."""
    if not calibrate or temperature is None:
        return "not calibrated"
    source = "fitted on validation" if calibrate in ("auto", True) else f"of {calibrate}"
    return f"calibrated, by a temperature {source}"


def early_stops(trainer: Trainer) -> list[str]:
    """Return why EarlyStopping ended the training, if it did."""
    stoppers = trainer.early_stopping_callbacks
    # In a resumed run, the callback remembers why the previous part ended.
    ended = [c for c in stoppers if c.stopped_epoch + 1 == trainer.current_epoch]
    return [c.stopping_reason_message for c in ended if c.stopping_reason_message]


def with_result(
    card: str, epoch: str, summary: str, images: str, changed: dict[str, list[Any]]
) -> str:
    """Return a card with a test result, replacing an earlier one. It names the epoch, the images,
    and arguments that differ from the run's."""
    lines = "\n".join(f"- {line}" for line in summary.splitlines())
    changes = "".join(f", with {k} {new} (not {old})" for k, (old, new) in changed.items())
    heading = f"Of {epoch} on the test images of {images}{changes}:"
    text, _, others = parts_of(card)
    return f"{text}{RESULT}\n{heading}\n\n{lines}\n{others}"


def with_other(card: str, name: str, line: str) -> str:
    """Return a card with a line for another test set, replacing one of that name."""
    text, result, others = parts_of(card)
    earlier = others.removeprefix(OTHERS).splitlines(True)
    kept = [old for old in earlier if old.strip() and f"**{name}**" not in old]
    return f"{text}{result}{OTHERS}\n{''.join([*kept, line])}"


def parts_of(card: str) -> tuple[str, str, str]:
    """Split a card, unchanged, into the run, its test, and other test sets."""
    text, *others = card.partition(OTHERS)
    text, *result = text.partition(RESULT)
    return text, "".join(result), "".join(others)


def _call(settings: Any) -> str:
    """Return a class and its arguments, as in `Adam(lr=0.0005)`, leaving out nulls."""
    if not isinstance(settings, dict):
        return f"`{settings}`"
    arguments = settings.get("init_args", {})
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items() if value is not None)
    return f"`{settings['class_path'].rpartition('.')[2]}({listed})`"
