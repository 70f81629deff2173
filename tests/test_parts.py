"""Each of Lightning's callbacks, loggers, profilers, strategies and trainer flags works, also on
resume, or says in one line what is wrong."""

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks, loggers, profilers
from lightning.pytorch.strategies import StrategyRegistry

from tests.conftest import BASE, Run
from tests.test_train import RUN_0, rows

LAST = RUN_0 / "checkpoints" / "last.ckpt"
T, CB = "--trainer.", "--trainer.callbacks"


class Sorting(torch.optim.SGD):
    """Sorts its parameters, as custom optimizers may."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(sorted(params, key=lambda p: p.ndim), lr=lr)


class LogsF1(Callback):
    """Logs a custom metric."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("val/f1", float(trainer.current_epoch == 0))


def images(batch: Any) -> int:
    """Return a batch's size, for Lightning's ThroughputMonitor."""
    return len(batch.labels)


def one(name: str, **arguments: object) -> list[str]:
    """Return the flags that add a callback."""
    given = [word for key, value in arguments.items() for word in (f"{CB}.{key}", str(value))]
    return [f"{CB}+={name}", *given]


OFTEN = {  # those that affect a run the most
    "rate finder": one("LearningRateFinder"),
    "own metric": [*one("tests.test_parts.LogsF1"), "--checkpoint.monitor", "val/f1"],
    "plateau": ["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau",
                f"{T}check_val_every_n_epoch", "2"],
}  # fmt: skip

OTHERS = {
    "batch size finder": one("BatchSizeFinder", init_val=40, max_trials=1),
    "early stopping": one("EarlyStopping", monitor="val/loss", patience=10),
    "averaging": one("StochasticWeightAveraging", swa_lrs=0.001, swa_epoch_start=1),
    "moving average": one("EMAWeightAveraging"),
    "timer": one("Timer", duration="01:00:00:00", interval="epoch"),
    "rotation": ["--data.augment+=torchvision.transforms.v2.RandomRotation",
                 "--data.augment.degrees", "15"],
    "own optimizer": ["--model.optimizer", "tests.test_parts.Sorting"],
    "LBFGS": ["--model.optimizer", "LBFGS", "--model.optimizer.max_iter", "2"],
    "pruning": one("ModelPruning", pruning_fn="l1_unstructured", amount=0.1,
                   use_global_unstructured="false"),
    "accumulation": one("GradientAccumulationScheduler", scheduling="{0: 2}"),
    "rates": one("LearningRateMonitor"),
    "devices": one("DeviceStatsMonitor"),
    "spikes": one("SpikeDetection"),
    "throughput": [*one("ThroughputMonitor", batch_size_fn="tests.test_parts.images"),
                   f"{T}log_every_n_steps", "2"],
    "on an exception": one("OnExceptionCheckpoint", dirpath="broken"),
    "own checkpoint": one("ModelCheckpoint", monitor="val/loss", save_last="true"),
    "rich bar": one("RichProgressBar"),
    "bar": one("TQDMProgressBar"),
    "summary": one("ModelSummary"),
    "rich summary": one("RichModelSummary"),
    "average of weights": one("WeightAveraging"),
    "lambda": one("LambdaCallback"),
    "writer": one("BasePredictionWriter", write_interval="epoch"),
    "SimpleProfiler": [f"{T}profiler", "simple"],
    "AdvancedProfiler": [f"{T}profiler", "advanced"],
    "PyTorchProfiler": [f"{T}profiler", "pytorch"],
    "PassThroughProfiler": [f"{T}profiler", "PassThroughProfiler"],
    "CSVLogger": [f"{T}logger", "CSVLogger", f"{T}logger.save_dir", "csv"],
    "TensorBoardLogger": [f"{T}logger", "TensorBoardLogger", f"{T}logger.save_dir", "board"],
    "WandbLogger": [f"{T}logger", "WandbLogger", f"{T}logger.offline", "true"],
    "MLFlowLogger": [f"{T}logger", "MLFlowLogger", f"{T}logger.tracking_uri",
                     "sqlite:///mlflow.db"],
    "no logger": [f"{T}logger", "false"],
    "ddp": [f"{T}strategy", "ddp", f"{T}devices", "1"],
    "single device": [f"{T}strategy", "single_device"],
    "devices, nodes": [f"{T}accelerator", "auto", f"{T}devices", "1", f"{T}num_nodes", "1"],
    "precision": [f"{T}precision", "bf16-mixed"],
    "limits": [f"{T}limit_train_batches", "0.5", f"{T}limit_val_batches", "1"],
    "overfit": [f"{T}overfit_batches", "2"],
    "epochs": [f"{T}min_epochs", "1", f"{T}min_steps", "1"],
    "time": [f"{T}max_time", "01:00:00:00"],
    "often": [f"{T}val_check_interval", "0.5", f"{T}log_every_n_steps", "1"],
    "sanity": [f"{T}num_sanity_val_steps", "1"],
    "quiet": [f"{T}enable_progress_bar", "false", f"{T}enable_model_summary", "false"],
    "accumulate": [f"{T}accumulate_grad_batches", "2"],
    "clip": [f"{T}gradient_clip_val", "1", f"{T}gradient_clip_algorithm", "value"],
    "determinism": [f"{T}deterministic", "true", f"{T}benchmark", "true"],
    "inference": [f"{T}inference_mode", "false", f"{T}use_distributed_sampler", "false"],
    "anomaly": [f"{T}detect_anomaly", "true"],
    "plugins": [f"{T}plugins", "AsyncCheckpointIO"],
    "batch norm": [f"{T}sync_batchnorm", "true"],
    "reload": [f"{T}reload_dataloaders_every_n_epochs", "1"],
    "root": [f"{T}default_root_dir", "runs"],
    "autolog": [f"{T}enable_autolog_hparams", "false"],
}  # fmt: skip

REFUSED = {
    "BackboneFinetuning": (one("BackboneFinetuning"), "needs a module with a `backbone`"),
    "CometLogger": ([f"{T}logger", "CometLogger"], "pip install -U 'comet"),
    "LitLogger": ([f"{T}logger", "lightning.pytorch.loggers.LitLogger"],
                  "does not correspond to a subclass of Logger"),  # LightningCLI refuses it too
    "XLAProfiler": ([f"{T}profiler", "XLAProfiler"], "torch_xla"),
    "Timer": (one("Timer", duration="01:00:00:00"), "set its interval to epoch"),
    "ddp_fork": ([f"{T}strategy", "ddp_fork"], "use ddp"),
    "ddp_notebook": ([f"{T}strategy", "ddp_notebook"], "use ddp"),
    "ddp_spawn": ([f"{T}strategy", "ddp_spawn", f"{T}devices", "2"], "use ddp"),
    "fsdp": ([f"{T}strategy", "fsdp"], "requires a GPU"),
    "deepspeed": ([f"{T}strategy", "deepspeed"], "pip install -U deepspeed"),
    "gpu": ([f"{T}accelerator", "gpu"], "gpu"),
    "no batches": ([f"{T}limit_train_batches", "0"], "trains nothing"),
    "too long": ([f"{T}val_check_interval", "1000"], "check_val_every_n_epoch null"),
    "average, weights alone": (
        [*one("EMAWeightAveraging"), "--checkpoint.save_weights_only", "true"],
        "weights without their average",
    ),
    "LBFGS, accumulated": (
        [f"{T}accumulate_grad_batches", "2", "--model.optimizer", "LBFGS"],
        "would add up all of these gradients",
    ),
    "two who size": ([*one("BatchSizeFinder"), "--model.lr_scheduler", "OneCycleLR",
                      "--model.lr_scheduler.max_lr", "0.1"], "remove LearningRateFinder"),
}  # fmt: skip

ABSTRACT = {"BaseFinetuning", "Callback", "Checkpoint", "ProgressBar", "Logger", "Profiler"}
ELSEWHERE = {"max_epochs", "max_steps", "fast_dev_run", "enable_checkpointing", "barebones",
             "limit_test_batches", "limit_predict_batches",
             "model_registry"}  # fmt: skip  # the last one needs an account


def resumes(run: Run, flags: list[str]) -> None:
    """Train with flags, resume, and repeat from the run's config.yaml."""
    more = any("StochasticWeightAveraging" in word for word in flags)  # one more for batch norm
    run("fit", "--config", BASE, *flags)
    assert len(rows(RUN_0)) == 2 + more
    if f"{CB}+=SpikeDetection" not in flags:  # in Lightning 2.6, it fails to load its own state
        run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "4")
        assert len(rows(RUN_0)) == 4 + more
    run("fit", "--config", RUN_0 / "config.yaml", "--trainer.max_epochs", "1")


@pytest.mark.parametrize("part", OFTEN)
def test_a_part_runs_and_resumes(run: Run, part: str) -> None:
    resumes(run, OFTEN[part])


@pytest.mark.slow
@pytest.mark.parametrize("part", OTHERS)
def test_a_rarer_part_runs_and_resumes(run: Run, part: str) -> None:
    resumes(run, OTHERS[part])


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_that_does_not_work_says_why(fails: Run, part: str) -> None:
    flags, message = REFUSED[part]
    assert message in fails("fit", "--config", BASE, *flags)


def test_no_part_is_left_out() -> None:
    tables = (OFTEN, OTHERS, {key: flags for key, (flags, _) in REFUSED.items()})
    words = " ".join(word for table in tables for flags in table.values() for word in flags)
    words += " ".join(key for table in tables for key in table)
    names = {*callbacks.__all__, *loggers.__all__, *profilers.__all__} - ABSTRACT
    flags = {*inspect.signature(Trainer.__init__).parameters} - {"self"} - ELSEWHERE
    assert [name for name in sorted(names) if name not in words] == []
    assert [flag for flag in sorted(flags) if f"{T}{flag}" not in words] == []
    kinds = {name.partition("_find")[0] for name in StrategyRegistry.available_strategies()}
    kinds -= {name for name in kinds if re.search("xla|tpu|deepspeed_|fsdp_", name)}
    assert [kind for kind in sorted(kinds) if kind not in words] == []


def test_a_run_that_max_steps_cuts_short_says_so(run: Run, printed: list[str]) -> None:
    run("fit", "--config", BASE, f"{T}max_steps", "20")
    assert "the last one stopped after 4 of its batches" in (RUN_0 / "model.md").read_text()
    printed.clear()
    run("fit", "--ckpt_path", LAST, f"{T}max_steps", "32")
    assert "epoch 1 stopped before its last batch" in printed[0]


def test_a_bare_trainer_trains(run: Run) -> None:
    out = run("fit", "--config", BASE, "--trainer.barebones", "true")
    assert len(rows(RUN_0)) == 2
    assert "best" not in out
    assert not LAST.exists()


def test_what_callbacks_and_profilers_say_is_shown(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    lightning = logging.getLogger("lightning.pytorch")
    lightning.addHandler(caplog.handler)
    try:
        stops = one("EarlyStopping", monitor="val/acc", mode="max", patience=1, min_delta=1)
        run("fit", "--config", BASE, *stops, f"{CB}.verbose", "true", f"{T}profiler", "simple")
    finally:
        lightning.removeHandler(caplog.handler)
    assert len(rows(RUN_0)) == 2
    assert "val/acc did not improve in the last 1 records" in caplog.text
    assert "stopped early: Monitored metric val/acc" in (RUN_0 / "model.md").read_text()
    assert "run_training_batch" in caplog.text
    run("fit", "--ckpt_path", LAST, f"{T}max_epochs", "3", f"{CB}.min_delta", "-1")
    assert len(rows(RUN_0)) == 3
    assert "stopped early" not in (RUN_0 / "model.md").read_text()


def test_a_run_out_of_time_ends_with_an_epoch(run: Run) -> None:
    many = (f"{T}max_time", "00:00:00:01", f"{T}max_epochs", "100000")
    out = run("fit", "--config", BASE, *many, "--data.batch_size", "2")
    assert "stopped at the time limit" in out
    assert torch.load(LAST, weights_only=True)["global_step"] % 400 == 0
    assert "the last one stopped" not in (RUN_0 / "model.md").read_text()


def test_a_scheduler_waits_for_validation_only_where_it_follows_it(run: Run) -> None:
    rates = list[float]()
    for monitor in ("train/loss", "val/loss"):
        falls = ("--model.lr_scheduler.patience", "0", "--model.lr_scheduler.threshold", "1e9")
        run("fit", "--config", BASE, f"{T}check_val_every_n_epoch", "2", f"{T}max_epochs", "4",
            "--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau",
            "--model.lr_scheduler.monitor", monitor, *falls)  # fmt: skip
        last = Path("runs/base", f"version_{len(rates)}", "checkpoints", "last.ckpt")
        groups = torch.load(last, weights_only=True)["optimizer_states"][0]["param_groups"]
        rates.append(groups[0]["lr"])
    assert rates == pytest.approx([0.002 * 0.1**3, 0.002 * 0.1])
