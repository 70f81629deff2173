"""Tests that need a CUDA GPU: `python -m pytest tests/test_gpu.py -n 0`, under two minutes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.optim.lr_scheduler import OneCycleLR

import export
from cifar10.batches import Batch
from lightning_module import ImageClassifier
from networks import SpeedrunNet
from optimization import WarmupCosine
from tests.conftest import Run
from tests.test_lightning_module import fitted, linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = ("--trainer.accelerator", "gpu")
CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


class NoWaiting(Callback):
    """Fails if the CPU waits for the GPU between the first and the last step of an epoch."""

    takes_many_steps = True

    def on_exception(self, *_args: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, trainer: Trainer, *_args: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if not trainer.is_last_batch else "default")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        assert all(tensor.is_cuda for tensor in batch)
        if batch_idx == trainer.num_training_batches - 1:
            torch.cuda.set_sync_debug_mode("default")


def state_of(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def assert_same(one: Path, other: Path) -> None:
    """Compare weights, optimizer state and step of two checkpoints, bit for bit."""
    first, second = state_of(one), state_of(other)
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name
    for index, state in first["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, second["optimizer_states"][0]["state"][index][key]), key
    assert first["global_step"] == second["global_step"]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("mode", ["off", "default", "reduce-overhead"])
def test_no_step_waits_and_all_ways_agree(arrays: Path, mode: Any, graph: bool) -> None:
    if graph and mode == "reduce-overhead":
        pytest.skip("which records by itself")
    reference = fitted(arrays, linear()).callback_metrics
    model = linear(compile=mode, cuda_graph=graph)
    metrics = fitted(arrays, model, "cuda", callbacks=[NoWaiting()]).callback_metrics
    assert model.steps_a_call == (32 if graph else 0)
    for name, value in reference.items():
        torch.testing.assert_close(metrics[name].cpu(), value, atol=2e-2, rtol=2e-2)


def test_the_images_are_moved_once(arrays: Path) -> None:
    data = fitted(arrays, linear(), "cuda").datamodule  # type: ignore[attr-defined]
    assert data.train_set.images.is_cuda
    assert data.train_set.images.data_ptr() == data.val_set.images.data_ptr()


@pytest.mark.parametrize("recipe", ["base", "improved", "airbench94", "fast94"])
def test_runs_repeat_and_resume_to_the_bit(run: Run, recipe: str, tmp_path: Path) -> None:
    config = CONFIGS / f"{recipe}.yaml"
    common = ("fit", "--config", config, *GPU, "--trainer.max_epochs", 4)
    run(*common, "--name", "whole")
    run(*common, "--name", "again")
    run(*common, "--name", "parts")
    runs = tmp_path / "runs"
    whole, again = (runs / n / "version_0/checkpoints/last.ckpt" for n in ("whole", "again"))
    assert_same(whole, again)
    run("fit", "--ckpt_path", runs / "parts/version_0/checkpoints/epoch_01.ckpt")
    assert_same(whole, runs / "parts/version_1/checkpoints/last.ckpt")


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int | None = None) -> OneCycleLR:
    return OneCycleLR(optimizer, 1e-3, total_steps=total_steps)


@pytest.mark.parametrize("schedule", [None, WarmupCosine,
                                      partial(one_cycle, total_steps=None)])  # fmt: skip
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "RMSprop"])
def test_recorded_steps_train_as_single_ones(arrays: Path, optimizer: str, schedule: Any) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return getattr(torch.optim, optimizer)(params, lr=1e-3)

    clip = {"gradient_clip_val": 0.05} if optimizer == "SGD" else {}
    models = [linear(cuda_graph=g, optimizer=make, lr_scheduler=schedule) for g in (False, True)]
    trainers = [fitted(arrays, model, "cuda", **clip) for model in models]
    assert [model.steps_a_call for model in models] == [0, 32]
    assert trainers[0].global_step == trainers[1].global_step == 18
    for single, recorded in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(recorded, single, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_goes_from_gpu_to_cpu_and_back(run: Run, tmp_path: Path) -> None:
    run("fit", *GPU, "--trainer.max_epochs", 2, "--name", "x")
    last = tmp_path / "runs" / "x" / "version_0" / "checkpoints" / "last.ckpt"
    for epochs, device in ((3, "cpu"), (4, "gpu")):
        run("fit", "--ckpt_path", last, "--trainer.max_epochs", epochs,
            "--trainer.accelerator", device)  # fmt: skip
    assert state_of(last)["epoch"] == 3


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_tests_and_predicts(run: Run, recipe: str, tmp_path: Path) -> None:
    config = CONFIGS / f"{recipe}.yaml"
    run("fit", "--config", config, *GPU, "--trainer.max_epochs", 1)
    checkpoint = tmp_path / "runs" / recipe / "version_0" / "checkpoints" / "last.ckpt"
    run("test", "--ckpt_path", checkpoint)
    result = json.loads((tmp_path / "runs" / recipe / "version_0" / "test.json").read_text())
    assert result["test/acc"] > 0.05
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "black.png")
    assert "black.png" in run(
        "predict", "--ckpt_path", checkpoint, "--data.images", tmp_path / "black.png"
    )


def test_a_run_is_exported(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run("fit", *GPU, "--name", "x", "--trainer.max_epochs", 1)
    checkpoint = tmp_path / "runs" / "x" / "version_0" / "checkpoints" / "last.ckpt"
    file = tmp_path / "model.onnx"
    export.main(["--ckpt_path", str(checkpoint), "--format", "onnx", "--out", str(file)])
    assert file.stat().st_size > 100_000


def test_one_process_of_nccl(run: Run) -> None:
    out = run("fit", *GPU, "--trainer.strategy", "ddp", "--trainer.devices", 1)
    assert "best  epoch" in out


def test_lbfgs_is_left_to_lightning(arrays: Path) -> None:
    model = linear(optimizer=lambda params: torch.optim.LBFGS(params, lr=0.01))
    trainer = fitted(arrays, model, "cuda")
    assert not model.steps_a_call
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_whitening_is_the_same_on_every_device(arrays: Path) -> None:
    networks = [SpeedrunNet((24, 32, 32)) for _ in range(2)]
    for network, device in zip(networks, ("cpu", "cuda"), strict=True):
        fitted(arrays, ImageClassifier(network), device)
    torch.testing.assert_close(networks[0].whiten.weight, networks[1].whiten.weight.cpu())
