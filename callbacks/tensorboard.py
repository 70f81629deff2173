"""What TensorBoard and the terminal show besides the curves: layers, graph, augmented images,
weight norms, hyperparameters."""

import copy
import warnings
from contextlib import redirect_stdout, suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.model_summary import summarize
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from callbacks.history import NAMES, STAGES, History
from runs import flat

SHOWN = 64  # images
CHOSEN = ("val/acc", "val/loss", "test/acc", "epoch")  # what HParams shows for the chosen epoch
ELSEWHERE = {"_instantiator", "root", "download", "sources", "verify", "log_steps", "images"}


def others(trainer: Trainer) -> list[Logger]:
    """Return the loggers other than TensorBoard's."""
    return [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of the run's TensorBoard events; none except on rank 0."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


class Board(Callback):
    """Fills TensorBoard. At the start: a chart that combines training, validation and test, the
    graph, and a sample of augmented training images. After each epoch: weight norms. At the end:
    the hyperparameters and the chosen epoch, which other loggers, such as W&B and MLflow, get too.
    """

    takes_many_steps = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the chart; for a new run, also the graph and the images."""
        titles = zip(NAMES, ("loss", "accuracy"), strict=True)
        charts = {t: ["Multiline", [f"^{stage}/{n}$" for stage in STAGES]] for n, t in titles}
        for board in writers(trainer):
            board.add_custom_scalars({"learning curves": charts})
            if trainer.current_epoch == 0:
                image_set = trainer.datamodule.train_set  # type: ignore[attr-defined]
                batch = image_set.batch(image_set.indices[:SHOWN])
                # Drawing random numbers here is harmless: the module seeds every epoch.
                grid = make_grid(pl_module.augment(*batch)[0].float().clamp(0, 1), nrow=8)
                board.add_image("train/images", F.interpolate(grid[None], scale_factor=2.0)[0])
                # A network that can't be traced has no graph, but trains all the same.
                with warnings.catch_warnings(), redirect_stdout(None), suppress(Exception):
                    warnings.simplefilter("ignore")
                    # A copy, so that every module keeps its train or eval mode.
                    network = copy.deepcopy(pl_module.network).eval()
                    board.add_graph(network, pl_module.example_input_array.to(pl_module.device))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log weight norms."""
        weights = [(name, p) for name, p in pl_module.network.named_parameters() if p.ndim > 1]
        for board in writers(trainer):
            for name, weight in weights:
                tag = f"weight_norm/{name.removesuffix('.weight')}"
                board.add_scalar(tag, weight.detach().float().norm(), trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Fill the HParams tab; log the chosen epoch."""
        history = next((c for c in trainer.callbacks if isinstance(c, History)), None)  # type: ignore[attr-defined]
        best = (history and history.best(trainer)) or {}
        chosen = {f"chosen/{key}": best[key] for key in CHOSEN if key in best}
        for logger in others(trainer) if chosen else ():
            logger.log_metrics(chosen, trainer.global_step)
        for board in writers(trainer):
            for key, value in chosen.items():
                board.add_scalar(key, value, trainer.global_step)
            # Without torch's description of the whole table, TensorBoard makes its own, which shows
            # the hyperparameters that differ between runs first.
            _, *run = hparams(_settings(trainer), {})  # type: ignore[no-untyped-call]
            for summary in run:
                board._get_file_writer().add_summary(summary, trainer.global_step)  # type: ignore[no-untyped-call]


def _settings(trainer: Trainer) -> dict[str, Any]:
    """Return the hyperparameters that affect a result, named as on the command line."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    settings = flat({"model": dict(module.hparams), "data": dict(data.hparams)}) | {
        "seed_everything": getattr(module, "seed", None),
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.precision": trainer.precision_plugin.precision,
    }
    return {
        key.replace(".init_args", ""): v if isinstance(v, bool | int | float) else str(v)
        for key, v in settings.items()
        if not {*key.split(".")} & ELSEWHERE
    }


class LayerTable(ModelSummary):
    """Prints each layer of `network`: name, type, output shape for the example batch, parameter
    count. Lightning's own summary also lists containers and metrics."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        summary = summarize(pl_module, max_depth=-1)
        modules = dict(pl_module.named_modules())
        total = sum(p.numel() for p in modules["network"].parameters())
        table = Table("layer", "type", "output for 128 images", show_footer=True)
        table.add_column("parameters", f"{total:,}", justify="right")
        for name, kind, shape, parameters in zip(
            summary.layer_names, summary.layer_types, summary.out_sizes, summary.param_nums,
            strict=True,
        ):  # fmt: skip
            if name.startswith("network.") and not any(True for _ in modules[name].children()):
                layer = name.removeprefix("network.")
                table.add_row(layer, kind, str(shape), f"{parameters:,}")
        if trainer.is_global_zero:
            Console().print(table)
