"""Many steps in one call of `training_step` equal single ones. On a CPU nothing is recorded, but
the loop is the same; tests/test_gpu.py has the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR
from torchvision.transforms import v2

from cifar10.augment import AlternatingFlip, RandomCrop
from cuda_graph import STEPS_A_CALL, decides_on_cpu
from datamodule import CIFAR10DataModule
from lightning_module import Diverged, ImageClassifier
from networks import ConvNet, DeepConvNet, SpeedrunNet, library_network
from optimization import WarmupCosine
from tests.conftest import QUIET


def fitted(
    arrays: Path, model: ImageClassifier, ckpt_path: Path | None = None, **settings: Any
) -> Trainer:
    """Train for two epochs of 40 steps; the last batch of each is smaller."""
    augment = [RandomCrop(2), AlternatingFlip()]
    data = CIFAR10DataModule(
        str(arrays), verify=False, batch_size=20, val_size=205, augment=augment
    )
    trainer = Trainer(max_epochs=2, **{**QUIET, **settings})
    torch.manual_seed(0)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def classifier(graph: bool, lr: float = 1e-3, **settings: Any) -> ImageClassifier:
    torch.manual_seed(0)

    def adam(params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=lr)

    network = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(256, 10),
    )  # fmt: skip
    return ImageClassifier(
        network, **{"cuda_graph": graph, "optimizer": adam, "normalize": "cifar10", **settings}
    )


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int = 80) -> OneCycleLR:
    return OneCycleLR(optimizer, 1e-2, total_steps=total_steps)


def by_epoch(optimizer: torch.optim.Optimizer) -> StepLR:
    return StepLR(optimizer, 1)


def by_plateau(optimizer: torch.optim.Optimizer) -> ReduceLROnPlateau:
    schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
    schedule.monitor = "val/loss"  # type: ignore[attr-defined]
    return schedule


CLIPPED = {"gradient_clip_val": 0.05, "precision": "bf16-mixed"}


@pytest.mark.parametrize(
    ("schedule", "settings"),
    [(None, CLIPPED), (WarmupCosine, {}), (one_cycle, {}), (by_epoch, {}), (by_plateau, {})],
)
def test_many_steps_train_as_single_ones(
    arrays: Path, schedule: Any, settings: dict[str, Any]
) -> None:
    models = [classifier(graph, lr_scheduler=schedule) for graph in (False, True)]
    trainers = [fitted(arrays, model, **settings) for model in models]
    assert [model.steps_a_call for model in models] == [0, STEPS_A_CALL]
    assert [trainer.num_training_batches for trainer in trainers] == [40, 2]
    assert trainers[0].global_step == trainers[1].global_step == 80
    loggers_steps = [trainer.fit_loop.epoch_loop._batches_that_stepped for trainer in trainers]
    assert loggers_steps[0] == loggers_steps[1]
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in trainers]
    assert rates[0] == rates[1]
    for name, single in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], single), name
    for name, value in trainers[0].callback_metrics.items():
        torch.testing.assert_close(trainers[1].callback_metrics[name], value)


class Watcher(Callback):
    """Records the step at each batch end."""

    takes_many_steps = False

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_args: Any) -> None:
        self.seen.append(trainer.global_step)


def test_who_looks_at_every_step_sees_every_step(arrays: Path) -> None:
    watcher = Watcher()
    fitted(arrays, model := classifier(True), callbacks=[watcher])
    assert model.steps_a_call == 1
    assert watcher.seen == list(range(1, 81))


def test_a_monitor_of_rates_by_epoch_takes_many_steps(arrays: Path, tmp_path: Path) -> None:
    for interval, steps in (("epoch", STEPS_A_CALL), ("step", 1)):
        monitor = LearningRateMonitor(interval)  # type: ignore[arg-type]
        model = classifier(True)
        fitted(arrays, model, callbacks=[monitor], logger=CSVLogger(tmp_path))
        assert model.steps_a_call == steps


def test_averages_of_weights_are_the_same(arrays: Path) -> None:
    averages = []
    for graph in (False, True):
        average = EMAWeightAveraging(decay=0.9)
        fitted(arrays, model := classifier(graph), callbacks=[average])
        averages.append(model.state_dict())
    for name, single in averages[0].items():
        assert torch.equal(averages[1][name], single), name


def test_limits_count_steps(arrays: Path) -> None:
    assert fitted(arrays, classifier(True), limit_train_batches=7).global_step == 14
    assert fitted(arrays, classifier(True), limit_train_batches=1).global_step == 2
    assert fitted(arrays, classifier(True), overfit_batches=1).global_step == 2
    assert fitted(arrays, classifier(True), max_steps=11).global_step == 11


class Between(Callback):
    """Hooks into the backward pass, despite what it declares."""

    takes_many_steps = True

    def on_after_backward(self, *_args: Any) -> None:
        raise AssertionError("not reached")


class Unknown(Callback):
    """May freeze or prune a layer between two steps."""


def sgd_of_ones_own(params: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params)


@pytest.mark.parametrize(
    ("settings", "trainer_settings", "message"),
    [
        ({}, {"callbacks": [Between()]}, "does not know what Between may do within a step"),
        ({}, {"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches"),
        ({}, {"callbacks": [StochasticWeightAveraging(1e-3)]}, "what StochasticWeightAveraging"),
        ({}, {"callbacks": [GradientAccumulationScheduler({1: 2})]}, "what GradientAccumulation"),
        ({}, {"callbacks": [Unknown()]}, "what Unknown may do"),
        ({"compile": "reduce-overhead"}, {}, "model.compile reduce-overhead both record CUDA"),
        ({"optimizer": sgd_of_ones_own}, {}, "how to record LBFGS"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    arrays: Path, settings: dict[str, Any], trainer_settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fitted(arrays, classifier(True, **settings), **trainer_settings)


def test_a_diverging_run_stops_with_the_same_message(arrays: Path) -> None:
    def sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e36)

    messages = []
    for graph in (False, True):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        with pytest.raises(Diverged) as stopped:
            fitted(arrays, ImageClassifier(network, sgd, cuda_graph=graph))
        messages.append(str(stopped.value))
    assert "diverged in epoch 0" in messages[0]
    assert messages[0] == messages[1]


class SavesInside(Callback):
    """Saves a checkpoint inside an epoch."""

    takes_many_steps = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            trainer.save_checkpoint(self.path)


def test_an_epoch_is_resumed_in_its_middle_or_refused(arrays: Path, tmp_path: Path) -> None:
    path = tmp_path / "inside.ckpt"
    fitted(arrays, whole := classifier(True), callbacks=[SavesInside(path)])
    assert torch.load(path, weights_only=True)["global_step"] == 40 + STEPS_A_CALL
    with pytest.raises(MisconfigurationException, match="was saved mid-epoch"):
        fitted(arrays, classifier(False), path)
    # Dropout and crops of the rest of the epoch are redrawn, so only the steps are compared.
    resumed = fitted(arrays, classifier(True), path)
    assert resumed.global_step == 80
    assert whole.steps_a_call == STEPS_A_CALL


class SavesAfterValidation(Callback):
    """Saves before the epoch is counted, as ModelCheckpoint does if some epochs skip validation."""

    takes_many_steps = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_after_validation_repeats_no_step(arrays: Path, tmp_path: Path) -> None:
    path = tmp_path / "after.ckpt"
    fitted(arrays, classifier(True), callbacks=[SavesAfterValidation(path)])
    assert fitted(arrays, classifier(True), path).global_step == 80
    with pytest.raises(MisconfigurationException, match="was saved mid-epoch"):
        fitted(arrays, classifier(False), path)


class Interrupts(Callback):
    """Fails in the middle of a call, and then tries to save."""

    takes_many_steps = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer, self.steps = trainer.optimizers[0], 0
        step = optimizer.step

        def failing(*args: Any) -> Any:
            self.steps += 1
            if self.steps == 20:
                raise RuntimeError("in the middle")
            return step(*args)

        optimizer.step = failing  # type: ignore[method-assign, assignment]

    def on_exception(self, trainer: Trainer, *_args: Any) -> None:
        trainer.save_checkpoint("half.ckpt")


def test_nothing_is_saved_of_half_a_call(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisconfigurationException, match="cannot save within a training_step call"):
        fitted(arrays, classifier(True), callbacks=[Interrupts()])
    assert not (tmp_path / "half.ckpt").exists()


def test_networks_of_this_project_decide_nothing_on_the_cpu() -> None:
    for network in (ConvNet(), DeepConvNet(), SpeedrunNet(), library_network("resnet18")):
        assert not decides_on_cpu(network)
    assert "RandomHorizontalFlip" in decides_on_cpu(nn.Sequential(v2.RandomHorizontalFlip()))


class Derived(ImageClassifier):
    """May override the training step."""


def test_a_class_of_ones_own_keeps_its_step(arrays: Path) -> None:
    with pytest.raises(MisconfigurationException, match="ImageClassifier itself, not Derived"):
        fitted(arrays, Derived(ConvNet(), cuda_graph=True))


def test_on_a_cpu_lightning_makes_the_steps(arrays: Path) -> None:
    fitted(arrays, model := classifier(True, cuda_graph="auto"))
    assert not model.steps_a_call
