"""What a run was, in `config.yaml` and `run.json`, and in its checkpoints."""

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
    """Saves the run's settings, nested plain data: in `config.yaml`, and in every checkpoint, with
    what they were in earlier parts of a run, of which `resumed` is a checkpoint, or empty; and in
    `run.json` with the `command` that started it, and the code, packages, images and machine of its
    last part. Refuses to validate on other images than `seen`, on which the weights in the file
    `source` were trained."""

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
        """Note which images and which code these are, and refuse to validate on images that may
        have been trained on."""
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
        if (weights := self.settings["model"]["weights"]) and self.earlier:  # not read again
            its = self.earlier.get("versions", {}).get(weights, "")
            self.made_by["versions"][weights] = its
        before, now = _versions(self.earlier), _versions(self.made_by)
        self.changed |= {k: [v, now.get(k)] for k, v in before.items() if v != now.get(k)}
        if data.val_size:
            refuse_other_images(self.source, self.seen, self.made_by["images"]["train"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `config.yaml`; keep the one of a part with other settings under another name. Log
        the settings that Lightning does not: of the run and its trainer."""
        of_run = flat({key: self.settings[key] for key in RUN_SETTINGS})
        given = {k: v for k, v in of_run.items() if v is not None and ".logger" not in k}
        for logger in others(trainer):
            logger.log_hyperparams({**given, "run": str(trainer.default_root_dir)})
        files = {"config.yaml": self.settings}
        if self.changed:
            name = f"config_{len(self.parts)}.yaml"
            self.parts[-1] |= {"config": name, "settings": self.before}
            part = {"from_epoch": trainer.current_epoch, "changed": self.changed}
            self.parts.append({"config": "config.yaml", **part})
        # All of them, as the folder may be another than that of the part before.
        files |= {part["config"]: part["settings"] for part in self.parts if "settings" in part}
        folder = trainer.log_dir  # of which all ranks are told, so all must ask
        if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            if self.changed:  # the logger writes it once, and again if it is not there
                (Path(folder) / "hparams.yaml").unlink(missing_ok=True)
            texts = {n: yaml.safe_dump(of, sort_keys=False) for n, of in files.items()}
            texts["run.json"] = json.dumps({**self.made_by, "parts": self.parts}, indent=1)
            for name, text in texts.items():
                write_whole(Path(folder) / name, text.encode())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings that Lightning does not: of the run and its trainer."""
        checkpoint["run"] = {
            **{key: self.settings[key] for key in RUN_SETTINGS},
            "started_in": str(Path.cwd()),  # what relative paths start from
            **self.made_by,
            "parts": self.parts,
            "chosen_by": {key: getattr(keeper(trainer), key, None) for key in CHOICE},
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Restart optimizer and schedule if the command line gives another one."""
        for key in ("model.optimizer", "model.decay_matrices_only", "model.lr_scheduler"):
            if any(name.startswith(key) for name in self.changed):
                checkpoint["optimizer_states"] = checkpoint["lr_schedulers"] = []
                if key == "model.optimizer":
                    pl_module.lr = None  # found for the one before
                if trainer.is_global_zero:
                    print(f"{key} has changed: the state of the optimizer restarts")
                return


def _versions(made_by: dict[str, Any]) -> dict[str, str]:
    """Return by what code and packages, on which images and which kind of device a part was
    trained, as far as its version noted that."""
    kinds = {"code": "code", "versions": "version", "images": "images"}
    found = {
        f"{n} {word}": v for kind, word in kinds.items() for n, v in made_by.get(kind, {}).items()
    }
    return found | ({"device": made_by["device"]} if "device" in made_by else {})
