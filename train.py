"""The door: one YAML file is one experiment.

    python train.py fit --config configs/base.yaml
    python train.py fit --config configs/base.yaml --data.batch_size 64 --seed_everything 1
    python train.py fit --ckpt_path runs/base/version_0/checkpoints/last.ckpt     # goes on with it
    python train.py test --ckpt_path runs/base/version_0/checkpoints/last.ckpt
    tensorboard --logdir runs

A run lies in runs/<name>/version_<n>/. A checkpoint carries the settings of its run, so
`--ckpt_path` alone is enough; what is typed wins over it.
"""

import contextlib
import ctypes
import io
import json
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

import optimization  # noqa: F401  # so that short names of its classes are known
from callbacks import Board, History, ImagesBar, LayerTable, PredictionsKeeper, PredictionTable
from datamodule import CIFAR10DataModule
from lightning_module import Diverged, ImageClassifier
from reports.card import commit, model_card, with_result
from runs import (
    RUN_SETTINGS,
    LastCheckpoint,
    WholeCheckpointIO,
    claim,
    code_version,
    forget,
    is_newest,
    job_of,
    read_checkpoint,
    relocate_state,
    run_of,
    with_checkpoint_settings,
    write_whole,
)
from terminal import KNOWN_ERRORS, OneLineParser, errors_in_one_line, quieten

METRICS = [f"{stage}/{name}" for stage in ("train", "val") for name in ("loss", "acc")]


class SaveConfig(SaveConfigCallback):
    """Saves the run's settings: in `config.yaml`, and in every checkpoint; there also the job of
    SLURM that it is."""

    takes_many_steps = True

    def __init__(self, *args: Any, job: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: a checkpoint that does not fit must leave its run as it was."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `config.yaml`."""
        self.config = self.config.clone()
        self.config.ckpt_path = None  # `--config config.yaml` repeats the run from its start
        text = self.parser.dump(self.config, skip_none=False)
        folder = trainer.log_dir  # of which all ranks are told, so all must ask
        if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_whole(Path(folder) / "config.yaml", text.encode())
        self.settings = yaml.safe_load(text)
        self.code = code_version()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add those settings that Lightning does not: of the run and its trainer."""
        checkpoint["run"] = {key: self.settings[key] for key in RUN_SETTINGS}
        checkpoint["run"]["started_in"] = str(Path.cwd())  # what relative paths start from
        checkpoint["run"]["code"] = self.code
        checkpoint["run"]["job"] = self.job

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let what is typed win over what the checkpoint would restore, and tell ModelCheckpoint
        where its files lie now: where the run's folder was moved, or is named by another path, it
        would forget which epoch was best."""
        before, now = checkpoint.get("hyper_parameters", {}), pl_module.hparams
        if any(before.get(key) != now.get(key) for key in ("optimizer", "lr_scheduler")):
            checkpoint["optimizer_states"] = checkpoint["lr_schedulers"] = []
        callback = trainer.checkpoint_callback
        for state in checkpoint["callbacks"].values():
            if isinstance(callback, ModelCheckpoint) and "best_model_path" in state:
                relocate_state(state, str(callback.dirpath))


class NoProfiler(PassThroughProfiler):
    """Measures nothing, as Lightning's default does, but without a generator for each of the fifty
    things that it does not measure in a step."""

    nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self.nothing


def keep_freed_memory() -> None:
    """Let a step have the memory of the step before.

    glibc gives the memory of large freed tensors back to the system, which clears it page by page
    when it is asked for again: in a step of `fast94` 800,000 page faults, a fifth of its time.
    Other C libraries are left as they are.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never
        libc.mallopt(mmap_max, 0)  # no tensor has pages of its own


class CLI(LightningCLI):
    """LightningCLI with a folder for every run, and checkpoints that carry their settings."""

    def __init__(self, args: list[str], callbacks: Sequence[Callback] = ()) -> None:
        self.claimed: Path | None = None
        self.watching = callbacks  # besides those that the settings name
        self.is_running = False
        try:
            super().__init__(
                ImageClassifier,
                CIFAR10DataModule,
                save_config_callback=SaveConfig,
                # a resumed run may have other settings
                save_config_kwargs={"overwrite": True, "job": job_of(args)},
                trainer_defaults={
                    "default_root_dir": "runs",
                    "max_epochs": 30,  # Lightning's is 1,000
                    "num_sanity_val_steps": 0,
                },
                seed_everything_default=0,
                parser_class=OneLineParser,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # see `after_instantiate_classes`
                args=args,
            )
        except BaseException as error:
            if self.claimed is not None:
                forget(self.claimed)
            if (
                isinstance(error, KNOWN_ERRORS)
                or self.is_running
                or not isinstance(error, Exception)
            ):
                raise
            # Settings can be wrong in any way that a class refuses them.
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise MisconfigurationException(
                f"{type(error).__name__}: {error} (at {where.filename}, line {where.lineno})"
            ) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Take Lightning's, without the arguments that have one right value here."""
        fixed = {"weights_only", "verbose", "return_predictions"}
        return {name: skip | fixed for name, skip in LightningCLI.subcommands().items()}

    # ---------------------------------------------------------------------------- the settings

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name and its ModelCheckpoint, and set defaults."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The run lies in runs/<name>/version_<n>/ (default: the config file's name).",
        )
        parser.add_class_arguments(ModelCheckpoint, "checkpoint", skip={"dirpath"})
        parser.set_defaults(
            {
                "model.network": {"class_path": "networks.default_network"},
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.save_top_k": -1,
                "checkpoint.save_last": True,
                "checkpoint.filename": "epoch_{epoch:02d}",
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line on top of the settings of the checkpoint that it names."""
        self.config = parser.parse_args(with_checkpoint_settings(args, self.subcommands()))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the model's settings in the checkpoint win over what is
        typed, and leave out those of the data."""

    def before_instantiate_classes(self) -> None:
        """Complete the settings before they are used and saved."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit" and not config.ckpt_path:
            raise MisconfigurationException(
                f"{self.subcommand} needs --ckpt_path: the checkpoint to use"
            )
        config.trainer.default_root_dir = config.trainer.default_root_dir or "runs"
        if not config.name:
            files = [Path(str(file)) for file in config.config or [] if file]
            config.name = files[-1].stem if files else "default"
        if config.ckpt_path and self.subcommand != "predict":
            _refuse_seen(config)
        if config.data.val_size == 0 and str(config.checkpoint.monitor).startswith("val/"):
            config.checkpoint.monitor = None  # there is nothing to choose by
        if config.checkpoint.monitor not in (None, *METRICS):
            raise MisconfigurationException(
                f"checkpoint.monitor is {config.checkpoint.monitor}: choose by {', '.join(METRICS)}"
            )

    def after_instantiate_classes(self) -> None:
        """Have Lightning put the settings of model and data into loggers and checkpoints.

        Here and not in their constructors, which see live objects where a checkpoint needs names.
        """
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        for part, key in ((self.model, "model"), (self.datamodule, "data")):
            # the second is how `load_from_checkpoint` builds objects from their class paths
            by_name = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
            part.save_hyperparameters({**settings[key], **by_name})
        self.is_running = True

    # ----------------------------------------------------------------------------- the trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that writes into the run's folder, with the callbacks of every run."""
        config = self.config_init[self.subcommand]
        options, is_fit = config.trainer, self.subcommand == "fit"
        self.run_folder = self.find_run_folder()
        loggers = _listed(options.logger)
        if is_fit and options.logger is not False:
            loggers.insert(0, TensorBoardLogger(self.run_folder, "", "", default_hp_metric=False))

        callbacks = [*_listed(options.callbacks), History(writes=not options.fast_dev_run)]
        callbacks += self.watching
        if is_fit and not options.fast_dev_run:
            callbacks.append(Board())
        has_bar = options.enable_progress_bar is not False and sys.stdout.isatty()
        if has_bar and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(ImagesBar())
        if options.enable_model_summary is not False:
            callbacks.append(LayerTable())
        saves = is_fit and options.enable_checkpointing is not False and not options.fast_dev_run
        if saves and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(config.checkpoint)
            kept = self.config.fit.checkpoint
            is_by_epoch = not (kept.every_n_train_steps or kept.train_time_interval)
            if kept.save_last is True and is_by_epoch:
                config.checkpoint.save_last = None
                callbacks.append(LastCheckpoint(kept.save_weights_only))
        plugins = _listed(options.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeCheckpointIO())
        try:
            return super().instantiate_trainer(
                default_root_dir=self.run_folder,
                logger=loggers or False,
                callbacks=callbacks,
                plugins=plugins,
                enable_progress_bar=has_bar,
                enable_checkpointing=saves,
                profiler=options.profiler or NoProfiler(),
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"trainer: {error}") from error

    def find_run_folder(self) -> Path:
        """Return the folder of the checkpoint's run, or a new one for what `fit` begins."""
        config = self.config[self.subcommand]
        parent = Path(config.trainer.default_root_dir) / config.name
        is_first_rank = getattr(rank_zero_only, "rank", 0) == 0  # the others are told the folder
        if config.ckpt_path:
            path = Path(config.ckpt_path)
            run = read_checkpoint(path).get("run")
            if self.subcommand != "fit" or (
                run
                and path.parent.name == "checkpoints"
                and (run["name"], run["trainer"]["default_root_dir"])
                == (config.name, config.trainer.default_root_dir)
                and is_newest(path)
            ):
                return run_of(path)
        if is_first_rank and not config.trainer.fast_dev_run:
            self.claimed = claim(parent)
            if config.ckpt_path:
                print(f"goes on from {config.ckpt_path} in {self.claimed}")
        return self.claimed or parent

    # -------------------------------------------------------------------------- the subcommands

    def fit(self, **kwargs: Any) -> None:
        """Train; afterwards write the weights, and say how it went and what can be done next."""
        max_epochs, code = self.config.fit.trainer.max_epochs, commit()
        path, done = kwargs["ckpt_path"], 0
        if path is not None:
            progress = read_checkpoint(path)["loops"]["fit_loop"]["epoch_progress"]
            done = progress["current"]["processed"]  # of one made inside an epoch, those before
        if max_epochs is not None and 0 <= max_epochs < done:
            raise MisconfigurationException(
                f"{path} has done {done} epochs: raise --trainer.max_epochs {max_epochs}"
            )
        was_done = path is not None and done == max_epochs
        if was_done:
            print(f"all {done} epochs are done: to go on, raise --trainer.max_epochs")
        try:
            self.trainer.fit(**kwargs, weights_only=True)  # a checkpoint is data: it runs no code
        except SystemExit as stop:  # by which Lightning ends after Ctrl-C or SIGTERM
            if stop.code not in (None, 1):
                raise
            last = self._last()
            go_on = f"python train.py fit --ckpt_path {shlex.quote(str(last))}"
            if self.trainer.is_global_zero:
                print(f"\nstopped; {f'to go on: {go_on}' if last.exists() else 'nothing is kept'}")
            # of Ctrl-C with a code of 1, of SIGTERM with none
            raise SystemExit(128 + (signal.SIGINT if stop.code else signal.SIGTERM)) from None
        except Diverged as error:
            if not self.trainer.is_global_zero:
                raise SystemExit(1) from None  # one process speaks
            raise Diverged(f"{error}: {self._remedy()}") from None
        if not self.trainer.is_global_zero or self.config.fit.trainer.fast_dev_run:
            return
        weights = io.BytesIO()
        torch.save(self.model.network.state_dict(), weights)
        write_whole(self.run_folder / "model.pth", weights.getvalue())
        history = next(c for c in self.trainer.callbacks if isinstance(c, History))  # type: ignore[attr-defined]
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))["fit"]
        device, best = self.trainer.strategy.root_device, history.best(self.trainer)
        card = model_card(
            self.run_folder, settings, self.model.network, device, history.rows, best, code
        )
        file = self.run_folder / "model.md"
        if not (was_done and file.exists()):
            write_whole(file, card.encode())
        print(f"\n{self._summary()}")

    def _last(self) -> Path:
        return self.run_folder / "checkpoints" / "last.ckpt"

    def _init_args(self, part: str) -> dict[str, Any]:
        """Return the arguments of the optimizer or the scheduler."""
        settings: dict[str, Any] = self.model.hparams.get(part) or {}
        return settings.get("init_args") or {}

    def _remedy(self) -> str:
        """Say what can be done about a run that diverged."""
        files = list((self.run_folder / "checkpoints").glob("*.ckpt"))
        # `last` is written after the epoch's own.
        good = max(files, key=lambda f: f.stat().st_mtime_ns, default=self.config.fit.ckpt_path)
        flag = "--model.optimizer.lr"
        if "max_lr" in self._init_args("lr_scheduler"):  # of OneCycleLR
            flag = "--model.lr_scheduler.max_lr"
        elif "groups" in self._init_args("optimizer"):
            flag = "--model.optimizer.groups.NAME.lr"
        if not good:
            return f"nothing is kept; begin again with a lower {flag}"
        go_on = f"python train.py fit --ckpt_path {shlex.quote(str(good))}"
        epochs = self.config.fit.trainer.max_epochs
        kept = read_checkpoint(good).get("run", {}).get("trainer", {})
        if epochs is not None and kept.get("max_epochs") != epochs:
            go_on += f" --trainer.max_epochs {epochs}"
        return f"{good} is the last good checkpoint; go on at a lower rate: {go_on} {flag} ..."

    def _summary(self) -> str:
        lines = []
        checkpoint = self.trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint):
            last = self._last()
            path = checkpoint.best_model_path or (str(last) if last.exists() else "")
            if path and checkpoint.best_model_score is not None:
                epoch = read_checkpoint(path)["epoch"]
                lines += [
                    f"best  epoch {epoch}, {checkpoint.monitor} {checkpoint.best_model_score:.4f}"
                ]
            if path:
                lines += [f"test  python train.py test --ckpt_path {shlex.quote(path)}"]
        root = self.config[self.subcommand].trainer.default_root_dir
        lines += [
            f"view  tensorboard --logdir {shlex.quote(str(root))}",
            f"run   {self.run_folder}",
        ]
        return "\n".join(lines)

    def validate(self, **kwargs: Any) -> None:
        """Evaluate the checkpoint on the validation set."""
        if not self.config.validate.data.val_size:
            raise MisconfigurationException("there is no validation set: data.val_size is 0")
        self._evaluated(self.trainer.validate(**kwargs, weights_only=True, verbose=False))

    def test(self, **kwargs: Any) -> None:
        """Evaluate the checkpoint on the test set; write results and figures to its run's folder,
        the figures to TensorBoard too."""
        from reports.evaluation import Evaluation  # slow to import

        keeper = PredictionsKeeper()
        self.trainer.callbacks.append(keeper)  # type: ignore[attr-defined]
        results = self._evaluated(self.trainer.test(**kwargs, weights_only=True, verbose=False))
        test, val = keeper.predictions(), None
        if self.config.test.data.val_size:
            self.trainer.validate(**kwargs, weights_only=True, verbose=False)
            val = keeper.predictions()
        if test is None or not test.logits.isfinite().all():
            reason = "the network diverged: it says no numbers" if test else "no image was tested"
            raise MisconfigurationException(f"{kwargs['ckpt_path']}: {reason}")
        if not self.trainer.is_global_zero:
            return
        evaluation = Evaluation(test, val)
        terminal = Console(highlight=False)
        terminal.print(evaluation.summary(), evaluation.table(), sep="\n", soft_wrap=True)
        if len(test.labels) < len(self.datamodule.test_set):
            print(f"of {len(test.labels)} images only: nothing is written")
            return
        file = self.run_folder / "test.json"
        write_whole(file, json.dumps({**results, **evaluation.values()}, indent=2).encode())
        figures = evaluation.figures(self.datamodule.test_set.images)
        for name, figure in figures.items():
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=110)
            write_whole(self.run_folder / f"{name}.png", png.getvalue())
        if any(self.run_folder.glob("events.out.*")):
            step = read_checkpoint(kwargs["ckpt_path"])["global_step"]
            with SummaryWriter(self.run_folder) as board:
                for name, figure in figures.items():
                    board.add_figure(f"test/{name}", figure, step)
        card = self.run_folder / "model.md"
        if card.exists():
            text = with_result(card.read_text(), results["checkpoint"], evaluation.summary())
            write_whole(card, text.encode())
        names = ", ".join(f"{name}.png" for name in figures)
        print(f"written to {file}, {names}")

    def _evaluated(self, metrics: Any) -> dict[str, Any]:
        path = self.config[self.subcommand].ckpt_path
        row = {"epoch": read_checkpoint(path)["epoch"]}
        row |= {name: round(value, 6) for results in metrics for name, value in results.items()}
        if self.trainer.is_global_zero:
            words = (f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
            print(f"epoch {row['epoch']}:", *words)
        return {"checkpoint": Path(path).name, **row}

    def predict(self, **kwargs: Any) -> None:
        """Predict pictures, or the test images; write a line for each to `predictions.csv` in the
        checkpoint's run, and show those of a few pictures.

        Raises:
            SystemExit: Some files are no pictures; the others are done.
        """
        if self.trainer.world_size > 1:
            raise MisconfigurationException("predict takes one device: --trainer.devices 1")
        files = self.datamodule.pictures.files if self.config.predict.data.images else None
        if self.config.predict.trainer.fast_dev_run:
            self.trainer.predict(**kwargs, weights_only=True)
            return
        with PredictionTable(self.run_folder / "predictions.csv", files) as table:
            self.trainer.callbacks.append(table)  # type: ignore[attr-defined]
            self.trainer.predict(**kwargs, weights_only=True, return_predictions=False)
        if table.skipped:
            sys.exit(f"error: {table.skipped} of {len(files or [])} files are no pictures")


def _refuse_seen(config: Any) -> None:
    """Refuse a validation set with images that the checkpoint was trained on."""
    now, before = config.data, read_checkpoint(config.ckpt_path).get("datamodule_hyper_parameters")
    if not now.val_size or not before:
        return
    if now.val_size > before["val_size"] or now.split_seed != before["split_seed"]:
        raise MisconfigurationException(
            f"{config.ckpt_path} was trained on images of this validation set: keep its "
            f"data.split_seed {before['split_seed']}, and at most its data.val_size "
            f"{before['val_size']}"
        )


def _listed(value: Any) -> list[Any]:
    """Return what the trainer takes as one object, a list, a switch or nothing, as a list."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list) else [value]


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    keep_freed_memory()
    with errors_in_one_line():
        CLI(sys.argv[1:] if args is None else args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # whose threads may else abort the exit


if __name__ == "__main__":
    main()
