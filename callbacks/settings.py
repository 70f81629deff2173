"""The record of a run in `config.yaml`, `run.json` and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.tensorboard import others
from runs import (
    RUN_SETTINGS,
    code_version,
    differences,
    flat,
    keeper,
    machine,
    package_versions,
    refuse_other_images,
    settings_of,
    write_whole,
)

CHOICE = ("monitor", "mode", "filename", "auto_insert_metric_name")  # of ModelCheckpoint


class SaveSettings(Callback):
    """Saves the run's config, as nested plain data, to `config.yaml` and every checkpoint, with the
    configs of earlier parts of a resumed run. `run.json` gets the `command` that started the
    run, and the code, packages, images and machine of its last part.

    `resumed` is the checkpoint to resume from, or empty. With a validation set, raises if the
    images are not the `seen` ones that the weights in the file `source` were trained on.
    """

    takes_many_steps = True

    def __init__(
        self,
        settings: dict[str, Any],
        resumed: dict[str, Any],
        command: str,
        source: str,
        seen: dict[str, str],
    ) -> None:
        self.settings = settings
        self.source, self.seen = source, seen
        self.before = settings_of(resumed) if resumed else settings
        self.changed = differences(self.before, settings)
        self.earlier: dict[str, Any] = resumed.get("run", {})
        self.command = self.earlier.get("command", "" if resumed else command)
        first = {"from_epoch": 0, "config": "config.yaml", "changed": {}}
        self.parts: list[dict[str, Any]] = self.earlier.get("parts", [first])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the images and the code. Raise if validation images may have been trained
        on."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        self.made_by: dict[str, Any] = {
            "command": self.command,
            "code": code_version(),
            "versions": package_versions(self.settings),
            "images": {part: data.identity(part) for part in ("train", "test")},
            "device": device.type,
            "machine": machine(device),
        }
        if (weights := self.settings["model"]["weights"]) and self.earlier:  # not read on resume
            version = self.earlier.get("versions", {}).get(weights, "")
            self.made_by["versions"][weights] = version
        previous, current = _versions(self.earlier), _versions(self.made_by)
        self.changed |= {k: [v, current.get(k)] for k, v in previous.items() if v != current.get(k)}
        if data.val_size:
            refuse_other_images(self.source, self.seen, self.made_by["images"]["train"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml`; keep that of a part with another config under another name. Log the
        arguments that Lightning doesn't: those of the run and its trainer."""
        run_settings = flat({key: self.settings[key] for key in RUN_SETTINGS})
        given = {k: v for k, v in run_settings.items() if v is not None and ".logger" not in k}
        for logger in others(trainer):
            logger.log_hyperparams({**given, "run": str(trainer.default_root_dir)})
        files = {"config.yaml": self.settings}
        if self.changed:
            name = f"config_{len(self.parts)}.yaml"
            self.parts[-1] |= {"config": name, "settings": self.before}
            part = {"from_epoch": trainer.current_epoch, "changed": self.changed}
            self.parts.append({"config": "config.yaml", **part})
        # All of them, as earlier parts may have another folder.
        files |= {part["config"]: part["settings"] for part in self.parts if "settings" in part}
        folder = trainer.log_dir  # a broadcast, so all ranks must call it
        if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self.changed:  # the logger rewrites it only if missing
                (Path(folder) / "hparams.yaml").unlink(missing_ok=True)
            texts = {n: yaml.safe_dump(config, sort_keys=False) for n, config in files.items()}
            texts["run.json"] = json.dumps({**self.made_by, "parts": self.parts}, indent=1)
            for name, text in texts.items():
                write_whole(Path(folder) / name, text.encode())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the arguments that Lightning doesn't: those of the run and its trainer."""
        checkpoint["run"] = {
            **{key: self.settings[key] for key in RUN_SETTINGS},
            "started_in": str(Path.cwd()),  # relative paths start here
            **self.made_by,
            "parts": self.parts,
            "chosen_by": {key: getattr(keeper(trainer), key, None) for key in CHOICE},
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Reset optimizer and schedule if the command line has changed one of them."""
        for key in ("model.optimizer", "model.decay_matrices_only", "model.lr_scheduler"):
            if any(name.startswith(key) for name in self.changed):
                checkpoint["optimizer_states"] = checkpoint["lr_schedulers"] = []
                if key == "model.optimizer":
                    pl_module.lr = None  # found for the previous one
                if trainer.is_global_zero:
                    print(f"{key} has changed: the optimizer's state is reset")
                return


def _versions(made_by: dict[str, Any]) -> dict[str, str]:
    """Return the code, packages, images and kind of device that a part was trained with, if its
    version recorded them."""
    kinds = {"code": "code", "versions": "version", "images": "images"}
    versions = {
        f"{n} {label}": v for kind, label in kinds.items() for n, v in made_by.get(kind, {}).items()
    }
    return versions | ({"device": made_by["device"]} if "device" in made_by else {})
