"""What a run reports is true: one chosen epoch, the settings and images that were used, modes and
modules as their authors made them. Users' mistakes are told from bugs."""

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from cifar10 import archive
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from runs import locked
from tests.conftest import BASE, QUIET, Run
from tests.test_train import CONVNET, RUN_0, rows, weights

LAST = RUN_0 / "checkpoints/last.ckpt"
RUN_1 = Path("runs/base/version_1")


def named_epochs(run: Run, folder: Path, said: str) -> set[int]:
    """Return the chosen epochs by terminal, card, TensorBoard and `--ckpt_path best`."""
    printed = int(re.findall(r"best  epoch (\d+)", said)[0])
    path = re.findall(r"test --ckpt_path (\S+)", said)[0]
    card = int(re.findall(r"in the chosen epoch, (\d+)", (folder / "model.md").read_text())[0])
    events = EventAccumulator(str(folder)).Reload()
    best = re.findall(r"epoch (\d+):", run("validate", "--name", "base", "--ckpt_path", "best"))[0]
    of_file = torch.load(path, weights_only=True)["epoch"]
    shown = int(events.Scalars("chosen/epoch")[-1].value)
    return {printed, of_file, card, shown, int(best)}


def test_one_epoch_is_named_as_chosen_everywhere(run: Run) -> None:
    spoil = ["--model.optimizer.lr", "0.05"]  # so that accuracy jumps from epoch to epoch
    out = run("fit", "--config", BASE, *spoil, "--trainer.max_epochs", "7",
              "--checkpoint.every_n_epochs", "3")  # fmt: skip
    assert len(named_epochs(run, RUN_0, out)) == 1
    assert len(rows(RUN_0)) == 7
    # Another monitor, in the same folder: chosen among all its checkpoints.
    out = run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "9", "--checkpoint.monitor",
              "val/loss", "--checkpoint.every_n_epochs", "1")  # fmt: skip
    assert len(named := named_epochs(run, RUN_0, out)) == 1
    losses = {int(r["epoch"]): r["val/loss"] for r in rows(RUN_0) if r["epoch"] in (2, 5, 7, 8)}
    assert named == {min(losses, key=lambda epoch: losses[epoch])}
    # Another folder: chosen among the checkpoints that it holds.
    early = RUN_0 / "checkpoints/epoch_05.ckpt"
    out = run("fit", "--ckpt_path", early, "--checkpoint.every_n_epochs", "1",
              "--trainer.max_epochs", "9")  # fmt: skip
    assert len(named := named_epochs(run, RUN_1, out)) == 1
    assert named < {6, 7, 8}


def test_files_named_by_metrics_and_steps_are_found(run: Run) -> None:
    name = ["--checkpoint.filename", "{step}_{val/acc}", "--checkpoint.save_top_k", "1"]
    out = run("fit", "--config", BASE, *name)
    assert len(named_epochs(run, RUN_0, out)) == 1


def test_a_result_says_on_which_images_and_how(
    run: Run, fails: Run, arrays: Path, tmp_path: Path
) -> None:
    run("fit", "--config", BASE, once=True)
    run("test", "--ckpt_path", LAST)
    card, own = (RUN_0 / "model.md").read_text(), (RUN_0 / "test.json").read_text()
    noisy = tmp_path / "noisy" / archive.FOLDER
    noisy.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in archive.Arrays._fields:
        array = np.load(arrays / archive.FOLDER / f"{name}.npy")
        np.save(noisy / f"{name}.npy", rng.permutation(array) if "labels" in name else array)
    run("test", "--ckpt_path", LAST, "--data.root", noisy.parent)
    (other,) = RUN_0.glob("test_*.json")
    result = json.loads(other.read_text())
    assert other.stem == f"test_{result['set']}"
    assert result["accuracy"]["value"] < 0.3 < json.loads(own)["accuracy"]["value"]
    assert (RUN_0 / "test.json").read_text() == own
    assert (RUN_0 / "model.md").read_text() == card
    out = run("test", "--ckpt_path", LAST, "--model.tta", "mirror")
    assert "with model.tta mirror, not the run's none" in out
    assert json.loads((RUN_0 / "test.json").read_text())["tta"] == "mirror"
    assert "with model.tta mirror (not none):" in (RUN_0 / "model.md").read_text()
    elsewhere = ("--ckpt_path", LAST, "--data.root", noisy.parent)
    assert "trained on other images" in fails("validate", *elsewhere)
    assert "trained on other images" in fails("fit", *elsewhere, "--trainer.max_epochs", "3")


@pytest.mark.slow
def test_a_card_tells_how_a_run_was_resumed_and_trained(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("fit", "--config", BASE, "--trainer.limit_train_batches", "5")
    card = (RUN_0 / "model.md").read_text()
    assert "each with 5 of 16 batches" in card
    (started,) = re.findall(r"\*\*Command\*\*: `(python train.py fit --config .*)`\n", card)
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3", "--model.optimizer.lr", "0.001")
    card = (RUN_0 / "model.md").read_text()
    assert f"**Command**: `{started}`" in card
    assert "from epoch 2 with" in card
    assert "model.optimizer.init_args.lr 0.001 (was 0.002)" in card
    for name, lr in (("config_1", 0.002), ("config", 0.001)):
        settings = yaml.safe_load((RUN_0 / f"{name}.yaml").read_text())
        assert settings["model"]["optimizer"]["init_args"]["lr"] == lr
    settings = yaml.safe_load((RUN_0 / "hparams.yaml").read_text())
    assert settings["optimizer"]["init_args"]["lr"] == 0.001
    monkeypatch.setattr(torchvision, "__version__", "99.0")
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "4")
    assert "torchvision version 99.0 (was 0." in (RUN_0 / "model.md").read_text()
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", "--trainer.precision", "16-mixed",
        "--model.label_smoothing", "0.1", "--model.softmax_before_loss", "true")  # fmt: skip
    card = (RUN_1 / "model.md").read_text()
    assert "**Precision**: bf16-mixed" in card, "what a CPU used"
    assert "**Loss**: label smoothing 0.1, softmax before the cross entropy" in card


def test_a_run_is_trained_by_one_process(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    with locked(RUN_0):
        assert f"{RUN_0}: another process is training in it" in fails(
            "fit", "--ckpt_path", LAST, "--trainer.max_epochs", "2"
        )
    assert len(rows(RUN_0)) == 1


class Frozen(nn.Sequential):
    """Its batch norm keeps its statistics."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3072, 10))
        self[0].eval()


def test_every_module_keeps_its_mode(run: Run) -> None:
    run("fit", "--config", BASE, "--model.network", "tests.test_honest.Frozen")
    state = weights(LAST)
    assert torch.equal(state["network.0.running_mean"], torch.zeros(3))
    assert state["network.0.num_batches_tracked"] == 0


def test_a_loaded_model_is_right_by_itself(run: Run, arrays: Path) -> None:
    run("fit", "--config", BASE, "--model.normalize", "cifar10", "--data.test_curve", "true")
    model = ImageClassifier.load_from_checkpoint(LAST).eval()
    data = archive.load(arrays, verify=False)
    with torch.no_grad():
        right = model(data.test_images / 255).argmax(1) == data.test_labels
    expected = rows(RUN_0)[-1]["test/acc"]
    assert right.float().mean().item() == pytest.approx(expected)
    module = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    trainer = Trainer(**QUIET)
    (result,) = trainer.test(model, module, verbose=False)
    assert result["test/acc"] == pytest.approx(expected)


# ------------------------------------------------------------------- silently something else


def test_schedules_are_stepped_when_they_are_made_for_it_or_as_told(run: Run) -> None:
    cyclic = ["--model.lr_scheduler", "CyclicLR", "--model.lr_scheduler.base_lr", "0.001",
              "--model.lr_scheduler.max_lr", "0.01", "--model.lr_scheduler.step_size_up", "32",
              "--model.lr_scheduler.cycle_momentum", "false"]  # fmt: skip
    once = ["--trainer.max_epochs", "1"]
    run("fit", "--config", BASE, *once, *cyclic)
    run("fit", "--config", BASE, *once, *cyclic, "--model.lr_interval", "epoch")
    found = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
        for folder in (RUN_0, RUN_1)
    ]
    rates = [state["param_groups"][0]["lr"] for state in found]
    assert rates == pytest.approx([0.001 + 0.009 * 16 / 32, 0.001 + 0.009 / 32])


def test_another_class_has_its_own_defaults(run: Run) -> None:
    brief = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", "--model.network", "DeepConvNet",
        "--model.optimizer", "SGD", *brief)  # fmt: skip
    model = yaml.safe_load((RUN_0 / "config.yaml").read_text())["model"]
    assert model["network"]["init_args"]["dense_units"] == 128
    assert model["optimizer"]["init_args"]["lr"] == 0.001
    assert model["optimizer"]["init_args"]["fused"] is None


def test_the_last_checkpoint_takes_no_space_of_its_own(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "checkpoints of" not in run("fit", "--config", BASE, *CONVNET)
    assert LAST.samefile(RUN_0 / "checkpoints/epoch_01.ckpt")
    assert torch.load(LAST, weights_only=True)["epoch"] == 1
    monkeypatch.setattr("runs.LARGE", 1e6)
    said = run("fit", "--config", BASE, *CONVNET)
    assert re.search(r"2 checkpoints of 1 MB will take 0\.0 GB: --checkpoint\.save_top_k 3", said)


def test_schedulers_of_pytorchs_by_step_resume_exactly(run: Run) -> None:
    falling = ["--model.lr_scheduler", "ExponentialLR", "--model.lr_scheduler.gamma", "0.9"]
    run("fit", "--config", BASE, *falling, "--model.lr_interval", "step")
    run("fit", "--ckpt_path", RUN_0 / "checkpoints/epoch_00.ckpt")
    both = [torch.load(f / "checkpoints/epoch_01.ckpt", weights_only=True) for f in (RUN_0, RUN_1)]
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in both]
    assert rates[0] == rates[1] == pytest.approx(0.002 * 0.9**32)


def test_a_schedule_by_epoch_resumes_and_one_that_is_added_is_told(run: Run) -> None:
    decay = ["--model.lr_scheduler", "LinearDecay", "--model.lr_interval", "epoch"]
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    out = run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3", *decay)
    assert "model.lr_scheduler has changed: the optimizer's state is reset" in out
    assert "lr_scheduler.class_path optimization.LinearDecay" in (RUN_0 / "model.md").read_text()
    first = (RUN_0 / "config_1.yaml").read_text()
    run("fit", "--ckpt_path", RUN_0 / "checkpoints/epoch_01.ckpt", "--name", "again")
    assert (
        weights(LAST).keys() == weights(Path("runs/again/version_0/checkpoints/last.ckpt")).keys()
    )
    assert Path("runs/again/version_0/config_1.yaml").read_text() == first
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3")
    assert (RUN_0 / "config_1.yaml").read_text() == first


class Blur(nn.Module):
    """An augmentation with a buffer."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        return images * self.kernel


def test_augmentation_is_no_part_of_the_model(run: Run) -> None:
    run("fit", "--config", BASE, "--data.augment+=tests.test_honest.Blur")
    assert not any(key.startswith("augment") for key in weights(LAST))
    ImageClassifier.load_from_checkpoint(LAST)
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3")


def test_the_last_of_two_validations_an_epoch_names_its_own_file(run: Run) -> None:
    out = run("fit", "--config", BASE, "--trainer.val_check_interval", "0.5")
    path = re.findall(r"test --ckpt_path (\S+)", out)[0]
    assert "-v1" in path
    assert len(named_epochs(run, RUN_0, out)) == 1


def test_a_recipe_with_its_own_checkpoints_is_tested_too(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n")
    both = ("--config", BASE, "--config", own)
    run("fit", *both, "--trainer.fast_dev_run", "true")
    run("fit", *both)
    (path,) = Path("runs/own/version_0/checkpoints").glob("*.ckpt")
    assert "test/acc" in run("test", "--config", own, "--ckpt_path", path)


# ------------------------------------------------------------------------- two kinds of mistake


class Broken(nn.Sequential):
    """Raises an OSError in training."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            raise FileNotFoundError("statistics.npy")
        logits: Tensor = self[1](self[0](images))
        return logits


class Picky(Callback):
    """Refuses its arguments."""

    def __init__(self) -> None:
        raise FileNotFoundError("the folder X is missing")


def test_a_mistake_in_code_keeps_its_traceback(run: Run) -> None:
    with pytest.raises(FileNotFoundError, match=r"statistics\.npy"):
        run("fit", "--config", BASE, "--model.network", "tests.test_honest.Broken",
            "--trainer.enable_model_summary", "false")  # fmt: skip


def test_a_refused_argument_gives_the_innermost_cause(
    run: Run, fails: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = fails("fit", "--config", BASE, "--trainer.callbacks+=tests.test_honest.Picky")
    assert message.strip() == "error: Picky: the folder X is missing"
    assert "wandb" in fails("fit", "--config", BASE, "--trainer.logger", "WandbLogger")
    assert not Path("runs").exists()
    monkeypatch.setenv("LAB_DEBUG", "1")
    with pytest.raises(Exception, match="the folder X is missing") as raised:
        run("fit", "--config", BASE, "--trainer.callbacks+=tests.test_honest.Picky")
    assert not isinstance(raised.value, SystemExit)


def test_a_network_in_the_current_folder_is_found(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    # As in `python train.py`: the path has train.py's folder, not the current one.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mynet")
    try:
        run("fit", "--model.network", "mynet.Net", "--trainer.max_epochs", "1")
        card = Path("runs/default/version_0/model.md").read_text()
        digest = hashlib.sha256((tmp_path / "mynet.py").read_bytes()).hexdigest()
        assert (
            f"**Files outside this project's commits**: `mynet`, SHA-256 {digest[:12]}...\n" in card
        )
    finally:
        sys.modules.pop("mynet", None)
