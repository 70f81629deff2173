"""A whole optimizer step, recorded once as a CUDA graph and replayed for every batch.

A small network's step is a hundred kernels of a few microseconds. Launched one by one they keep the
CPU busier than the GPU; a replay launches all of them at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS_A_CALL = 32  # of `training_step`: makes Lightning's bookkeeping small beside the steps
WARM_UP = 3  # steps before the recording, in which libraries choose kernels and take memory

# Modules whose forward pass is the same kernels every time: no decision is made on the CPU, which a
# recording would keep for ever.
PURE = ("torch.nn.", "torchvision.models.", "torchvision.ops.", "networks.", "cifar10.augment.")


class RecordedStep:
    """Runs an optimizer step on a batch: on a GPU as a replay, elsewhere as it is.

    A recording holds kernels and addresses. Learning rates are read from tensors, which are filled
    with what the optimizer's groups say; if anything else in the groups changes, such as the
    momentum that `OneCycleLR` cycles, the step is recorded anew. A batch of another shape than the
    first is not replayed.

    Args:
        step: Computes gradients and updates the parameters, all on the device; takes the tensors of
            a batch.
        optimizer: Makes the update. Its groups keep their numbers; only during a step that is not
            replayed do they hold tensors.
        settings: What else they hold then (`recordable`).

    """

    def __init__(
        self, step: Callable[..., None], optimizer: Optimizer, settings: dict[str, Any]
    ) -> None:
        self.step = step
        self.optimizer = optimizer
        self.settings = settings
        self.graph: torch.cuda.CUDAGraph | None = None
        self.constants: list[dict[str, Any]] = []
        self.rates: list[Tensor] = []
        self.lrs: list[float] = []
        self.warm_ups = 0
        self.inputs: list[Tensor] = []

    def __call__(self, *batch: Tensor) -> None:
        """Run the step on a batch.

        Raises:
            MisconfigurationException: It cannot be recorded.

        """
        if not batch[0].is_cuda:
            self.step(*batch)
            return
        self._follow_groups(batch[0].device)
        is_usual = not self.inputs or len(batch[0]) == len(self.inputs[0])
        if self.graph is None and is_usual and self.warm_ups == WARM_UP:
            self._record()
        if self.graph is not None and is_usual:
            for kept, new in zip(self.inputs, batch, strict=True):
                kept.copy_(new)
            self.graph.replay()
            return
        self.inputs = self.inputs or [tensor.clone() for tensor in batch]
        self.warm_ups += is_usual
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), self._tensors_in_groups():
            self.step(*batch)
        main.wait_stream(self.stream)

    def _follow_groups(self, device: torch.device) -> None:
        """Forget the recording if the groups are others; fill the learning rates."""
        groups = self.optimizer.param_groups
        constants = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in groups
        ]
        if constants != self.constants:
            self.constants, self.graph, self.warm_ups = constants, None, 0
            self.rates = [torch.zeros((), device=device) for _ in groups]
            self.lrs = [0.0] * len(groups)
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            for state in self.optimizer.state.values():  # restored by an optimizer on the CPU
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)
        for i, group in enumerate(groups):
            if group["lr"] != self.lrs[i]:
                self.rates[i].fill_(group["lr"])
                self.lrs[i] = group["lr"]

    @contextmanager
    def _tensors_in_groups(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(self.settings, lr=rate)
        try:
            yield
        finally:
            for group, numbers in zip(groups, before, strict=True):
                group.update(numbers)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream), self._tensors_in_groups():
                self.step(*self.inputs)
        except RuntimeError as error:
            raise MisconfigurationException(
                f"model.cuda_graph: this step cannot be recorded ({str(error).splitlines()[0]}): "
                "set --model.cuda_graph false"
            ) from error
        self.graph = graph


def recordable(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what the groups of an optimizer must hold, so that all that changes from step to step
    is on the device; None if nothing is known to make it so."""
    if isinstance(optimizer, torch.optim.SGD):
        return {"fused": True, "foreach": False}  # the others read the learning rate on the CPU
    if "capturable" in optimizer.defaults:
        return {"capturable": True}
    return {} if getattr(optimizer, "is_recordable", False) else None


def why_not(trainer: Trainer, module: LightningModule) -> str:
    """Return why the steps of a training cannot be recorded; nothing if they can, on a GPU."""
    between = ("zero_grad", "backward", "optimizer_step")
    hooks = ("on_after_backward", *(f"on_before_{name}" for name in between))
    watching = _overriding(trainer, hooks)
    if trainer.world_size > 1:
        return "takes one device"
    if trainer.accumulate_grad_batches > 1:
        return "makes a step of every batch, and trainer.accumulate_grad_batches does not"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "knows no trainer.precision that scales the loss: take bf16-mixed"
    if watching:
        return f"leaves nothing for {watching[0]} to do between backward pass and update"
    return ""


def decides_on_cpu(*modules: nn.Module) -> str:
    """Return the name of a module that may decide on the CPU what it computes; nothing if there is
    none."""
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            if not name.startswith(PURE):
                return name
    return ""


def steps_a_call(trainer: Trainer) -> int:
    """Return how many steps `training_step` may make at once: one where anything counts batches or
    looks at the end of each."""
    counts = (
        trainer.limit_train_batches != 1.0
        or trainer.val_check_interval != 1.0
        or trainer.max_steps != -1
        or trainer.min_steps is not None
        or not hasattr(trainer.datamodule, "steps_a_call")  # type: ignore[attr-defined]
        or getattr(trainer.lightning_module, "log_steps", False)
        or _overriding(trainer, ("on_train_batch_start", "on_train_batch_end"))
    )
    return 1 if counts else STEPS_A_CALL


def _overriding(trainer: Trainer, hooks: tuple[str, ...]) -> list[str]:
    """Return the names of callbacks that have one of these hooks, but for those that do nothing in
    them or count images."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        type(callback).__name__
        for callback in callbacks
        if any(is_overridden(hook, callback, Callback) for hook in hooks)
        and not isinstance(callback, ProgressBar)
        and not getattr(callback, "takes_many_steps", False)
        and not (
            isinstance(callback, ModelCheckpoint)
            and not callback._every_n_train_steps
            and callback._train_time_interval is None
        )
    ]
