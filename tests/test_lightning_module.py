"""One training step, and what it reports."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from cifar10.augment import AlternatingFlip
from cifar10.batches import Batch
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import ConvNet
from tests.conftest import QUIET


class Constant(nn.Module):
    """Returns the same logits for every image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("softmax_before_loss", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "class_weights"), [(300, None), (800, torch.linspace(0.1, 3, 10).tolist())]
)
def test_metrics_are_means_over_images_and_class_weights_those_of_pytorchs_training_loss(
    arrays: Path, softmax_before_loss: bool, batch_size: int, class_weights: list[float] | None
) -> None:
    logits = torch.randn(10)
    model = ImageClassifier(
        Constant(logits),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        softmax_before_loss=softmax_before_loss,
        class_weights=class_weights,
    )
    data = CIFAR10DataModule(str(arrays), verify=False, batch_size=batch_size, val_size=200)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, datamodule=data)
    scores = logits.softmax(0) if softmax_before_loss else logits
    training = nn.CrossEntropyLoss(torch.tensor(class_weights) if class_weights else None)
    for stage, images, criterion in (
        ("train", data.train_set, training),
        ("val", data.val_set, nn.CrossEntropyLoss()),
    ):
        labels = images.labels[images.indices]
        loss = criterion(scores.expand(len(labels), 10), labels)
        accuracy = (labels == logits.argmax()).float().mean()
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/loss"], loss)
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/acc"], accuracy)


def test_vectors_can_be_left_out_of_weight_decay(arrays: Path) -> None:
    network, parts = ConvNet(), dict[bool, list[nn.Parameter]]()
    trainer = fitted(
        arrays,
        ImageClassifier(
            network,
            optimizer=lambda params: torch.optim.AdamW(params, weight_decay=0.1),
            decay_matrices_only=True,
        ),
        limit_train_batches=1,
    )
    for group in trainer.optimizers[0].param_groups:
        parts[group["weight_decay"] > 0] = group["params"]
    assert sum(map(len, parts.values())) == len(list(network.parameters()))
    assert all(p.ndim >= 2 for p in parts[True])
    assert all(p.ndim == 1 for p in parts[False])


def test_a_model_built_by_hand_makes_checkpoints_that_are_plain_data(
    arrays: Path, tmp_path: Path
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200, augment=[nn.Identity()])
    trainer.fit(ImageClassifier(ConvNet()), datamodule=data)
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    checkpoint = torch.load(tmp_path / "by_hand.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Flatten(), r"Flatten returns \[2, 3072\] for 2 images, expected logits \[2, 10\]"),
        (nn.Linear(7, 10), r"Linear does not take images \[B, 3, 32, 32\]"),
        (Constant(torch.zeros(11)), r"returns \[2, 11\]"),
    ],
)
def test_networks_of_other_shapes_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ImageClassifier(network)


def test_checking_a_network_leaves_it_as_it_was() -> None:
    network = ConvNet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ImageClassifier(network)
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_predictions_are_probabilities() -> None:
    model = ImageClassifier(ConvNet()).eval()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    probabilities = model.predict_step(Batch(pixels, torch.zeros(4), torch.arange(4)), 0)
    assert probabilities.shape == (4, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))


def fitted(
    arrays: Path, model: ImageClassifier, accelerator: str = "cpu", **settings: Any
) -> Trainer:
    """Train on the small data set for two epochs; the last batch of each is short."""
    data = CIFAR10DataModule(
        str(arrays), verify=False, batch_size=96, val_size=200, augment=[AlternatingFlip()]
    )
    own = {"accelerator": accelerator, "devices": 1, **settings}
    trainer = Trainer(max_epochs=2, **{**QUIET, **own})
    torch.manual_seed(0)
    trainer.fit(model, datamodule=data)
    return trainer


def linear(**settings: Any) -> ImageClassifier:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    return ImageClassifier(network, **{"normalize": "cifar10", **settings})


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_trains_as_the_plain_one(arrays: Path, mode: Any) -> None:
    plain, compiled = linear(), linear(compile=mode)
    results = [fitted(arrays, model).callback_metrics for model in (plain, compiled)]
    assert compiled.compiled_loss != compiled._loss
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-4, rtol=1e-4)
    for weights, same in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(weights, same, atol=1e-4, rtol=1e-3)


class Norms(Callback):
    """Records the gradient norm that each step used."""

    def __init__(self) -> None:
        self.after_steps: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_args: object
    ) -> None:
        if trainer.global_step > len(self.after_steps):
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            self.after_steps.append(float(torch.cat(gradients).norm()))


def test_gradients_can_be_clipped_and_accumulated(arrays: Path) -> None:
    norms = Norms()
    trainer = fitted(
        arrays, linear(), callbacks=[norms], gradient_clip_val=1e-3, accumulate_grad_batches=4
    )
    assert trainer.global_step == 6, "9 batches an epoch make 3 steps"
    assert norms.after_steps == pytest.approx([1e-3] * 6, rel=1e-2)


class Unfreezes(Callback):
    """Adds parameters to the optimizer, as Lightning's fine-tuning callbacks do."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_a_callback_can_add_parameters_without_names(arrays: Path) -> None:
    trainer = fitted(arrays, linear(), callbacks=[Unfreezes()])
    assert len(trainer.optimizers[0].param_groups) == 2


class Logged(Callback):
    """Records the names that are logged."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log = pl_module.log

        def counted(name: str, *args: Any, **kwargs: Any) -> None:
            self.calls.append(name)
            log(name, *args, **kwargs)

        pl_module.log = counted  # type: ignore[method-assign]


def test_a_step_logs_only_when_asked_to(arrays: Path) -> None:
    quiet, loud = Logged(), Logged()
    fitted(arrays, linear(), callbacks=[quiet])
    fitted(arrays, linear(log_steps=True), callbacks=[loud])
    for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert quiet.calls.count(name) == 2, "once an epoch"
    assert len(quiet.calls) == 8
    assert loud.calls.count("train/loss_step") == 18


def test_loss_keeps_its_digits_in_a_model_of_half_precision() -> None:
    model = linear().to(torch.bfloat16)
    losses = torch.linspace(0.5, 2.5, 313)
    for _ in range(2):  # two epochs
        for loss in losses:
            model.train_metrics.update(loss.to(torch.bfloat16), torch.tensor(55), 128)
        means = model.train_metrics.compute()
        torch.testing.assert_close(means["loss"], losses.mean(), atol=2e-3, rtol=0)
        torch.testing.assert_close(means["acc"], torch.tensor(55 / 128))
        model.train_metrics.reset()


def test_a_rank_without_a_share_of_a_batch_changes_nothing() -> None:
    model = linear()
    batch = Batch(
        torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8), torch.arange(8)
    )
    model.validation_step(batch, 0)
    before = model.val_metrics.compute()
    model.val_metrics.reset()
    model.validation_step(batch, 0)
    model.validation_step(Batch(*(tensor[:0] for tensor in batch)), 1)
    assert model.val_metrics.compute() == before
