"""What TensorBoard shows besides the curves: graph, images as they are trained on, learning rate,
weight norms."""

import warnings
from contextlib import redirect_stdout, suppress

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from cifar10.augment import Normalize

SHOWN = 64  # images


class Board(Callback):
    """Fills TensorBoard: when a run begins with the graph and a sample of augmented training
    images, at the end of every epoch with its learning rate and the norm of each layer's weights.
    """

    takes_many_steps = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the graph and the images of a run that begins."""
        self.on_train_epoch_start(trainer, pl_module)  # not called for the rest of an epoch
        if trainer.current_epoch or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # The numbers that this draws change no run: the module seeds every epoch.
                with torch.no_grad():
                    self._add_images(logger.experiment, trainer, pl_module)
                    _add_graph(logger.experiment, pl_module)

    def _add_images(
        self, board: SummaryWriter, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        """Show the first images of the training set as the network sees them in epoch 0."""
        image_set = trainer.datamodule.train_set  # type: ignore[attr-defined]
        transform = pl_module.transform
        assert isinstance(transform, nn.Module)
        pixels, _, indices = image_set.batch(image_set.indices[:SHOWN])
        images: Tensor = transform(pixels, indices)
        for step in transform.modules():
            if isinstance(step, Normalize):
                images = images * step.std + step.mean
        grid = make_grid(images.float().clamp(0, 1), nrow=8)
        board.add_image("train/images", F.interpolate(grid[None], scale_factor=2.0)[0])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the learning rates before a scheduler changes them."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        names = (
            ["lr"] if len(groups) == 1 else [f"lr/{g.get('name', i)}" for i, g in enumerate(groups)]
        )
        self.rates = {n: float(g["lr"]) for n, g in zip(names, groups, strict=True)}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's learning rates and the norms after it."""
        network = pl_module.network
        assert isinstance(network, nn.Module)
        weights = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1}
        norms = torch.stack([weight.float().norm() for weight in weights.values()]).tolist()
        names = [f"weight_norm/{name.removesuffix('.weight')}" for name in weights]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                values = self.rates | dict(zip(names, norms, strict=True))
                logger.log_metrics(values, trainer.global_step)


def _add_graph(board: SummaryWriter, pl_module: LightningModule) -> None:
    network = pl_module.network
    assert isinstance(network, nn.Module)
    assert isinstance(pl_module.example_input_array, Tensor)
    # A network that cannot be traced has no graph to show, and that is all.
    with warnings.catch_warnings(), redirect_stdout(None), suppress(Exception):
        warnings.simplefilter("ignore")
        board.add_graph(network.eval(), pl_module.example_input_array.to(pl_module.device))
    network.train()
