"""Whatever chooses an epoch, a learning rate, a seed or a file chooses what it claims."""

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

import train
from cifar10 import archive
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from runs import EpochCheckpoint, chosen, file_version
from tests.conftest import BASE, QUIET, Run
from tests.small import Flat
from tests.test_train import RUN_0, rows

LAST = RUN_0 / "checkpoints/last.ckpt"
CALLBACK = "--trainer.callbacks"
FLAT = ("fit", "--config", BASE, "--model.network", "tests.small.Flat")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([f"{CALLBACK}+=EarlyStopping", f"{CALLBACK}.monitor", "test/acc"], "choose on the test"),
        ([f"{CALLBACK}+=EarlyStopping", f"{CALLBACK}.monitor", "val/acc"], "mode min would choose"),
        ([f"{CALLBACK}+=ModelCheckpoint", f"{CALLBACK}.monitor", "val/loss",
          f"{CALLBACK}.mode", "max"], "callbacks.0.init_args.mode max would choose the worst"),
        (["--checkpoint.monitor", "val/loss", "--checkpoint.mode", "max"], "checkpoint.mode max"),
        (["--checkpoint.monitor", "test/loss"], "checkpoint.monitor test/loss"),
        (["--model.lr_scheduler", "ReduceLROnPlateau",
          "--model.lr_scheduler.monitor", "val/acc"], "set it to max"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau",
          "--model.lr_scheduler.mode", "max"], "mode max treats the worst val/loss as the best"),
    ],
)  # fmt: skip
def test_nothing_chooses_by_the_test_set_or_the_worst(
    fails: Run, flags: list[str], message: str
) -> None:
    assert message in fails(*FLAT, *flags)
    assert not Path("runs").exists()


def test_early_stopping_by_accuracy_stops_when_it_falls(run: Run) -> None:
    run(*FLAT, "--trainer.max_epochs", "3", f"{CALLBACK}+=EarlyStopping",
        f"{CALLBACK}.monitor", "val/acc", f"{CALLBACK}.mode", "max", f"{CALLBACK}.patience", "1",
        f"{CALLBACK}.min_delta", "1")  # fmt: skip
    assert len(rows(RUN_0)) == 2


def test_an_epoch_without_a_number_is_never_the_best(tmp_path: Path) -> None:
    measured = []
    for i, value in enumerate((0.5, math.nan, 0.9)):
        measured.append({"epoch": i, "step": i, "x/acc": value})
        checkpoint = {"state_dict": {}, "epoch": i, "global_step": i}
        checkpoint["pytorch-lightning_version"] = "2.6.6"
        torch.save(checkpoint, tmp_path / f"epoch_{i:02d}.ckpt")
    best = chosen(measured, EpochCheckpoint("x/acc", dirpath=tmp_path))
    assert best is not None
    assert best[0]["epoch"] == 2


def test_the_newest_checkpoint_of_the_newest_run_is_the_last(run: Run) -> None:
    run(*FLAT, "--trainer.max_epochs", "3")
    run(*FLAT, "--checkpoint.save_last", "false")
    assert "epoch 1:" in run("validate", "--name", "base", "--ckpt_path", "last")
    run("fit", "--name", "base", "--ckpt_path", "last", "--trainer.max_epochs", "3")
    assert len(rows(Path("runs/base/version_1"))) == 3


def test_a_validation_inside_an_epoch_names_its_file(run: Run) -> None:
    out = run(*FLAT, "--trainer.val_check_interval", "0.4")
    path = re.findall(r"test --ckpt_path (\S+)", out)[0]
    step = torch.load(path, weights_only=True)["global_step"]
    epoch = int(re.findall(r"best  epoch (\d+)", out)[0])
    assert step == rows(RUN_0)[epoch]["val/step"] == 16 * epoch + 12


def test_the_validation_at_the_end_of_an_epoch_is_in_its_checkpoint(run: Run) -> None:
    often = ("--trainer.val_check_interval", "0.5", "--trainer.max_epochs", "3")
    falling = ("--checkpoint.monitor", "val/loss", "--model.optimizer.lr", "1e-4")
    out = run(*FLAT, *often, *falling, "--checkpoint.save_last", "false")
    best = re.findall(r"best  epoch (\d+)", out)[0]
    assert best == "2", "so the checkpoint itself must say so"
    assert f"epoch {best}:" in run("validate", "--name", "base", "--ckpt_path", "best")
    unbroken = rows(RUN_0)
    for number, file in enumerate(("epoch_00.ckpt", "epoch_00-v1.ckpt"), 1):
        run("fit", "--ckpt_path", RUN_0 / "checkpoints" / file)
        resumed = rows(Path(f"runs/base/version_{number}"))
        for key in ("epoch", "val/loss", "val/acc"):
            assert [row[key] for row in resumed] == [row[key] for row in unbroken]


def rate(folder: Path, name: str = "last.ckpt") -> float:
    (state,) = torch.load(folder / "checkpoints" / name, weights_only=True)["optimizer_states"]
    return float(state["param_groups"][0]["lr"])


@pytest.mark.parametrize(
    ("schedule", "often"),
    [
        (("LinearDecay",), ("check_val_every_n_epoch", "2")),
        (("OneCycleLR", "max_lr=0.01"), ("val_check_interval", "0.5")),
        (("ExponentialLR", "gamma=0.5"), ("val_check_interval", "0.5")),
        (("ReduceLROnPlateau", "monitor=val/loss", "patience=0", "threshold=1e9"),
         ("val_check_interval", "0.5")),
    ],
)  # fmt: skip
def test_the_schedule_of_a_resumed_run_is_that_of_an_unbroken_one(
    run: Run, schedule: tuple[str, ...], often: tuple[str, str]
) -> None:
    flags = [f"--trainer.{often[0]}", often[1], "--trainer.max_epochs", "4"]
    flags += ["--model.lr_scheduler", schedule[0]]
    flags += [f"--model.lr_scheduler.{argument}" for argument in schedule[1:]]
    run(*FLAT, *flags)
    saved = sorted((RUN_0 / "checkpoints").glob("epoch_0[01]*.ckpt"))
    assert len(saved) == (1 if often[1] == "2" else 4)
    for number, file in enumerate(saved, 1):
        run("fit", "--ckpt_path", file, "--name", "resumed")
        folder = Path(f"runs/resumed/version_{number - 1}")
        assert rate(folder) == rate(RUN_0), file.name
        for key in ("train/loss", "val/loss"):
            assert rows(folder)[-1][key] == rows(RUN_0)[-1][key], file.name


def test_a_longer_run_after_max_steps_has_the_whole_schedule(run: Run) -> None:
    linear = ("--trainer.max_epochs", "4", "--model.lr_scheduler", "LinearDecay")
    run(*FLAT, *linear, "--model.optimizer.lr", "4e-3", "--trainer.max_steps", "22")  # 16 per epoch
    run("fit", "--ckpt_path", LAST, "--trainer.max_steps", "-1")
    assert rate(RUN_0, "epoch_02.ckpt") == pytest.approx(1e-3)
    assert rate(RUN_0) == 0


def test_a_name_with_the_step_has_that_of_the_validation(run: Run) -> None:
    name = ("--checkpoint.filename", "{epoch}-{step:03d}")
    out = run(*FLAT, "--trainer.val_check_interval", "0.75", *name)
    epoch = int(re.findall(r"best  epoch (\d+)", out)[0])
    assert f"checkpoints/{epoch}-{16 * epoch + 12:03d}.ckpt" in out


def test_the_best_is_what_the_run_said(run: Run, fails: Run) -> None:
    own = (f"{CALLBACK}+=ModelCheckpoint", f"{CALLBACK}.monitor", "val/loss")
    out = run(*FLAT, *own)
    epoch = re.findall(r"best  epoch (\d+), val/loss", out)[0]
    assert f"epoch {epoch}:" in run("validate", "--name", "base", "--ckpt_path", "best")
    run(*FLAT, "--checkpoint.monitor", "null")
    assert "has no best epoch" in fails("validate", "--name", "base", "--ckpt_path", "best")


def test_weights_alone_do_not_say_which_epoch_was_best(run: Run, fails: Run) -> None:
    run(*FLAT, "--checkpoint.save_weights_only", "true")
    message = fails("test", "--name", "base", "--ckpt_path", "best")
    assert "does not record the best epoch: give the file's path" in message


def test_epochs_are_compared_on_the_same_images(run: Run, fails: Run) -> None:
    run(*FLAT)
    longer = ("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3")
    assert "keep 200, or use 0" in fails(*longer, "--data.val_size", "10")
    run(*longer, "--data.val_size", "0")
    assert "val/acc" not in rows(RUN_0)[2]


@pytest.mark.parametrize("file", ["checkpoints/last.ckpt", "model.pth"])
def test_a_run_can_start_from_weights(run: Run, fails: Run, printed: list[str], file: str) -> None:
    run(*FLAT, once=True)
    given = str(Path("weights", *(RUN_0 / file).parts[-1:]))
    Path("weights").mkdir()
    Path(given).write_bytes((RUN_0 / file).read_bytes())
    start = (*FLAT, "--model.weights", given, "--name", "fine")
    run(*start, "--model.optimizer.lr", "0")
    fine = Path("runs/fine/version_0")
    weights = [torch.load(of / "model.pth", weights_only=True) for of in (RUN_0, fine)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert [row["epoch"] for row in rows(fine)] == [0, 1]
    assert f"{given}, SHA-256 {file_version(Path(given))}" in (fine / "model.md").read_text()
    again = ("fit", "--ckpt_path", "last", "--name", "fine", "--trainer.max_epochs", "3")
    assert "leave out --ckpt_path" in fails(*again, "--model.weights", RUN_0 / "model.pth")
    tested = ("test", "--ckpt_path", "last", "--name", "fine", "--model.weights", given + "x")
    assert "leave out --ckpt_path" in fails(*tested)
    from_run = (*FLAT, "--model.weights", RUN_0 / file, "--model.normalize", "cifar10")
    run(*from_run, "--trainer.fast_dev_run", "1")
    assert any("trained with model.normalize None, unlike this run" in line for line in printed)
    card = (fine / "model.md").read_text()
    Path(given).unlink()
    run(*again)
    assert len(rows(fine)) == 3
    assert "SHA-256" in card
    lines = (line for line in card.splitlines() if "Weights" in line)
    assert next(lines) in (fine / "model.md").read_text()
    assert "weights" not in (fine / "model.md").read_text().partition("Resumed")[2]
    message = fails(*FLAT, "--model.weights", RUN_0 / file, "--data.split_seed", "1")
    assert "was trained on images of this validation set" in message
    torch.save([1.0], "list.pth")
    assert "list.pth contains no network weights" in fails(*FLAT, "--model.weights", "list.pth")
    assert "no checkpoint nowhere.pth" in fails(*FLAT, "--model.weights", "nowhere.pth")
    one = torch.load(RUN_0 / "model.pth", weights_only=True)
    torch.save(one | {"1.weight": torch.zeros(1000, 3072)}, "thousand.pth")
    run(*FLAT, "--model.weights", "thousand.pth", "--trainer.max_epochs", "1")
    for told in (
        "not loaded because the shapes differ: 1.weight",
        "thousand.pth does not record its training images",
    ):
        assert any(told in line for line in printed)
    other = ("--model.network", "ConvNet", "--model.weights", RUN_0 / "model.pth")
    assert "does not fit the configured network" in fails("fit", "--config", BASE, *other)


def test_weights_of_other_images_are_not_validated_on_them(
    run: Run, fails: Run, arrays: Path, tmp_path: Path
) -> None:
    run(*FLAT, once=True)
    shutil.copytree(arrays, tmp_path / "mine")
    labels = tmp_path / "mine" / archive.FOLDER / "train_labels.npy"
    np.save(labels, np.load(labels)[::-1])
    other = (*FLAT, "--data.root", tmp_path / "mine", "--name", "other")
    for file in ("model.pth", "checkpoints/last.ckpt"):
        message = fails(*other, "--model.weights", RUN_0 / file)
        assert "was trained on other images" in message
    run(*other, "--model.weights", RUN_0 / "model.pth", "--data.val_size", "0")


def test_an_early_version_that_names_no_images_had_the_verified_ones(run: Run, fails: Run) -> None:
    run(*FLAT, once=True)
    early = torch.load(LAST, weights_only=True)
    early["datamodule_hyper_parameters"]["verify"] = True
    del early["run"]["images"]
    torch.save(early, LAST.parent / "early.ckpt")
    resumed = ("fit", "--ckpt_path", LAST.parent / "early.ckpt", "--trainer.max_epochs", "3")
    message = fails(*resumed, "--data.verify", "false")
    assert "early.ckpt was trained on other images (CIFAR-10)" in message


def test_a_model_that_began_with_weights_keeps_what_it_learnt(arrays: Path, run: Run) -> None:
    run(*FLAT, once=True)
    model = ImageClassifier(
        Flat(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        weights=str(RUN_0 / "model.pth"),
    )
    given = torch.load(RUN_0 / "model.pth", weights_only=True)["1.weight"]
    assert torch.equal(model.network[1].weight, given)  # type: ignore[index]
    with torch.no_grad():
        model.network[1].weight += 1.0  # type: ignore[index]
    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    Trainer(max_epochs=1, **QUIET).fit(model, data)
    assert torch.equal(model.network[1].weight, given + 1.0)  # type: ignore[index]


def test_a_seed_is_drawn(run: Run) -> None:
    seeds = set()
    for version in range(2):
        run(*FLAT, "--seed_everything", "true", "--trainer.max_epochs", "1")
        folder = Path(f"runs/base/version_{version}")
        seeds.add(yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"])
        assert f"**Seed**: {max(seeds - {0})}" in (folder / "model.md").read_text() or version
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("name", "avx512", "amx", "is_slow"),
    [
        ("AMD EPYC", False, False, True),
        ("AMD EPYC", True, False, False),
        ("Intel Xeon", True, False, True),
        ("Intel Xeon", True, True, False),
    ],
)
def test_a_processor_that_is_slow_in_bfloat16_is_told_of(
    run: Run, printed: list[str], monkeypatch: pytest.MonkeyPatch, name: str, avx512: bool,
    amx: bool, is_slow: bool,
) -> None:  # fmt: skip
    can = {"cpu_name": name, "avx512_bf16": avx512, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    for precision in ("bf16-mixed", "32-true"):
        run(*FLAT, "--trainer.fast_dev_run", "true", "--trainer.precision", precision)
    note = "note: trainer.precision bf16-mixed is slow on this processor"
    assert sum(line.startswith(note) for line in printed) == is_slow


def test_what_a_setting_leaves_out_is_told(run: Run, printed: list[str]) -> None:
    run(*FLAT, f"{CALLBACK}+=ModelCheckpoint", "--checkpoint.save_top_k", "1")
    assert "note: the ModelCheckpoint in trainer.callbacks replaces checkpoint.*" in printed
    run(*FLAT, "--trainer.max_epochs", "1")
    last = "runs/base/version_1/checkpoints/last.ckpt"
    finder = f"{CALLBACK}+=LearningRateFinder"
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "2", finder)
    assert (
        "note: a resumed run keeps its learning rate and batch size: LearningRateFinder is skipped"
        in printed
    )


def test_other_code_is_told_in_the_card(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(*FLAT)
    code = json.loads((RUN_0 / "run.json").read_text())["code"]
    assert {"train", "networks.convnet", "tests.small"} <= code.keys(), "ours and the user's"
    assert not {"torch", "os"} & code.keys()
    changed = {**code, "tests.small": "other"}
    monkeypatch.setattr("callbacks.settings.code_version", lambda: changed)
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3")
    assert re.search(
        r"from epoch 2 with .*tests.small code other \(was \w+\)", (RUN_0 / "model.md").read_text()
    )


def test_a_part_of_the_images_is_said_to_be_one(run: Run) -> None:
    run(*FLAT, "--trainer.max_epochs", "1")
    assert "only" not in run("predict", "--ckpt_path", LAST)
    assert "only" not in run("predict", "--ckpt_path", LAST, "--trainer.fast_dev_run", "true")
    run(*FLAT, "--trainer.max_epochs", "1", "--data.augment", "[]")
    out = run("predict", "--ckpt_path", LAST, "--trainer.limit_predict_batches", "0")
    assert "only the first 0 of 200" in out


# ------------------------------------------------------------------ learning rates and schedules


class Rates(Callback):
    """Records the learning rate of every step."""

    kept: list[float]

    def on_train_start(self, *_args: Any) -> None:
        Rates.kept = []

    def on_train_batch_start(self, trainer: Trainer, *_args: Any) -> None:
        Rates.kept.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_schedule_starts_at_the_rate_that_was_found(run: Run) -> None:
    finder = ("--trainer.callbacks+=LearningRateFinder", f"{CALLBACK}+=tests.test_choices.Rates")
    out = run(*FLAT, *finder, "--model.lr_scheduler", "LinearDecay")
    found = float(re.findall(r"LearningRateFinder: learning rate (\S+)", out)[0])
    expected = [found * (1 - step / 32) for step in range(32)]
    assert Rates.kept == pytest.approx(expected, rel=1e-2)
    card = (RUN_0 / "model.md").read_text()
    assert re.search(rf"learning rate {found:.3g} found by LearningRateFinder", card)
    run("fit", "--ckpt_path", RUN_0 / "checkpoints/epoch_00.ckpt")
    assert Rates.kept == pytest.approx(expected[16:], rel=1e-2)
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3", "--model.optimizer.lr", "1e-6")
    assert Rates.kept[0] == pytest.approx(1e-6 / 3)
    assert "found by" not in (RUN_0 / "model.md").read_text()


def test_a_schedule_is_as_long_as_the_batch_size_found_makes_it(run: Run) -> None:
    run(*FLAT, f"{CALLBACK}+=BatchSizeFinder", f"{CALLBACK}.max_trials", "3",
        f"{CALLBACK}+=tests.test_choices.Rates", "--model.lr_scheduler", "LinearDecay")  # fmt: skip
    assert "8 images, found by BatchSizeFinder" in (RUN_0 / "model.md").read_text()
    steps = int(rows(RUN_0)[-1]["step"])
    assert Rates.kept == pytest.approx([0.002 * (1 - step / steps) for step in range(steps)])


def test_a_requeued_job_keeps_what_it_drew_and_found(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    command = (*FLAT, "--seed_everything", "true", f"{CALLBACK}+=BatchSizeFinder",
               f"{CALLBACK}.max_trials", "3")  # fmt: skip
    run(*command)
    unbroken = torch.load(LAST, weights_only=True)
    shutil.copy(LAST.with_name("epoch_00.ckpt"), LAST)  # as if killed after epoch 0
    for file in ("checkpoints/epoch_01.ckpt", "model.md", "model.pth"):
        (RUN_0 / file).unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run(*command)
    resumed = torch.load(LAST, weights_only=True)
    assert resumed["run"]["seed_everything"] == unbroken["run"]["seed_everything"]
    assert resumed["datamodule_hyper_parameters"]["batch_size"] == 8
    for name, weight in unbroken["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name])
    assert "(was" not in (RUN_0 / "model.md").read_text()


def test_parts_that_contradict_a_schedule_are_refused(run: Run, fails: Run) -> None:
    varying = (f"{CALLBACK}+=GradientAccumulationScheduler", f"{CALLBACK}.scheduling", "{1: 2}")
    assert "GradientAccumulationScheduler" in fails(
        *FLAT, *varying, "--model.lr_scheduler", "LinearDecay"
    )
    run(*FLAT, *varying, "--model.lr_scheduler", "ExponentialLR",
        "--model.lr_scheduler.gamma", "0.5")  # fmt: skip
    assert len(rows(RUN_0)) == 2
    run(*FLAT, *varying, "--trainer.max_epochs", "3", "--model.lr_scheduler", "ExponentialLR",
        "--model.lr_scheduler.gamma", "0.9", "--model.lr_interval", "step",
        f"{CALLBACK}+=tests.test_choices.Rates")  # fmt: skip
    unbroken = Rates.kept
    run("fit", "--ckpt_path", "runs/base/version_1/checkpoints/epoch_01.ckpt")
    assert Rates.kept == unbroken[32:]
    one_cycle = ("--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.01")
    assert "OneCycleLR sets its own learning rates" in fails(
        *FLAT, f"{CALLBACK}+=LearningRateFinder", *one_cycle
    )


class Counts(Callback):
    """Records how many images the training metrics have counted."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics: Any = pl_module.train_metrics
        self.counted.append(int(metrics.images))


def test_an_optimizer_that_evaluates_a_batch_often_counts_it_once(arrays: Path) -> None:
    model = ImageClassifier(Flat(), lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3))
    data = CIFAR10DataModule(str(arrays), verify=False, batch_size=200, val_size=200)
    trainer = Trainer(max_epochs=1, callbacks=[counts := Counts()], **QUIET)
    trainer.fit(model, data)
    assert counts.counted == [200, 400, 600, 0], "the last batch ends the epoch"
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_a_model_trained_in_python_keeps_its_arguments(
    arrays: Path, tmp_path: Path, fails: Run
) -> None:
    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(ImageClassifier(Flat(), normalize="cifar10", tta="mirror"), data)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    network = Flat()
    model = ImageClassifier.load_from_checkpoint(tmp_path / "own.ckpt", network=network).eval()
    assert model.is_normalizing
    assert model.tta == "mirror"
    images = archive.load(arrays, verify=False).test_images[:8] / 255
    mean, std = model.mean, model.std
    torch.testing.assert_close(model(images), nn.Sequential(*network)((images - mean) / std))
    assert "was saved from Python" in fails("fit", "--ckpt_path", tmp_path / "own.ckpt")


def test_a_disk_that_fills_up_under_tensorboard_is_one_line(
    fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_settings: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out.tfevents")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    assert "events.out.tfevents': free some space" in fails(*FLAT)


def test_without_a_subcommand_there_is_nothing_to_do() -> None:
    for words, start in (
        ([], "name the subcommand first, "),
        (["train"], "subcommand train: use "),
    ):
        with pytest.raises(SystemExit, match=f"{start}one of fit, validate, test, predict$"):
            train.main(words)


def test_predictions_stay_if_nothing_can_be_read(run: Run, tmp_path: Path) -> None:
    run(*FLAT, "--trainer.max_epochs", "1", once=True)
    run("predict", "--ckpt_path", LAST)
    before = (RUN_0 / "predictions.csv").read_text()
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(SystemExit, match="1 of 1 files could not be read"):
        run("predict", "--ckpt_path", LAST, "--data.images", tmp_path / "notes.txt")
    assert (RUN_0 / "predictions.csv").read_text() == before
