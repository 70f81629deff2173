"""The command line: runs, checkpoints and wrong input."""

import csv
import errno
import fcntl
import json
import os
import pickle
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch._inductor import config as inductor_config

import train
from cifar10 import archive
from lightning_module import ImageClassifier
from networks import ConvNet
from tests.conftest import BASE, Run, on
from tests.small import Flat

ROOT = Path(__file__).parents[1]
RUN_0 = Path("runs/base/version_0")
CONVNET = ("--model.network", "ConvNet")  # as in base.yaml


def rows(run_folder: Path) -> list[dict[str, float]]:
    with (run_folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def is_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("recipe", "dense_units", "softmax_before_loss"), [("base", 84, False), ("report", 80, True)]
)
def test_recipes_say_what_the_report_says(
    capsys: pytest.CaptureFixture[str], recipe: str, dense_units: int, softmax_before_loss: bool
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--config", str(ROOT / "configs" / f"{recipe}.yaml"), "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert not stopped.value.code
    network = {"dense_units": dense_units, "width": 1, "dropout": 0.0, "num_classes": 10}
    assert settings["model"]["network"]["init_args"] == network
    assert settings["model"]["softmax_before_loss"] == softmax_before_loss
    assert settings["model"]["optimizer"]["class_path"] == "torch.optim.Adam"
    assert settings["model"]["optimizer"]["init_args"]["lr"] == 0.0005
    assert settings["data"]["batch_size"] == 128
    assert settings["data"]["val_size"] == 10_000
    assert settings["trainer"]["max_epochs"] == 30
    assert settings["checkpoint"]["save_top_k"] == -1
    assert settings["checkpoint"]["monitor"] == "val/acc"


class Wide(Flat):
    """A network that shares the name of an argument with ConvNet."""

    def __init__(self, dense_units: int = 3) -> None:
        super().__init__()


def test_a_network_of_ones_own_has_its_own_defaults(run: Run) -> None:
    run("fit", "--model.network", "tests.test_train.Wide", "--trainer.max_epochs", "1")
    settings = yaml.safe_load(Path("runs/default/version_0/config.yaml").read_text())
    assert settings["model"]["network"]["init_args"] == {"dense_units": 3}
    run("fit", "--trainer.max_epochs", "1")
    settings = yaml.safe_load(Path("runs/default/version_1/config.yaml").read_text())
    assert settings["model"]["network"]["class_path"] == "networks.default_network"


# ---------------------------------------------------------------------------------------- runs


def test_fit_leaves_a_whole_run_and_says_how_to_go_on(run: Run) -> None:
    out = run("fit", "--config", BASE, *CONVNET, "--trainer.max_epochs", "3")
    assert sorted(p.name for p in RUN_0.iterdir() if not p.name.startswith("events")) == [
        "checkpoints", "config.yaml", "curves.png", "hparams.yaml", "metrics.csv", "model.md",
        "model.pth", "run.json",
    ]  # fmt: skip
    names = sorted(p.name for p in (RUN_0 / "checkpoints").iterdir())
    assert names == ["epoch_00.ckpt", "epoch_01.ckpt", "epoch_02.ckpt", "last.ckpt"]
    assert [row["epoch"] for row in rows(RUN_0)] == [0, 1, 2]
    best = max(rows(RUN_0), key=lambda row: row["val/acc"])
    assert best["val/acc"] > 0.5, "three epochs learn the small data set"
    assert f"best  epoch {best['epoch']:.0f}, val/acc {best['val/acc']:.4f}" in out
    assert f"test --ckpt_path {RUN_0}/checkpoints/epoch_{best['epoch']:02.0f}.ckpt" in out
    assert "tensorboard --logdir runs" in out
    assert "[128, 6, 16, 16]" in out
    assert "78,658" in out


def test_model_pth_needs_nothing_but_pytorch(run: Run) -> None:
    run("fit", "--config", BASE, *CONVNET, once=True)
    state = torch.load(RUN_0 / "model.pth", weights_only=True)
    network = ConvNet()
    network.load_state_dict(state)
    last = weights(RUN_0 / "checkpoints" / "epoch_01.ckpt")
    assert is_same({f"network.{name}": tensor for name, tensor in state.items()}, last)


def test_tensorboard_has_train_and_validation_on_one_chart(run: Run) -> None:
    run("fit", "--config", BASE, once=True)
    events = EventAccumulator(str(RUN_0)).Reload()
    for name in ("loss", "acc"):
        for stage in ("train", "val"):
            values = [round(event.value, 6) for event in events.Scalars(f"{stage}/{name}")]
            assert values == [row[f"{stage}/{name}"] for row in rows(RUN_0)]
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(content).category[0].chart
    assert [chart.title for chart in charts] == ["loss", "accuracy"]
    assert list(charts[0].multiline.tag)[:2] == ["^train/loss$", "^val/loss$"]
    assert list(charts[1].multiline.tag)[:2] == ["^train/acc$", "^val/acc$"]


def test_same_command_same_weights_and_another_seed_others(run: Run) -> None:
    for seed in (0, 0, 1):
        run("fit", "--config", BASE, *CONVNET, "--seed_everything", seed)
    first, second, third = (
        weights(Path(f"runs/base/version_{i}/checkpoints/last.ckpt")) for i in range(3)
    )
    assert is_same(first, second)
    assert not is_same(first, third)


def test_test_set_chooses_nothing(run: Run) -> None:
    run("fit", "--config", BASE, once=True)
    run("fit", "--config", BASE, "--data.test_curve", "true")
    without, with_test = (Path(f"runs/base/version_{i}") for i in range(2))
    assert is_same(*(weights(folder / "checkpoints/last.ckpt") for folder in (without, with_test)))
    assert "test/acc" not in rows(without)[0]
    assert [row["val/acc"] for row in rows(without)] == [row["val/acc"] for row in rows(with_test)]


def test_without_validation_images_every_epoch_is_kept(run: Run) -> None:
    out = run("fit", "--config", BASE, "--data.val_size", "0", "--data.test_curve", "true")
    assert (RUN_0 / "checkpoints" / "epoch_01.ckpt").exists()
    assert "best" not in out
    assert set(rows(RUN_0)[0]) == {
        "epoch", "step", "train/loss", "train/acc", "test/loss", "test/acc", "seconds",
        "images_per_second",
    }  # fmt: skip


def test_history_has_only_what_was_measured(run: Run) -> None:
    run(
        "fit",
        "--config",
        BASE,
        "--trainer.check_val_every_n_epoch",
        "2",
        "--trainer.max_epochs",
        "3",
    )
    with (RUN_0 / "metrics.csv").open() as file:
        assert [bool(row["val/loss"]) for row in csv.DictReader(file)] == [False, True, False]
    run("fit", "--config", BASE, "--trainer.max_steps", "20", "--trainer.max_epochs", "-1")
    assert [row["epoch"] for row in rows(Path("runs/base/version_1"))] == [0]


def test_the_chosen_epoch_is_the_one_that_is_said_to_be(run: Run) -> None:
    choose = ["--checkpoint.monitor", "val/loss"]
    out = run("fit", "--config", BASE, *choose, "--trainer.max_epochs", "3")
    best = min(rows(RUN_0), key=lambda row: row["val/loss"])
    assert f"best  epoch {best['epoch']:.0f}, val/loss {best['val/loss']:.4f}" in out


# -------------------------------------------------------------- a checkpoint is enough to resume


def test_checkpoint_alone_repeats_the_test_curve_exactly(run: Run) -> None:
    changed = ["--data.split_seed", "5", "--data.val_size", "300", "--data.batch_size", "40"]
    network = ["--model.network.dense_units", "33", "--model.softmax_before_loss", "true"]
    run("fit", "--config", BASE, *changed, *network, "--data.test_curve", "true")
    for row in rows(RUN_0):
        checkpoint = f"epoch_{row['epoch']:02.0f}.ckpt"
        run("test", "--ckpt_path", RUN_0 / "checkpoints" / checkpoint)
        result = json.loads((RUN_0 / "test.json").read_text())
        assert result["checkpoint"] == checkpoint
        assert result["test/acc"] == row["test/acc"]
        assert result["test/loss"] == row["test/loss"]
        out = run("validate", "--ckpt_path", RUN_0 / "checkpoints" / checkpoint)
        assert f"val/acc {row['val/acc']:.4f}" in out
    assert [p.name for p in Path("runs/base").iterdir()] == ["version_0"]


def test_what_is_typed_wins_over_the_checkpoint(run: Run, fails: Run, tmp_path: Path) -> None:
    run("fit", "--config", BASE, *CONVNET, once=True)
    last = RUN_0 / "checkpoints" / "last.ckpt"
    first = run("validate", "--ckpt_path", last)
    assert first == run("validate", "--ckpt_path", last)
    assert first != run("validate", "--ckpt_path", last, "--data.val_size", "100")
    config = tmp_path / "other.yaml"
    config.write_text("data:\n  val_size: 100\n")
    assert first != run("validate", "--config", config, "--ckpt_path", last)
    assert "does not fit the configured network" in fails(
        "test", "--ckpt_path", last, "--model.network.dense_units", "80"
    )


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_no_image_is_trained_on_and_then_validated(run: Run, fails: Run, subcommand: str) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    ckpt = ["--ckpt_path", RUN_0 / "checkpoints" / "last.ckpt"]
    for other in (
        ["--data.split_seed", "7"],
        ["--data.val_size", "201"],
        ["--data.stratify", "true"],
        ["--data.folds", "5"],
    ):
        assert "trained on images of this validation set" in fails(subcommand, *ckpt, *other)
    run("fit", *ckpt, "--data.val_size", "0", "--trainer.max_epochs", "2")
    assert "there is no validation set" in fails("validate", *ckpt)


def test_a_fold_is_held_out_and_a_part_of_the_rest_is_trained_on(run: Run) -> None:
    flags = ("--data.folds", "4", "--data.fold", "3", "--data.train_size", "100")
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", *flags, "--data.stratify", "true")
    card = (RUN_0 / "model.md").read_text()
    assert "250 of the training images held out for validation, as fold 3 of 4" in card
    assert "stratified; 100 of the others trained" in card
    last = RUN_0 / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2, "of 50 images each"
    run("validate", "--ckpt_path", last)
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "2")
    assert len(rows(RUN_0)) == 2


def test_later_words_override_earlier_ones(run: Run) -> None:
    run("fit", "--seed_everything", "5", "--config", BASE)
    assert yaml.safe_load((RUN_0 / "config.yaml").read_text())["seed_everything"] == 0
    run("fit", "--config", BASE, "--seed_everything", "5")
    assert (
        yaml.safe_load(Path("runs/base/version_1/config.yaml").read_text())["seed_everything"] == 5
    )


@pytest.mark.parametrize(
    "thin", [["every_n_epochs", "3"], ["save_top_k", "1"], ["save_top_k", "0"]]
)
def test_the_last_epoch_is_kept_however_few_others_are(run: Run, thin: list[str]) -> None:
    flag, value = thin
    slow = ["--model.optimizer.lr", "0"]  # so that no epoch is better than the first
    out = run(
        "fit", "--config", BASE, *slow, "--trainer.max_epochs", "2", f"--checkpoint.{flag}", value
    )
    last = RUN_0 / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert f"{RUN_0}/checkpoints/" in out
    assert "2 of 2 epochs are done" in run("fit", "--ckpt_path", last)


def test_checkpoint_builds_the_model_in_python_too(run: Run) -> None:
    run("fit", "--config", BASE, "--model.network.dense_units", "33")
    path = RUN_0 / "checkpoints" / "last.ckpt"
    model = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert is_same(model.state_dict(), weights(path))


class Noise(torch.nn.Module):
    """Draws random numbers, as augmentations and dropout do."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + 0.1 * torch.rand_like(images)


def test_a_stopped_run_goes_on_exactly_in_its_own_folder(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "noisy.yaml"
    scheduler = {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    augment = [{"class_path": "tests.test_train.Noise"}]
    config.write_text(
        yaml.safe_dump({"model": {"lr_scheduler": scheduler}, "data": {"augment": augment}})
    )
    run("fit", "--config", config, "--trainer.max_epochs", "4", "--name", "whole")
    run("fit", "--config", config, "--trainer.max_epochs", "2", "--name", "stopped")
    stopped = Path("runs/stopped/version_0")
    half_written = stopped / "checkpoints/.epoch_02.ckpt.12345"  # as a killed process leaves it
    half_written.write_bytes(b"PK")
    out = run("fit", "--ckpt_path", stopped / "checkpoints/last.ckpt", "--trainer.max_epochs", "4")
    whole = Path("runs/whole/version_0")
    assert is_same(*(weights(folder / "checkpoints/last.ckpt") for folder in (whole, stopped)))
    assert not half_written.exists()
    for row in (*(of_stopped := rows(stopped)), *(of_whole := rows(whole))):
        del row["seconds"], row["images_per_second"]
    assert of_stopped == of_whole
    assert f"run   {stopped}" in out
    assert [p.name for p in Path("runs/stopped").iterdir()] == ["version_0"]
    best = max(rows(whole), key=lambda row: row["val/acc"])
    assert f"best  epoch {best['epoch']:.0f}, " in out


def test_a_run_goes_on_from_the_middle_of_an_epoch(run: Run) -> None:
    often = ["--checkpoint.every_n_train_steps", "10", "--trainer.max_epochs", "null"]
    run("fit", "--config", BASE, *CONVNET, *often, "--trainer.max_steps", "25")
    last = RUN_0 / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 20, "in the middle"
    run("fit", "--ckpt_path", last, "--trainer.max_steps", "40")
    assert [row["epoch"] for row in rows(RUN_0)] == [0, 1], "the third is not complete"
    run("fit", "--config", BASE, *CONVNET, *often, "--trainer.max_steps", "40", "--name", "whole")
    assert is_same(weights(last), weights(Path("runs/whole/version_0/checkpoints/last.ckpt")))


def test_weights_can_be_of_half_precision(run: Run) -> None:
    out = run("fit", "--config", BASE, *CONVNET, "--trainer.precision", "bf16-true")
    assert "78,658" in out
    assert rows(RUN_0)[1]["val/acc"] > 0.2


class Stop(Callback):
    """Sends this process a signal in the middle of an epoch."""

    def __init__(self, number: int, epoch: int) -> None:
        self.number, self.epoch = number, epoch

    def on_train_batch_end(self, trainer: Trainer, *_args: object) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_stops_a_run_that_can_go_on(
    run: Run, capsys: pytest.CaptureFixture[str], number: signal.Signals, epoch: int
) -> None:
    # Python's own, which is missing if a script runs the tests in the background.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = {
        "class_path": "tests.test_train.Stop",
        "init_args": {"number": number.value, "epoch": epoch},
    }
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", BASE, "--trainer.callbacks", json.dumps([stop]))
    signal.signal(signal.SIGINT, handler)
    assert stopped.value.code == 128 + number
    out = capsys.readouterr().out
    if epoch == 0:
        assert "no checkpoint was saved" in out
        assert not Path("runs").exists()
    else:
        last = RUN_0 / "checkpoints/last.ckpt"
        assert f"to resume: python train.py fit --ckpt_path {last}" in out
        assert torch.load(last, weights_only=True)["epoch"] == 0


@pytest.mark.parametrize(
    ("typed", "expected"),
    [(["--model.optimizer.lr", "0.01"], {"lr": 0.01, "eps": 1e-8}),
     (["--model.optimizer", "SGD", "--model.optimizer.lr", "0.02"], {"lr": 0.02, "momentum": 0})],
)  # fmt: skip
def test_a_typed_optimizer_wins_over_the_checkpoint(
    run: Run, typed: list[str], expected: dict[str, float]
) -> None:
    run("fit", "--config", BASE, once=True)
    last = RUN_0 / "checkpoints/last.ckpt"
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "3", *typed)
    (state,) = torch.load(last, weights_only=True)["optimizer_states"]
    assert expected.items() <= state["param_groups"][0].items()
    assert (
        yaml.safe_load((RUN_0 / "config.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"]
        == expected["lr"]
    )


def test_a_failed_resume_leaves_the_run_as_it_was(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, *CONVNET, once=True)
    before = {p: p.read_bytes() for p in RUN_0.rglob("*") if "events" not in p.name and p.is_file()}
    last = RUN_0 / "checkpoints/last.ckpt"
    options = ["--trainer.max_epochs", "3", "--model.network.dense_units", "7"]
    assert "does not fit" in fails("fit", "--ckpt_path", last, *options)
    after = {p: p.read_bytes() for p in RUN_0.rglob("*") if "events" not in p.name and p.is_file()}
    assert before == after


def test_any_value_of_the_trainer_survives_a_resume(run: Run) -> None:
    run("fit", "--config", BASE, "--trainer.gradient_clip_val", ".inf")
    run("fit", "--ckpt_path", RUN_0 / "checkpoints/last.ckpt", "--trainer.max_epochs", "3")
    settings = yaml.safe_load((RUN_0 / "config.yaml").read_text())
    assert settings["trainer"]["gradient_clip_val"] == float("inf")


def test_another_name_begins_another_run(run: Run) -> None:
    run("fit", "--config", BASE, once=True)
    last = RUN_0 / "checkpoints/last.ckpt"
    out = run("fit", "--ckpt_path", last, "--trainer.max_epochs", "3", "--name", "longer")
    assert "run   runs/longer/version_0" in out
    assert len(rows(RUN_0)) == 2
    assert len(rows(Path("runs/longer/version_0"))) == 3


def test_a_finished_run_says_how_to_train_it_for_longer(run: Run) -> None:
    run("fit", "--config", BASE, once=True)
    out = run("fit", "--ckpt_path", RUN_0 / "checkpoints/last.ckpt")
    assert "2 of 2 epochs are done: to train for longer, raise --trainer.max_epochs" in out
    assert len(rows(RUN_0)) == 2


def test_a_checkpoint_finds_its_images_from_another_folder(
    run: Run, arrays: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("data").symlink_to(arrays)
    run("fit", "--config", BASE, "--data.root", "data")
    last = (RUN_0 / "checkpoints/last.ckpt").resolve()
    here = run("validate", "--ckpt_path", last)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("validate", "--ckpt_path", last) == here
    assert not list(Path.cwd().iterdir())


def test_going_on_from_an_earlier_epoch_keeps_the_later_ones(run: Run) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "3")
    before = {p: p.read_bytes() for p in RUN_0.rglob("*") if p.is_file()}
    run("fit", "--ckpt_path", RUN_0 / "checkpoints/epoch_00.ckpt")
    assert {p: p.read_bytes() for p in RUN_0.rglob("*") if p.is_file()} == before
    assert [row["epoch"] for row in rows(Path("runs/base/version_1"))] == [0, 1, 2]


def test_last_and_best_mean_the_newest_run_of_the_recipe(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(
        "name: named\ntrainer:\n  default_root_dir: there\nmodel:\n  network: tests.small.Small\n"
    )
    run("fit", "--config", config)
    run("fit", "--config", config, "--trainer.max_epochs", "3")
    folder = Path("there/named/version_1")
    best = max(rows(folder), key=lambda row: row["val/acc"])
    where = ["--name", "named", "--trainer.default_root_dir", "there"]
    for word, name in (("last", "last.ckpt"), ("best", f"epoch_{best['epoch']:02.0f}.ckpt")):
        run("test", *where, "--ckpt_path", word)
        assert json.loads((folder / "test.json").read_text())["checkpoint"] == name
    out = run("fit", *where, "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert f"run   {folder}" in out
    out = run("fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "5")
    assert f"run   {folder}" in out  # by the name in the config
    (tmp_path / "nameless.yaml").write_text("model:\n  label_smoothing: 0.1\n")
    both = ["--config", config, "--config", tmp_path / "nameless.yaml"]
    assert "epoch 4:" in run("validate", *both, "--ckpt_path", "last")


def test_a_moved_run_goes_on_and_remembers_its_best_epoch(run: Run) -> None:
    run("fit", "--config", BASE, once=True)
    Path("elsewhere").mkdir()
    Path("runs/base").rename("elsewhere/moved")
    folder = Path("elsewhere/moved/version_0").resolve()
    spoil = ["--trainer.max_epochs", "3", "--model.optimizer.lr", "100"]
    out = run("fit", "--ckpt_path", folder / "checkpoints/last.ckpt", *spoil)
    best = max(rows(folder), key=lambda row: row["val/acc"])
    assert best["epoch"] < 2, "a learning rate of 100 spoils the last epoch"
    assert f"--ckpt_path {folder}/checkpoints/epoch_{best['epoch']:02.0f}.ckpt" in out


def test_config_of_a_resumed_run_repeats_it_from_the_start(run: Run) -> None:
    run("fit", "--config", BASE, *CONVNET, once=True)
    last = RUN_0 / "checkpoints/last.ckpt"
    run("fit", "--ckpt_path", last, "--trainer.max_epochs", "3")
    settings = yaml.safe_load((RUN_0 / "config.yaml").read_text())
    assert settings["ckpt_path"] is None
    train.main(["fit", "--config", str(RUN_0 / "config.yaml")])
    again = Path("runs/base/version_1/checkpoints/last.ckpt")
    assert is_same(weights(last), weights(again))


def test_predict_writes_a_class_for_every_test_image(run: Run) -> None:
    run("fit", "--config", BASE, "--data.test_curve", "true", once=True)
    run("predict", "--ckpt_path", RUN_0 / "checkpoints/last.ckpt")
    with (RUN_0 / "predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    root = yaml.safe_load((RUN_0 / "config.yaml").read_text())["data"]["root"]
    labels = [archive.CLASSES[i] for i in archive.load(root, verify=False).test_labels]
    assert [row["label"] for row in predictions] == labels
    right = sum(row["class"] == row["label"] for row in predictions)
    assert right / len(labels) == pytest.approx(rows(RUN_0)[-1]["test/acc"])


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_epoch: 3\n", "did you mean trainer.max_epochs?"),
        ("model:\n  netwrok: ConvNet\n", "did you mean model.network?"),
        ("data:\n  bath_size: 3\n", "did you mean data.batch_size?"),
        (
            "model:\n  network:\n    class_path: ConvNet\n    init_args:\n      dense_unit: 3\n",
            "did you mean dense_units?",
        ),
        ("model:\n  network:\n    class_path: networks.Nope\n", "no attribute 'Nope'"),
        ("model:\n  optimizer:\n    class_path: torch.optim.Adma\n", "no attribute 'Adma'"),
        (
            "model:\n  optimizer: SGD\n  optimizer.lr: 0.05\n",
            "optimizer.lr must be nested: put lr under optimizer, or",
        ),
        (
            "model:\n  optimizer:\n    class_path: torch.optim.SGD\n    lr: 0.05\n",
            "wrong.yaml: lr belongs under init_args of torch.optim.SGD",
        ),
        ("data: [1\n", "wrong.yaml is not valid YAML: while parsing"),
        (
            "trainer:\n  max_epochs: many\n",
            "trainer.max_epochs: expected int, not many",
        ),
        ("a: &a [*a]\n", "recursion"),
        ("name: \xff\n", "utf-8"),
        ("trainer:\n  logger: NoSuchLogger\n", "NoSuchLogger"),
    ],
)
def test_a_wrong_yaml_is_refused(fails: Run, tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(text, encoding="latin1")
    assert message in fails("fit", "--config", config)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.batch_size", "0"], "data.batch_size"),
        (["--data.batch_size", "many"], "data.batch_size"),
        (["--data.bath_size", "3"], "did you mean data.batch_size?"),
        (["mine.yaml"], "did you mean --config mine.yaml?"),
        (["a.jpg", "b.jpg"], "quote file patterns; several are a list"),
        (["--model.network", "tests.small.untyped"], "a function needs a return annotation"),
        (["--model.optimizer.lr", "x"], "model.optimizer.lr: expected float, not x"),
        (
            ["--model.lr_scheduler", "Cos"],
            "model.lr_scheduler: no class Cos: did you mean CosineAnnealing",
        ),
        (["--model.optimizer", "Sgd"], "model.optimizer: no class Sgd: did you mean SGD"),
        (["--model.lr_scheduler", "Cosine"], "did you mean CosineAnnealing"),
        (["--trainer.epochs", "2"], "did you mean trainer.max_epochs?"),
        (["--model.optimizer", "Adma"], "model.optimizer: no class Adma: did you mean Adam"),
        (["--model.network", "networks.ConvNt"], "did you mean networks.ConvNet?"),
        (
            ["--model.lr_scheduler", "CosineAnnealingLR"],
            "model.lr_scheduler needs --model.lr_scheduler.T_max",
        ),
        (["--lr", "1"], "did you mean model.optimizer.lr?"),
        (["--data.num_workers", "4"], "in memory, so there are no workers"),
        (
            ["--trainer.gradient_clip_val", "x"],
            "trainer.gradient_clip_val: expected int or float, not x",
        ),
        (
            ["--model.tta", "x"],
            "model.tta: expected one of 'none', 'mirror', 'mirror-shift', not x",
        ),
        (["--zzz", "4"], "unknown option zzz"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks+=ModelCheckpoint"],
            "two trainer.callbacks have the same class and arguments",
        ),
        (["--epochs", "1"], "did you mean trainer.max_epochs?"),
        (["--seed", "1"], "did you mean seed_everything?"),
        (["--resume", "last"], "did you mean ckpt_path?"),
        (["--ckpt_path", "."], "no checkpoint ."),
        (["--data.augment", "RandomFlip"], "data.augment: expected a list, not RandomFlip"),
        (
            ["--model.lr_scheduler", "ReduceLROnPlateau"],
            "model.lr_scheduler needs --model.lr_scheduler.monitor",
        ),
        (
            ["--model.network", "tests.small.Small", "--model.network.width", "2"],
            "unknown option width: that class takes no arguments",
        ),
        (
            ["--model.network", "timm.create_model", "--model.network.num_classes", "10"],
            "if it takes **kwargs: dict_kwargs.num_classes",
        ),
        (["--data.val_size", "1000"], "leaves none of 1000 images to train on: choose at most 999"),
        (["--data.val_size", "-1"], "data.val_size"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate"),
        (["--model.network", "torch.nn.Flatten"], "expected logits [2, 10]"),
        (
            ["--model.network", "torchvision.models.squeezenet1_1"],
            "expected logits [2, 10]: networks.library_network makes it with 10 classes",
        ),
        (["--trainer.accelerator", "no_such_thing"], "no_such_thing"),
        (
            ["--config", str(BASE), "--model.network.dense_units", "-1"],
            "model.network.dense_units: expected a value v>0, not -1",
        ),
        (["--seed_everything", "-1"], "-1"),
        (["--data.split_seed", "-1"], "data.split_seed"),
        (["--checkpoint.monitor", "test/acc"], "test/acc would choose on the test set"),
        (["--checkpoint.mode", "min"], "would choose the worst val/acc"),
        (["--data.verify", "true"], "train_images are not CIFAR-10's"),
        (["--data.root", "empty", "--data.download", "false"], "no CIFAR-10 in empty"),
        (["--data.root", "empty", "--data.sources", "[http://127.0.0.1:9/x]"], "no connection"),
        (["--ckpt_path", "nowhere.ckpt"], "no checkpoint nowhere.ckpt"),
        (["--ckpt_path", "last"], "no run in runs/default has a checkpoint"),
    ],
)
def test_a_wrong_argument_is_refused_and_leaves_nothing(
    fails: Run, args: list[str], message: str
) -> None:
    assert message in fails("fit", *args)
    assert not Path("runs").exists()
    assert not Path("empty").exists()


def test_help_is_a_few_pages_and_begins_with_this_projects_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["fit", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert len(out.splitlines()) < 250
    places = [out.index(flag) for flag in ("--model.network", "--data.val_size", "--trainer.max_")]
    assert places == sorted(places)
    assert "torch.nn.modules" not in out
    assert "trainer.gradient_clip_val" in out
    assert "--model.optimizer.lr 0.05" in out
    with pytest.raises(SystemExit):
        train.main(["--help"])
    out = capsys.readouterr().out
    assert "Train, and keep a checkpoint of every epoch." in out
    assert len(out.splitlines()) < 40


def test_a_class_without_its_file_is_named_with_it(fails: Run) -> None:
    Path("mynet.py").write_text("class LonelyNet:\n    pass\n")
    assert "did you mean mynet.LonelyNet?" in fails("fit", "--model.network", "LonelyNet")


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_evaluation_needs_a_checkpoint(fails: Run, subcommand: str) -> None:
    assert "needs --ckpt_path" in fails(subcommand)


def test_a_config_before_the_subcommand_is_refused(fails: Run) -> None:
    assert "name the subcommand first" in fails("--config", BASE, "test", "--ckpt_path", "x.ckpt")


def test_weights_alone_cannot_be_gone_on_with(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, "--checkpoint.save_weights_only", "true")
    last = RUN_0 / "checkpoints/last.ckpt"
    assert "holds weights only" in fails("fit", "--ckpt_path", last)
    assert "test/acc" in run("test", "--ckpt_path", last)


def test_a_metric_that_is_never_logged_chooses_nothing(fails: Run) -> None:
    message = fails("fit", "--config", BASE, "--checkpoint.monitor", "val/f1")
    assert "could not find the monitored key" in message


class Evil:
    """Makes a folder when a plain `pickle.load` unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("proof",)


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(
    run: Run, fails: Run, subcommand: str
) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    path = RUN_0 / "checkpoints" / "last.ckpt"
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": Evil()}, "zipped.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("zipped.ckpt", "plain.ckpt"):
        assert "is not a checkpoint" in fails(subcommand, "--ckpt_path", name)
        assert not Path("proof").exists()
    torch.load("zipped.ckpt", weights_only=False)
    assert Path("proof").exists(), "the checkpoint does run code where it is let"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text"])
def test_a_file_that_is_no_checkpoint_is_refused(fails: Run, content: bytes) -> None:
    Path("no.ckpt").write_bytes(content)
    assert "no.ckpt is not a checkpoint" in fails("test", "--ckpt_path", "no.ckpt")


def test_a_disk_that_fills_up_leaves_whole_checkpoints(
    fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "epoch_01" not in path.name:
            return write_bytes(path, content)
        write_bytes(path, content[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    message = fails("fit", "--config", BASE)
    assert "No space left on device" in message
    assert "free some space" in message
    checkpoints = list((RUN_0 / "checkpoints").iterdir())
    assert sorted(path.name for path in checkpoints) == ["epoch_00.ckpt", "last.ckpt"]
    assert all(torch.load(path, weights_only=True)["epoch"] == 0 for path in checkpoints)


@pytest.mark.slow
def test_the_terminal_shows_the_run_and_nothing_else(arrays: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", "configs/base.yaml"]
    command += [*on(arrays), "--trainer.max_epochs", "2"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0
    assert process.stderr == ""
    *table, header, zero, one, blank, best, test, view, folder = process.stdout.splitlines()
    epochs = [zero, one]
    assert len(table) == 24, "18 layers, and the lines around them"
    assert (table[0][0], table[-1][0], blank) == ("┏", "└", "")
    columns = "epoch train loss acc val loss acc seconds images/s"
    assert header.split() == columns.split()
    assert [line.split()[0] for line in epochs] == ["0", "1"]
    assert [line.split()[0] for line in (best, test, view, folder)] == [
        "best",
        "test",
        "view",
        "run",
    ]
    again = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *test.split()[3:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0
    assert again.stderr == ""
    assert again.stdout.startswith("epoch 1: test/")


@pytest.mark.slow
def test_a_person_at_a_terminal_sees_a_bar(arrays: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(BASE)]
    command += [*on(arrays), "--trainer.max_epochs", "1", "--data.batch_size", "8"]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # the end of a terminal on Linux
        pass
    assert process.wait(timeout=300) == 0
    lines = re.split(r"[\r\n]+", shown.decode())
    bars = [line for line in lines if line.startswith("Epoch 0:")]
    assert any(re.search(r" 50/100 \[.*it/s", bar) for bar in bars)
    assert len(bars) < 15, "the bar is not drawn at every step"
    assert any(re.match(r" +0 .* [\d,]+$", line) for line in lines), "images per second"


def test_throughput_is_in_tensorboard_and_in_the_table(run: Run) -> None:
    out = run("fit", "--config", BASE)
    events = EventAccumulator(str(RUN_0))
    events.Reload()
    speeds = [event.value for event in events.Scalars("train/images_per_second")]
    assert [round(speed) for speed in speeds] == [row["images_per_second"] for row in rows(RUN_0)]
    assert all(row["images_per_second"] * (row["seconds"] + 0.005) > 799 for row in rows(RUN_0))
    assert f"{rows(RUN_0)[0]['images_per_second']:,.0f}" in out


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compilation_is_reported(run: Run) -> None:
    compiled = ["--model.compile", "default", "--model.network", "tests.small.Flat"]
    out = run("fit", "--config", BASE, *compiled)
    assert re.search(r"compiled \(default\): [\d.]+ s to the end of the first step", out)
    assert "compiled" not in run("fit", "--config", BASE, "--model.compile", "off")


def test_a_wrong_compile_mode_gets_the_right_ones(fails: Run) -> None:
    message = fails("fit", "--config", BASE, "--model.compile", "fast")
    assert "model.compile: expected 'off', 'default', 'reduce-overhead'" in message


def test_off_in_yaml_means_off(run: Run, tmp_path: Path) -> None:
    (tmp_path / "off.yaml").write_text("model:\n  compile: off\n")
    assert "compiled" not in run("fit", "--config", BASE, "--config", tmp_path / "off.yaml")


def test_without_a_compiler_one_line_says_so(fails: Run, tmp_path: Path) -> None:
    compiled = ["--model.compile", "default", "--model.network", "tests.small.Flat"]
    torch.compiler.reset()  # forget what other tests have compiled
    without = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    with inductor_config.patch(without):
        message = fails("fit", "--config", BASE, *compiled)
    assert "model.compile needs a C++ compiler: install g++, or leave it off" in message
    assert not (tmp_path / "runs").exists()


def test_augmentations_are_listed_in_yaml_and_kept_in_the_checkpoint(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "augmented.yaml").write_text(
        """
        model:
          normalize: cifar10
        data:
          test_curve: true
          augment:
            - class_path: cifar10.augment.RandomCrop
              init_args: {padding: 2}
            - class_path: cifar10.augment.AlternatingFlip
            - class_path: cifar10.augment.Cutout
              init_args: {size: 4}
        """
    )
    run("fit", "--config", BASE, "--config", tmp_path / "augmented.yaml")
    curve = rows(Path("runs/augmented/version_0"))
    run("test", "--ckpt_path", "runs/augmented/version_0/checkpoints/epoch_01.ckpt")
    result = json.loads(Path("runs/augmented/version_0/test.json").read_text())
    assert [result["test/acc"], result["test/loss"]] == [
        curve[1]["test/acc"], curve[1]["test/loss"],
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [0, 2])
def test_a_run_without_a_number_for_its_loss_stops_and_keeps_nothing_of_it(
    run: Run, fails: Run, kept: int
) -> None:
    start = ["--config", BASE, *CONVNET]
    if kept:
        run("fit", *start, "--trainer.max_epochs", kept, once=True)
        start = ["--ckpt_path", RUN_0 / "checkpoints/last.ckpt", "--trainer.max_epochs", "9"]
    message = fails("fit", *start, "--model.optimizer.lr", "1e30")
    step = 16 * (kept + 1) - 1
    assert f"training diverged in epoch {kept}, step {step}: train/loss is NaN" in message
    assert "at learning rate 1e+30" in message
    files = sorted(RUN_0.glob("checkpoints/*"))
    assert [file.name for file in files] == ["epoch_00.ckpt", "epoch_01.ckpt", "last.ckpt"][
        : kept and 3
    ]
    if kept:
        assert f"lower learning rate: python train.py fit --ckpt_path {files[-1]}" in message
        files[-1].unlink()  # as with checkpoint.save_last false
        start[1] = files[1]
        message = fails("fit", *start, "--model.optimizer.lr", "1e30")
        assert f"lower learning rate: python train.py fit --ckpt_path {files[1]}" in message
        assert all(tensor.isfinite().all() for tensor in weights(files[1]).values())
        run("fit", *start, "--trainer.max_epochs", "3")
        assert [row["epoch"] for row in rows(RUN_0)] == [0, 1, 2]
    else:
        assert "no checkpoint was saved; start again with a lower" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.optimizer.lr", "1e37"], "diverged in epoch 1, step 2: val/loss is NaN"),
        (
            ["--data.val_size", "0", "--model.optimizer", "AdamW", "--model.optimizer.lr", "1e30",
             "--model.optimizer.weight_decay", "1e10"],
            "diverged in epoch 1, step 2: a weight is NaN",
        ),
    ],
)  # fmt: skip
def test_weights_that_an_epochs_last_step_has_ruined_are_not_kept(
    run: Run, fails: Run, settings: list[str], message: str
) -> None:
    brief = ["--trainer.limit_train_batches", "1"]
    run("fit", "--config", BASE, *CONVNET, "--trainer.max_epochs", "1", *brief, once=True)
    last = RUN_0 / "checkpoints/last.ckpt"
    before = last.read_bytes()
    said = fails("fit", "--ckpt_path", last, "--trainer.max_epochs", "3", *settings)
    assert message in said
    assert f"lower learning rate: python train.py fit --ckpt_path {last}" in said
    assert last.read_bytes() == before


@pytest.mark.slow
def test_in_a_slurm_job_without_srun_one_process_trains(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("JOB_ID", "7"), ("NTASKS", "4"), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    run("fit", "--config", BASE)
    assert len(rows(RUN_0)) == 2


@pytest.mark.slow
def test_a_cosine_that_ends_before_the_training_is_told(run: Run) -> None:
    cosine = ("--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max")
    said = "the learning rate rises again after T_max 1 of 2"
    assert said in run("fit", "--config", BASE, *cosine, "1")
    steps = ("--trainer.max_epochs", "9", "--trainer.max_steps", "8")  # stops inside an epoch
    assert "rises again" not in run("fit", "--config", BASE, *cosine, "2", *steps)
    assert "rises again" not in run("fit", "--config", BASE, *cosine, "2")


def test_a_diverged_run_in_half_precision_says_so(fails: Run) -> None:
    words = ("--trainer.precision", "16-true", "--model.optimizer.lr", "1e30")
    message = fails("fit", "--config", BASE, *words)
    assert "learning rate 1e+30 and trainer.precision 16-true: try bf16-mixed" in message


@pytest.mark.slow
def test_files_are_utf_8_whatever_the_locale(arrays: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# Größe\n", encoding="utf-8")
    Image.new("RGB", (32, 32)).save(tmp_path / "日本.png")
    ascii = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    last = "runs/mine/version_0/checkpoints/last.ckpt"

    def train_py(*words: str) -> str:
        command = [sys.executable, str(ROOT / "train.py"), *words]
        env = {**os.environ, **ascii}
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        return (ran.stdout + ran.stderr).decode("ascii")

    fit = ["fit", "--config", str(BASE), *on(arrays), "--trainer.max_epochs", "1"]
    train_py(*fit, "--name", "mine")
    assert "set PYTHONUTF8=1" in train_py(*fit, "--config", "mine.yaml")
    card = tmp_path / "runs/mine/version_0/model.md"
    card.write_text(card.read_text(encoding="utf-8") + "Größe\n", encoding="utf-8")
    train_py("test", "--ckpt_path", last)
    assert "Größe" in card.read_text(encoding="utf-8")
    assert "\\u" in train_py("predict", "--ckpt_path", last, "--data.images", "日本.png")
