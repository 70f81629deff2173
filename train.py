"""Command-line entry point: train, test and predict from one YAML file.

    python train.py fit --config configs/base.yaml
    python train.py fit --config configs/base.yaml --data.batch_size 64 --seed_everything 1
    python train.py fit --ckpt_path runs/base/version_0/checkpoints/last.ckpt     # resume
    python train.py test --ckpt_path runs/base/version_0/checkpoints/last.ckpt
    tensorboard --logdir runs

A run is a folder runs/<name>/version_<n>/. A checkpoint contains its run's config, so `--ckpt_path`
alone is enough; the rest of the command line overrides that config.
"""

import argparse
import contextlib
import functools
import inspect
import io
import numbers
import os
import re
import secrets
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import _typehints
from jsonargparse.typing import register_type, restricted_number_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    Checkpoint,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning_utilities.core.enums import StrEnum
from rich.console import Console
from torch import Tensor

import runs
from calibration import UNKNOWN, is_file, notes_on
from callbacks import Board, History, LayerTable, PredictionsKeeper, PredictionTable, SaveSettings
from cifar10.archive import CLASSES
from cifar10.arrays import classes_in
from cifar10.batches import Predictions
from datamodule import CIFAR10DataModule
from lightning_module import FINDERS, Diverged, ImageClassifier
from memory import keep_freed_memory
from optimization import bf16_is_slow  # the import registers the optimizers' short names
from reports.card import commit, early_stops, model_card, parts_of
from reports.saved import Saved
from terminal import COMMANDS, ShortParser, refused, short_errors

# Argument types of torchvision's transforms and Lightning's callbacks.
register_type(
    numbers.Number, deserializer=lambda value: int(value) if value == int(value) else value
)
register_type(torch.device, str, torch.device)
# Some of Lightning's defaults are StrEnums, e.g. Timer's `interval`.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, e: dumper.represent_str(e.value))
BAREBONES = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
# Subcommand arguments that are fixed here. A checkpoint is loaded as data: none of its code runs.
FIXED = {"weights_only": True, "verbose": False, "return_predictions": False}
# What determines the validation set, besides its size.
SPLIT = ("split_seed", "stratify", "folds", "fold")
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])


def _drop_other_arguments(_parser: Any, previous: Any, new: Any) -> None:
    """Drop the arguments of a class that is replaced, so that the new one has its own defaults.
    jsonargparse keeps those that both classes take, e.g. another optimizer's learning rate."""
    if previous and "init_args" in previous and previous["class_path"] != new["class_path"]:
        previous["init_args"] = type(previous["init_args"])()


assert hasattr(_typehints, "discard_init_args_on_class_path_change")  # private, so it may disappear
_typehints.discard_init_args_on_class_path_change = _drop_other_arguments

# Classes that ambiguous short names stand for; jsonargparse would ask for the class path.
SHORT = {
    "ReduceLROnPlateau": "lightning.pytorch.cli.ReduceLROnPlateau",
    "RandomCrop": "cifar10.augment.RandomCrop",
}
_by_name = inspect.unwrap(_typehints.resolve_class_path_by_name)  # a notebook may run this twice


@functools.wraps(_by_name)
def _by_short_name(cls: Any, name: str) -> str:
    """Resolve a class name as jsonargparse does, or by `SHORT` if it is ambiguous."""
    try:
        return _by_name(cls, name)
    except ValueError:
        if name not in SHORT:
            raise
        return SHORT[name]


_typehints.resolve_class_path_by_name = _by_short_name


def _find_checkpoint(args: list[str]) -> Path | None:
    """Return the checkpoint that a command line names, or that a requeued SLURM job left.

    `last` and `best` refer to the recipe's newest run. To resume from `last.ckpt`, take the newest
    file in its folder: the run may have been killed before it updated `last.ckpt`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--ckpt_path", "--name", "--trainer.default_root_dir"):
        parser.add_argument(flag, dest=flag.strip("-"))
    parser.add_argument("--config", action="append", type=Path, default=[])
    flags = vars(parser.parse_known_args(args[1:])[0])
    config, path = (flags["config"] or [Path("default")])[-1], flags["ckpt_path"]
    settings: dict[str, Any] = {}
    for file in flags["config"]:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            _check_keys(content, str(file))
            settings |= runs.flat(content)
        except OSError:
            pass  # the parser says why
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise MisconfigurationException(f"{file} is not valid YAML: {error}") from error
    root = flags["trainer.default_root_dir"] or settings.get("trainer.default_root_dir") or "runs"
    parent = Path(root, flags["name"] or settings.get("name") or config.stem)
    if path is None:
        is_requeued = args[0] == "fit" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        folders = runs.versions(parent).items() if is_requeued else ()
        jobs = [folder for _, folder in sorted(folders) if (folder / ".job").exists()]
        command = _job(args)
        jobs = [f for f in jobs if (f / ".job").read_text(encoding="utf-8") == command]
        saved = [file for folder in jobs if (file := folder / "checkpoints" / "last.ckpt").exists()]
        if not saved:
            return None
        path = str(saved[-1])
    if args[0] == "fit" and Path(path).parts[-2:] == ("checkpoints", "last.ckpt"):
        runs.read_checkpoint(path)  # raises if it is missing or damaged
        return runs.newest(Path(path).parent)[1]
    return runs.named(path, parent)


def _check_keys(content: Any, file: str) -> None:
    """Raise on keys that jsonargparse misreads: a dotted key, which it applies to another class or
    the default one, and an argument next to a class_path."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if "class_path" in content and key not in CLASS_KEYS:
            raise MisconfigurationException(
                f"{file}: {key} belongs under init_args of {content['class_path']}"
            )
        if "." in str(key):
            parent, _, name = str(key).rpartition(".")
            raise MisconfigurationException(
                f"{file}: {key} must be nested: put {name} under {parent}, or under its init_args "
                "if that is a class"
            )
        for item in value if isinstance(value, list) else [value]:
            if key not in ("init_args", "dict_kwargs"):
                _check_keys(item, file)


def _job(args: list[str]) -> str:
    """Return a string that identifies a command of a SLURM job."""
    return shlex.join([os.environ.get("SLURM_JOB_ID", ""), *args])


class CLI(LightningCLI):
    """LightningCLI with a folder for every run, and checkpoints that contain their config."""

    def __init__(self, args: list[str]) -> None:
        self.args = args
        self.claimed: Path | None = None
        self.path: Path | None = None
        try:
            super().__init__(
                ImageClassifier,
                CIFAR10DataModule,
                save_config_callback=None,  # see SaveSettings
                trainer_defaults={
                    "default_root_dir": "runs",
                    "max_epochs": 30,  # Lightning's is 1,000
                    "num_sanity_val_steps": 0,
                },
                parser_class=ShortParser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # see `after_instantiate_classes`
                args=args,
                parser_kwargs={
                    "description": "CIFAR-10: one YAML file is one experiment.",
                    **{name: {"description": COMMANDS[name]} for name in {*args[:1]} & {*COMMANDS}},
                },
            )
        except BaseException:
            if self.claimed is not None:
                runs.forget(self.claimed)
            raise

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return Lightning's subcommands without `FIXED`; only the given one, as parsers are slow
        to build."""
        commands = {name: skip | {*FIXED} for name, skip in LightningCLI.subcommands().items()}
        command = self.args[0] if self.args else ""
        return {command: commands[command]} if command in commands else commands

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        parameters = inspect.signature(getattr(Trainer, subcommand)).parameters
        fixed = {name: value for name, value in FIXED.items() if name in parameters}
        return super()._prepare_subcommand_kwargs(subcommand) | fixed

    # ------------------------------------------------------------------------------- settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--name`, `predict --explain` and the ModelCheckpoint; set the default network."""
        text = "Run folder: runs/<name>/version_<n>/ (default: the last config's name)."
        parser.add_argument("--name", type=str | None, default=None, help=text)
        if self.args[:1] == ["predict"]:
            text = "Draw a Grad-CAM map of each image into explained/."
            parser.add_argument("--explain", type=bool, default=False, help=text)
        parser.add_class_arguments(runs.EpochCheckpoint, "checkpoint", skip={"dirpath"})
        parser.set_defaults({"model.network": {"class_path": "networks.default_network"}})

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        text = "Seed of everything but the split; true: draw one; false: none."
        parser.add_argument("--seed_everything", type=bool | Seed, default=0, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, preceded by the config of the checkpoint that it names."""
        self.checkpoint: dict[str, Any] = {}  # empty if none is read
        if args and args[0] in self.subcommands():
            self.path = _find_checkpoint(args)
        elif not {"--help", "-h"} & {*args}:
            is_other = args and args[0][0] != "-"
            problem = (
                f"unknown subcommand {args[0]}: use" if is_other else "name the subcommand first,"
            )
            raise MisconfigurationException(f"{problem} one of {', '.join(self.subcommands())}")
        if self.path is not None:
            self.checkpoint = runs.read_checkpoint(self.path)
            settings = runs.settings_of(self.checkpoint)
            if args[0] != "fit":
                precision = settings.get("trainer", {}).get("precision")
                is_slow = bf16_is_slow() and not torch.accelerator.is_available()
                if args[0] == "predict":
                    precision = "32-true"  # as in exports
                elif is_slow and str(precision).startswith("bf16"):
                    precision = "32-true"
                settings = {k: v for k, v in settings.items() if k in ("name", "model", "data")}
                settings["trainer"] = {"precision": precision}
            elif "optimizer_states" not in self.checkpoint:
                raise MisconfigurationException(
                    f"{self.path} holds weights only, so it can't be resumed: to start from them, "
                    "use --model.weights"
                )
            elif "network" not in self.checkpoint.get("hyper_parameters", {}):
                raise MisconfigurationException(
                    f"{self.path} was saved from Python and does not name its network: resume it "
                    "from Python"
                )
            text = yaml.safe_dump(settings, sort_keys=False)
            is_named = any(arg.startswith("--ckpt_path") for arg in args)
            # A requeued job repeats its command; what it drew or found is in the checkpoint.
            index = 1 if is_named else len(args)
            args = [*args[:index], "--config", text, *args[index:], "--ckpt_path", str(self.path)]
        flags = [arg.partition("=")[0] for arg in self.args if arg.startswith("--")]
        last = max((i for i, flag in enumerate(flags) if flag == "--config"), default=0)
        if set(flags[:last]) - {"--config", "--ckpt_path"}:
            _note("a --config overrides the flags before it")
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Draw the seed if it is `true`; Lightning would use 0."""
        config = self.config[self.subcommand]
        if config.seed_everything is True:
            is_first_rank = getattr(rank_zero_only, "rank", 0) == 0
            seed = None if is_first_rank else os.environ.get("PL_GLOBAL_SEED")
            config.seed_everything = secrets.randbits(32) if seed is None else int(seed)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's model hyperparameters override the
        command line, and ignore the data's."""

    def before_instantiate_classes(self) -> None:
        """Check and complete the config before it is used and saved."""
        config = self.config[self.subcommand]
        if config.ckpt_path and not self.checkpoint:
            raise MisconfigurationException("ckpt_path belongs on the command line: --ckpt_path")
        if self.subcommand != "fit" and config.trainer.barebones:
            raise MisconfigurationException(
                f"{self.subcommand}: trainer.barebones computes no metrics"
            )
        if self.checkpoint and "network" not in self.checkpoint.get("hyper_parameters", {}):
            network = config.model.network.class_path
            _note(f"{self.path} does not name its network: using {network}")
        if self.subcommand != "fit" and not self.checkpoint:
            raise MisconfigurationException(f"{self.subcommand} needs --ckpt_path CHECKPOINT")
        options = config.trainer
        options.default_root_dir = options.default_root_dir or "runs"
        for flag in BAREBONES if options.barebones else ():
            options[flag] = options[flag] or False  # Lightning rejects a truthy one
        if not config.name:
            files = [Path(str(file)) for file in config.config or [] if file]
            config.name = files[-1].stem if files else "default"
        if config.data.val_size == 0:
            if self.subcommand == "validate":
                raise MisconfigurationException("there is no validation set: data.val_size is 0")
            if str(config.checkpoint.monitor).startswith("val/"):
                config.checkpoint.monitor = None  # there is nothing to monitor
        saved = runs.settings_of(self.checkpoint)["model"].get("calibrate", "auto")
        if is_file(saved) and config.model.calibrate in ("auto", True):
            config.model.calibrate = saved  # a file; the checkpoint has its temperature
        self._name_classes()
        self._check_origin()
        self._dump_config()
        # jsonargparse writes this even for a string where a function would also be accepted.
        text = yaml.safe_dump(self.config_dump, sort_keys=False)
        text = re.sub(r"Unable to serialize instance (\w+)$", r"\1", text, flags=re.M)
        self.config_dump = yaml.safe_load(text)
        if self.subcommand == "fit":
            runs.check_monitors(self.config_dump)
            _check_trainer(options)
        for key, value in runs.flat(self.config_dump).items():
            if "Unable to serialize instance" in str(value):
                raise MisconfigurationException(f"{key} can't be saved in config.yaml: {value}")

    def _name_classes(self) -> None:
        """Set a new model's classes to those of the images, unless these are CIFAR-10, and
        `num_classes` of networks that take it."""
        model, names = self.config[self.subcommand].model, None
        if not self.checkpoint:
            names = classes_in(self.config[self.subcommand].data.root)
        if names and model.classes in (None, [*names]):
            model.classes = [*names]
            for part in (model.network, model.proxy):
                arguments: Any = part.get("init_args", {}) if part else {}
                if arguments.get("num_classes") == len(CLASSES):  # the default
                    arguments["num_classes"] = len(names)

    def _check_origin(self) -> None:
        """Record which file the initial weights come from (`source`) and which images they were
        trained on (`seen`). Raise if the validation set includes some of those."""
        config = self.config[self.subcommand]
        weights, data = config.model.weights, config.data
        self.source, self.seen = str(self.path or weights), dict[str, str]()
        saved: dict[str, Any] = {}
        if self.checkpoint:
            saved, self.seen = runs.settings_of(self.checkpoint), runs.images_of(self.checkpoint)
            if weights != saved["model"].get("weights"):
                raise MisconfigurationException("model.weights starts a run: leave out --ckpt_path")
        elif weights is not None:
            saved, self.seen = runs.origin(Path(weights))
            normalize = saved.get("model", {}).get("normalize")
            if saved and normalize != config.model.normalize:
                _note(f"{weights} was trained with model.normalize {normalize}, unlike this run")
            if data.val_size and not saved:
                _note(
                    f"{weights} does not record its training images: if some of them are in this "
                    "validation set, its accuracy is too high"
                )
            if saved and saved["model"].get("classes") != config.model.classes:
                saved, self.seen = {}, {}
                if data.val_size:
                    _note(
                        f"{weights} was trained on images of other classes: if some of them are in "
                        "this validation set, its accuracy is too high"
                    )
        previous = saved.get("data", {})
        if not data.val_size or "val_size" not in previous or self.subcommand == "predict":
            return
        previous = {"stratify": False, "folds": None, "fold": 0} | previous  # for earlier versions
        if data.val_size > previous["val_size"] or any(data[key] != previous[key] for key in SPLIT):
            kept = ", ".join(f"data.{key} {previous[key]}" for key in SPLIT)
            raise MisconfigurationException(
                f"{self.source} was trained on images of this validation set: keep its {kept}, and "
                f"a data.val_size of at most {previous['val_size']}"
            )
        if self.subcommand == "fit" and self.checkpoint and data.val_size != previous["val_size"]:
            raise MisconfigurationException(
                f"data.val_size {data.val_size}: earlier and later epochs would be compared on "
                f"different images: keep {previous['val_size']}, or use 0 for no validation"
            )

    def instantiate_classes(self) -> None:
        """Build data, model and trainer. Report arguments that a class rejects as user errors."""
        model, has_temperature = self.config[self.subcommand].model, False
        if self.checkpoint:  # it has the weights, and a file's temperature
            model.weights = None
            saved = runs.settings_of(self.checkpoint)["model"].get("calibrate", "auto")
            has_temperature = model.calibrate == saved and is_file(saved)
            model.calibrate = "auto" if has_temperature else model.calibrate
        if is_file(model.calibrate):
            for note in notes_on(model.calibrate, self.config_dump):
                _note(note)
        try:
            super().instantiate_classes()
        except (ValueError, OSError, ImportError) as error:
            raise refused(error) from error
        if has_temperature:
            self.model.calibration.is_fitted = False

    def after_instantiate_classes(self) -> None:
        """Save the hyperparameters of model and data to loggers and checkpoints.

        Their constructors can't: they receive live objects, and a checkpoint needs class paths.
        """
        for part, key in ((self.model, "model"), (self.datamodule, "data")):
            # `load_from_checkpoint` uses the instantiator to build objects from class paths.
            by_name = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
            part.save_hyperparameters({**self.config_dump[key], **by_name})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that writes to the run folder, with the callbacks of every run."""
        config = self.config_init[self.subcommand]
        options, is_fit = config.trainer, self.subcommand == "fit"
        is_real_fit = is_fit and not options.fast_dev_run
        self.run_folder = self.find_run_folder()
        loggers = _listed(options.logger)
        if is_fit and options.logger is not False:
            loggers.insert(0, TensorBoardLogger(self.run_folder, "", "", default_hp_metric=False))
        has_bar = options.enable_progress_bar is not False and sys.stdout.isatty()
        saves = is_real_fit and options.enable_checkpointing is not False
        # Without a terminal there is no progress bar. A finder would restart a resumed run.
        skipped = (() if has_bar else (ProgressBar,)) + (FINDERS if self.checkpoint else ())
        skipped += () if saves else (Checkpoint,)
        given = _listed(options.callbacks)
        for finder in (c for c in given if isinstance(c, FINDERS) and self.checkpoint):
            name = type(finder).__name__
            _note(f"a resumed run keeps its learning rate and batch size: {name} is skipped")
        callbacks = [c for c in given if not isinstance(c, skipped)]
        callbacks += [History(writes=not options.fast_dev_run)]
        if has_bar and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=25, leave=False))
        if options.enable_model_summary is not False:
            callbacks.append(LayerTable())
        if is_real_fit:
            settings = {**self.config_dump, "ckpt_path": None}  # to repeat the run from its start
            settings.pop("config", None)
            command = shlex.join(["python", "train.py", *self.args])
            saved = SaveSettings(settings, self.checkpoint, command, self.source, self.seen)
            callbacks += [Board(), saved]
            if loggers:
                callbacks.append(LearningRateMonitor("epoch"))
        if saves and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks += [config.checkpoint, *config.checkpoint.also_last()]
        elif saves:
            _note("the ModelCheckpoint in trainer.callbacks replaces checkpoint.*")
        savers = (c for c in callbacks if isinstance(c, ModelCheckpoint))
        averages = any(isinstance(c, WeightAveraging) for c in callbacks)
        if averages and any(c.save_weights_only for c in savers):
            raise MisconfigurationException(
                "save_weights_only would save the weights without their average: leave it out"
            )
        if options.max_time is not None:  # Lightning's would cut an epoch short
            callbacks.append(Timer(options.max_time, interval="epoch"))
        plugins = _listed(options.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(runs.WholeCheckpointIO())
        try:
            trainer = super().instantiate_trainer(
                default_root_dir=self.run_folder,
                logger=loggers or False,
                callbacks=callbacks,
                plugins=plugins,
                enable_progress_bar=has_bar,
                enable_checkpointing=saves,
                max_time=None,
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"trainer: {error}") from error
        if trainer.world_size == 1 and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise MisconfigurationException(
                "srun started several processes for one device: set trainer.devices, or srun -n 1"
            )
        is_bf16 = str(trainer.precision).startswith("bf16")
        if is_bf16 and isinstance(trainer.accelerator, CPUAccelerator) and bf16_is_slow():
            _note(
                f"trainer.precision {trainer.precision} is slow on this processor: use "
                "--trainer.precision 32-true"
            )
        return trainer

    def find_run_folder(self) -> Path:
        """Return the run folder of the checkpoint, or a new one if `fit` starts a run."""
        config = self.config[self.subcommand]
        parent = Path(config.trainer.default_root_dir) / config.name
        is_first_rank = getattr(rank_zero_only, "rank", 0) == 0  # Lightning broadcasts the folder
        if self.path is not None:
            run = self.checkpoint.get("run")
            if self.subcommand != "fit" or (
                run
                and self.path.parent.name == "checkpoints"
                and (run["name"], run["trainer"]["default_root_dir"])
                == (config.name, config.trainer.default_root_dir)
                and runs.newest(self.path.parent)[0] <= self.checkpoint["global_step"]
            ):
                return runs.run_of(self.path)
        if is_first_rank and not config.trainer.fast_dev_run:
            self.claimed = runs.claim(parent)
            if "SLURM_JOB_ID" in os.environ:
                (self.claimed / ".job").write_text(_job(self.args), encoding="utf-8")
            if self.path:
                print(f"resuming {self.path} in {self.claimed}")
        return self.claimed or parent

    # ------------------------------------------------------------------------------ subcommands

    def fit(self, **kwargs: Any) -> None:
        """Train, write weights and model card, and print what to do next."""
        max_epochs, code, done = self.config.fit.trainer.max_epochs, commit(), 0
        if self.checkpoint:
            loops = self.checkpoint["loops"]["fit_loop"]
            progress = loops["epoch_progress"]["current"]
            done = progress["processed"]  # if saved inside an epoch, those before it
        if max_epochs is not None and 0 <= max_epochs < done:
            raise MisconfigurationException(
                f"{self.path} has done {done} epochs: raise --trainer.max_epochs {max_epochs}"
            )
        is_cut = done and not loops["epoch_loop.batch_progress"]["is_last_batch"]  # by max_steps
        if is_cut and done == progress["ready"]:
            _note(f"epoch {done - 1} stopped before its last batch: the remaining ones are skipped")
        if self.checkpoint and done == max_epochs:
            self.trainer.print(
                f"{done} of {done} epochs are done: to train for longer, raise --trainer.max_epochs"
            )
            if (self.run_folder / "model.md").exists():
                return
        writes = self.trainer.is_global_zero and not self.config.fit.trainer.fast_dev_run
        with runs.locked(self.run_folder) if writes else contextlib.nullcontext():
            self._fit(**kwargs)
            if writes:
                self._finish(code)

    def _fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**kwargs)
            timers = (c for c in self.trainer.callbacks if isinstance(c, Timer))  # type: ignore[attr-defined]
            remaining = [seconds for c in timers if (seconds := c.time_remaining()) is not None]
            if min(remaining, default=1.0) <= 0:
                self.trainer.print(
                    "stopped at the time limit; to resume, raise it (it includes the time already "
                    "spent): --trainer.max_time, or the Timer's duration"
                )
            for reason in early_stops(self.trainer):
                self.trainer.print(f"stopped early: {reason}")
        except SystemExit as stop:  # how Lightning exits after Ctrl-C or SIGTERM
            if stop.code not in (None, 1):
                raise
            if self.trainer.is_global_zero:
                print(f"\nstopped; {self._resume()}")
            # Lightning's code is 1 after Ctrl-C and None after SIGTERM.
            raise SystemExit(128 + (signal.SIGINT if stop.code else signal.SIGTERM)) from None
        except Diverged as error:
            if not self.trainer.is_global_zero:
                raise SystemExit(1) from None  # rank 0 reports it
            raise Diverged(f"{error}; {self._resume(' with a lower learning rate')}") from None

    def _resume(self, hint: str = "") -> str:
        """Return the command that resumes from the last checkpoint, or say that there is none."""
        step, newest = runs.newest(self.run_folder / "checkpoints")
        path = newest if step >= 0 else self.path
        if path is None:
            return f"no checkpoint was saved; start again{hint}"
        return f"to resume{hint}: python train.py fit --ckpt_path {shlex.quote(str(path))}"

    def _finish(self, code: str) -> None:
        weights = io.BytesIO()
        torch.save(self.model.network.state_dict(), weights)
        runs.write_whole(self.run_folder / "model.pth", weights.getvalue())
        history = next(c for c in self.trainer.callbacks if isinstance(c, History))  # type: ignore[attr-defined]
        saved = next(c for c in self.trainer.callbacks if isinstance(c, SaveSettings))  # type: ignore[attr-defined]
        run = {**saved.made_by, "commit": code, "parts": saved.parts}
        keeper: Any = runs.keeper(self.trainer)
        best = runs.chosen(history.rows, keeper) if keeper else None
        step, path = runs.newest(self.run_folder / "checkpoints")
        if keeper and not keeper.monitor and Path(keeper.best_model_path).parent == path.parent:
            path = Path(keeper.best_model_path)  # the last one that it kept
        row, path = best or (None, path)
        run["temperature"] = self.model.temperature
        if step >= 0:
            run["temperature"] = runs.read_checkpoint(path).get("temperature")
        card = model_card(self.run_folder, self.config_dump, run, self.trainer, history.rows, row)
        file = self.run_folder / "model.md"
        previous = file.read_text(encoding="utf-8") if file.exists() else ""
        results = parts_of(previous)[1:]  # still valid: they name their epoch
        runs.write_whole(file, "".join((card, *results)).encode())
        print()
        if row:
            print(f"best  epoch {row['epoch']:.0f}, {keeper.monitor} {row[keeper.monitor]:.4f}")
        if row or (keeper and step >= 0):
            print(f"test  python train.py test --ckpt_path {shlex.quote(str(path))}")
        root = self.config.fit.trainer.default_root_dir
        if self.trainer.loggers:
            print(f"view  tensorboard --logdir {shlex.quote(str(root))}")
        print(f"run   {self.run_folder}")

    def before_validate(self) -> None:
        """Keep the predictions."""
        self.keeper = PredictionsKeeper()
        self.trainer.callbacks.append(self.keeper)  # type: ignore[attr-defined]

    def after_validate(self) -> None:
        """Print loss and accuracy; write the predictions to the run folder. Raise if the images may
        have been trained on."""
        images = self.datamodule.identity("train")
        runs.refuse_other_images(self.source, self.seen, images)
        self._report()
        predicted = self.keeper.predictions()
        is_whole = predicted is not None and len(predicted.labels) == len(self.datamodule.val_set)
        if predicted and is_whole and self.trainer.is_global_zero:
            file = self.run_folder / "validation.npz"
            runs.write_whole(file, self._saved(predicted, images, self._changed()))
            print(f"written to {file}")
        elif self.trainer.is_global_zero:
            print("only part of the images was evaluated: nothing is written")

    def _saved(self, predictions: Predictions, images: str, changed: dict[str, list[Any]]) -> bytes:
        """Return the content of a file with the predictions for a set of images."""
        logits, labels, indices = (part.numpy() for part in predictions)
        model = f"{self.path}, epoch {self.checkpoint['epoch']}, views: {self.model.tta}"
        model += "".join(f", {key} {new} (not {old})" for key, (old, new) in changed.items())
        return Saved(logits, labels, indices, images, model).content()

    def before_test(self) -> None:
        """Keep the predictions; read the human judgements, so that a damaged file fails early."""
        from reports.judges import JUDGES, read_judgements

        self.judgements = read_judgements(Path(self.datamodule.root, JUDGES))
        self.before_validate()

    def after_test(self) -> None:
        """Write results and figures to the run folder, and the figures to TensorBoard."""
        from reports.corruptions import Corruptions  # slow to import
        from reports.evaluation import Evaluation
        from reports.results import write_results

        metrics, data, model = self._report(), self.datamodule, self.model
        predictions = {name: self.keeper.predictions(i) for i, name in enumerate(data.test_sets)}
        tests = {name: p for name, p in predictions.items() if p is not None}
        if not tests or not all(p.logits.isfinite().all() for p in tests.values()):
            reason = "the network's outputs are NaN" if tests else "no image was tested"
            raise MisconfigurationException(f"{self.path}: {reason}")
        if not self.trainer.is_global_zero:
            return
        self._say_if_not_calibrated()
        images, count = data.identity("test"), sum(len(p.labels) for p in tests.values())
        is_whole = count == sum(map(len, data.test_sets.values()))
        is_cifar10 = images == "CIFAR-10"
        values = {**metrics, "set": images, "tta": model.tta, "changed": self._changed()}
        write = functools.partial(
            write_results, self.run_folder, other=data.other_name, count=f"{count:,} images",
            step=self.checkpoint["global_step"], is_own=images == self.seen.get("test", images),
        )  # fmt: skip
        terminal = Console(highlight=False, markup=False)
        if test := tests.get(""):
            people = self.judgements if is_cifar10 and is_whole else None
            evaluation = Evaluation(test, model.temperature, people, model.classes)
            summary = evaluation.summary()
            terminal.print(summary, evaluation.table(), sep="\n", soft_wrap=True)
            if is_cifar10 and people is None:
                print(
                    "not reported: accuracy without near-duplicates and doubtful labels, mistakes "
                    "that people make too;\nto fetch the judgements: "
                    f"python -m reports.judges --root {shlex.quote(data.root)}"
                )
            if is_whole:
                figures = evaluation.figures(data.test_set.images, self._focus)
                saved = self._saved(test, images, values["changed"])
                write(values | evaluation.values(), summary, figures, saved)
        elif is_whole:
            corruptions = Corruptions(tests)
            summary = corruptions.summary()
            terminal.print(corruptions.table(), summary, sep="\n", soft_wrap=True)
            write(values | corruptions.values(), summary, corruptions.figures())
        if not is_whole:
            print(f"only {count} images were tested: nothing is written")
        self._exit_if_skipped(data.skipped)

    def _changed(self) -> dict[str, list[Any]]:
        """Return and print where model and precision differ from the run's, as [run's, given]."""
        saved, used = runs.settings_of(self.checkpoint), self.config_dump
        changed = runs.differences(
            {"model": saved["model"], "precision": saved.get("trainer", {}).get("precision")},
            {"model": used["model"], "precision": used["trainer"]["precision"]},
        )
        for key, (old, new) in changed.items():
            print(f"with {key} {new}, not the run's {old}")
        return changed

    def _exit_if_skipped(self, count: int) -> None:
        if count:
            sys.exit(f"error: {count} files could not be read and were skipped")

    def _focus(self, pixels: Tensor, classes: Tensor) -> Tensor | None:
        from reports.focus import grad_cam

        model = self.model.eval()
        images = model.normalized(pixels.to(model.device) / 255)
        return grad_cam(model.network, images, classes.to(model.device))

    def _report(self) -> dict[str, Any]:
        """Print and return the metrics of a validation or a test."""
        assert self.path is not None
        metrics = self.trainer.callback_metrics
        values = {name: round(float(value), 6) for name, value in metrics.items()}
        epoch = self.checkpoint["epoch"]
        if self.trainer.is_global_zero:
            print(f"epoch {epoch}:", *(f"{name} {value:.4f}" for name, value in values.items()))
        return {"checkpoint": self.path.name, "epoch": epoch, **values}

    def _say_if_not_calibrated(self) -> None:
        if self.model.calibrates and self.model.temperature is None:
            print(
                f"probabilities are not calibrated: {self.path} {UNKNOWN};\n"
                "--model.calibrate CHECKPOINT uses another checkpoint's temperature"
            )

    def before_predict(self) -> None:
        """Set up `predictions.csv` in the run folder: a line per image file or test image."""
        if self.trainer.world_size > 1:
            raise MisconfigurationException("predict runs on one device: use --trainer.devices 1")
        data, config = self.datamodule, self.config.predict
        files = data.pictures.files if config.data.images else None
        if config.explain and files is None:
            raise MisconfigurationException(
                "--explain needs --data.images; `test` draws the test set's mistakes in focus.png"
            )
        self.table = PredictionTable(self.run_folder, files, explain=config.explain)
        if not config.trainer.fast_dev_run:
            self.trainer.callbacks.append(self.table)  # type: ignore[attr-defined]

    def after_predict(self) -> None:
        """Say if images were left out; exit with an error if files could not be read."""
        if self.config.predict.trainer.fast_dev_run:
            return
        self._say_if_not_calibrated()
        data, skipped = self.datamodule, self.table.skipped
        total = len(data.pictures if self.config.predict.data.images else data.test_set)
        if (done := len(self.table.rows) + skipped) < total:
            print(f"only the first {done} of {total}: trainer.limit_predict_batches is set")
        if skipped:
            sys.exit(f"error: {skipped} of {total} files could not be read and were skipped")
        self._exit_if_skipped(data.skipped)


def _check_trainer(options: Any) -> None:
    """Raise on options that Lightning accepts, then fails on or ignores."""
    if options.limit_train_batches == 0:
        raise MisconfigurationException("trainer.limit_train_batches 0 trains nothing")
    if options.check_val_every_n_epoch == 0:
        raise MisconfigurationException(
            "trainer.check_val_every_n_epoch 0: to train without validation, --data.val_size 0"
        )
    callbacks = _listed(options.callbacks)
    if any(c.class_path.endswith(".Timer") and c.init_args.interval == "step" for c in callbacks):
        raise MisconfigurationException(
            "a Timer in trainer.callbacks with interval step cuts an epoch short: set its interval "
            "to epoch, or use --trainer.max_time"
        )
    if re.search("spawn|fork|notebook", str(options.strategy)):
        raise MisconfigurationException(
            f"trainer.strategy {options.strategy} loses the metrics of its processes: use ddp"
        )
    if any(c.class_path.endswith(".BackboneFinetuning") for c in callbacks):
        raise MisconfigurationException(
            "BackboneFinetuning needs a module with a `backbone`, which ImageClassifier lacks"
        )


@rank_zero_only
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _listed(value: Any) -> list[Any]:
    """Return a trainer argument as a list: it may be an object, a list, a bool or None."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]


def main(args: list[str] | None = None) -> None:
    """Run the command line. A user's mistake prints one line and exits with a non-zero code."""
    keep_freed_memory()
    if "" not in sys.path:
        sys.path.append("")  # the current folder, for the user's classes
    if "SLURM_STEP_ID" not in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1":
        del os.environ["SLURM_NTASKS"]  # not started by srun, so one process
    with short_errors():
        CLI(sys.argv[1:] if args is None else args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # or its threads may abort the exit


if __name__ == "__main__":
    main()
