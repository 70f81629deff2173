"""One step of training, and what it reports."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F

from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import ConvNet


class Constant(nn.Module):
    """Returns the same logits for every image."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("softmax_before_loss", [False, True])
def test_metrics_are_means_over_images_whatever_the_batches(
    arrays: Path, softmax_before_loss: bool
) -> None:
    logits = torch.randn(10)
    model = ImageClassifier(
        Constant(logits),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        softmax_before_loss=softmax_before_loss,
    )
    data = CIFAR10DataModule(str(arrays), verify=False, batch_size=300, val_size=200)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    scores = logits.softmax(0) if softmax_before_loss else logits
    for stage, images in (("train", data.train_set), ("val", data.val_set)):
        labels = images.labels[images.indices]
        loss = F.cross_entropy(scores.expand(len(labels), 10), labels)
        accuracy = (labels == logits.argmax()).float().mean()
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/loss"], loss)
        torch.testing.assert_close(trainer.callback_metrics[f"{stage}/acc"], accuracy)


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
    probabilities = model.predict_step((torch.rand(4, 3, 32, 32), torch.zeros(4)), 0)
    assert probabilities.shape == (4, 10)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
