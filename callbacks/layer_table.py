"""The network, layer by layer, as the report shows it: at the start of `fit`."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import summarize
from rich.console import Console
from rich.table import Table
from torch import Tensor


class LayerTable(ModelSummary):
    """Prints name, type, output shape for the module's example batch, and parameters of each layer
    of its `network`; Lightning's own summary also lists containers and metrics."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, and leave: every callback costs time in every step."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if c is not self]  # type: ignore[attr-defined]
        summary = summarize(pl_module, max_depth=-1)
        if not trainer.is_global_zero:
            return
        modules = dict(pl_module.named_modules())
        total = sum(p.numel() for p in modules["network"].parameters())
        assert isinstance(pl_module.example_input_array, Tensor)
        batch_size = len(pl_module.example_input_array)
        table = Table("layer", "type", f"output for {batch_size} images", show_footer=True)
        table.add_column("parameters", f"{total:,}", justify="right")
        rows = zip(
            summary.layer_names, summary.layer_types, summary.out_sizes, summary.param_nums,
            strict=True,
        )  # fmt: skip
        for name, kind, shape, parameters in rows:
            is_leaf = not any(True for _ in modules[name].children())
            if name.startswith("network.") and is_leaf:
                name = name.removeprefix("network.")
                table.add_row(name, kind, str(shape), f"{parameters:,}")
        Console().print(table)
