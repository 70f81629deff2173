"""What defines a run of a study, and its record: plain data, a line of `runs.jsonl`.

Two runs are the same if they agree in all settings that affect the result, the images, the kind of
device, the packages, and every file of this project and of the user that they imported.
"""

import csv
import functools
import importlib.util
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from runs import (
    WHERE,
    Row,
    code_version,
    differences,
    file_version,
    natural_mode,
    package_version,
    package_versions,
    ranked,
)

Record = dict[str, Any]

KEYS = {  # of every record
    "seed", "flags", "ended", "settings", "images", "device", "machine", "parts", "code",
    "versions", "epochs",
}  # fmt: skip
GUESSING = math.log(10)  # the loss of equal probabilities for ten classes


@dataclass
class Plan:
    """What defines the runs of one setting."""

    settings: dict[str, Any]  # that affect the result, nested as in `config.yaml`
    images: dict[str, str]  # identities of the training and test images
    device: str  # type of the trainer's device: `cpu` or `cuda`

    def of(self, seed: int, has_own_split: bool) -> "Plan":
        """Return the plan of the run with this seed."""
        settings = {**self.settings, "seed_everything": seed}
        if has_own_split:
            settings["data"] = {**settings["data"], "split_seed": seed}
        return replace(self, settings=settings)

    def differs(self, record: Record) -> list[str]:
        """Return the settings in which a run, in any of its epochs, differs from this plan."""
        changed = [*differences(record["settings"], self.settings)]
        if record["images"] != self.images:
            changed.append("images")
        if record["device"] != self.device:
            changed.append("device")
        if len(record["parts"]) > 1:
            changed.append("resumed with different settings")
        return changed


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove what doesn't affect the result, `WHERE` and `checkpoint`, from settings nested as in
    `config.yaml`; return them."""
    for key in (*WHERE, "checkpoint"):
        part, _, name = key.rpartition(".")
        (settings[part] if part else settings).pop(name, None)
    return settings


def other_code(record: Record) -> list[str]:
    """Return the modules and packages that have changed since a run."""
    current = {name: _module(name) for name in record["code"]}
    current |= {name: package_version(name) for name in record["versions"]}
    recorded = record["code"] | record["versions"]
    return [name for name in recorded if current[name] != recorded[name]]


@functools.cache
def _module(name: str) -> str:
    """Return the current version of a module's file, or "" if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    file = Path(spec.origin or "") if spec else Path()
    return file_version(file) if file.is_file() else ""


def read_run(version: Path) -> Record:
    """Read the record of a run that has started training from its folder."""
    settings = without_places(yaml.safe_load((version / "config.yaml").read_text(encoding="utf-8")))
    made_by = json.loads((version / "run.json").read_text(encoding="utf-8"))
    metrics = version / "metrics.csv"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    rows = list(csv.DictReader(lines))
    epochs = {
        key: [float(row[key]) if row[key] else None for row in rows]
        for key in (rows[0] if rows else ())
        if key not in ("step", "val/step", "images_per_second")
    }
    return {"seed": settings["seed_everything"], **made_by, "settings": settings, "epochs": epochs}


def finished(
    version: Path | None, plan: Plan, flags: dict[str, Any], choose: str, ended: str
) -> Record:
    """Return the record of a run that has ended, early if `ended` says why. If it left no folder,
    build the record from its plan."""
    code = {k: v for k, v in code_version().items() if _module(k) == v}
    code = {k: v for k, v in code.items() if not k.startswith(("study", "studies"))}
    seed, versions = plan.settings["seed_everything"], package_versions(plan.settings)
    unseen = {"machine": "", "parts": [{}], "code": code, "versions": versions, "epochs": {}}
    record = read_run(version) if version else {"seed": seed, **vars(plan), **unseen}
    rows = rows_of(record) or [{}]
    first_loss, loss = (rows[i].get("train/loss", 0.0) for i in (0, -1))
    may_fall = first_loss > loss or len(rows) == 1  # from a bad start, above guessing
    classes = record["settings"]["model"].get("classes")  # None: CIFAR-10's
    guessing = math.log(len(classes)) if classes else GUESSING
    if not (loss < 1.05 * guessing or (may_fall and loss < 3 * guessing)):  # NaN fails both
        ended = ended or f"diverged: train/loss {loss:.3g} in epoch {rows[-1]['epoch']:.0f}"
    elif best_of(record, choose) is None:
        ended = ended or "without a validation"
    return {"flags": flags, "ended": ended, **record}


def rows_of(record: Record) -> list[Row]:
    """Return the epochs of a run."""
    columns = record["epochs"]
    rows = zip(*columns.values(), strict=True)
    return [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in rows]


def best_of(record: Record, choose: str) -> Row | None:
    """Return the best epoch by `val/acc` or `val/loss`, the first if several are."""
    return next(iter(ranked(rows_of(record), choose, natural_mode(choose) or "")), None)


def read_records(file: Path) -> list[Record]:
    """Return the runs of a `runs.jsonl`.

    Raises:
        MisconfigurationException: The file can't be read, or is no `runs.jsonl`.
    """
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not all(record.keys() >= KEYS for record in records):
            raise ValueError
    except OSError as error:
        raise MisconfigurationException(f"--from {file}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise MisconfigurationException(f"--from {file} is not a study's runs.jsonl") from error
    return records
