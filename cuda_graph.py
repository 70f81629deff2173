"""A whole optimizer step, recorded once as a CUDA graph and replayed for every batch.

A small network's step is a hundred kernels of a few microseconds. Launched one by one they keep the
CPU busier than the GPU; a replay launches all of them at once.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS_A_CALL = 32  # of `training_step`: makes Lightning's bookkeeping small beside the steps
WARM_UP = 3  # steps before the recording, in which libraries choose kernels and take memory

# Modules whose forward pass is the same kernels every time: no decision is made on the CPU, which a
# recording would keep for ever.
PURE = ("torch.nn.", "torchvision.models.", "torchvision.ops.", "networks.", "cifar10.augment.")


# Callbacks that change nothing in a step; others may, as pruning does.
HARMLESS = (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    Timer,
    WeightAveraging,
)


class RecordedStep:
    """Runs an optimizer step on a batch: on a GPU as a replay, elsewhere as it is.

    A recording holds kernels and addresses. Learning rates are read from tensors, which are filled
    with what the optimizer's groups say; if anything else in the groups changes, such as the
    momentum that `OneCycleLR` cycles, the step is recorded anew; and so it is after `follow`, if a
    callback has frozen or replaced something. A batch of another shape than the first is not
    replayed.

    Args:
        step: Computes gradients and updates the parameters, all on the device; takes the tensors of
            a batch.
        optimizer: Makes the update. Its groups keep their numbers; only during a step that is not
            replayed do they hold tensors.
        settings: What else they hold then (`recordable`).
        network: What the step trains.

    """

    def __init__(
        self,
        step: Callable[..., None],
        optimizer: Optimizer,
        settings: dict[str, Any],
        network: nn.Module,
    ) -> None:
        self.step = step
        self.network = network
        self.optimizer = optimizer
        self.settings = settings
        self.graph: torch.cuda.CUDAGraph | None = None
        self.constants: list[dict[str, Any]] = []
        self.rates: list[Tensor] = []
        self.lrs: list[float] = []
        self.warm_ups = 0
        self.facts: list[Any] = []
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

    def follow(self) -> None:
        """Forget the recording if network, optimizer or precision are not as they were."""
        if self.graph is not None and facts_of(self.network, self.optimizer) != self.facts:
            self.graph, self.warm_ups, self.inputs = None, 0, []

    def _follow_groups(self, device: torch.device) -> None:
        """Forget the recording if the groups are others; fill the learning rates."""
        groups = self.optimizer.param_groups
        constants = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in groups
        ]
        if constants != self.constants:
            self.constants, self.graph, self.warm_ups, self.inputs = constants, None, 0, []
            self.rates = [torch.zeros((), device=device, dtype=torch.float32) for _ in groups]
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
        self.graph, self.facts = graph, facts_of(self.network, self.optimizer)


def facts_of(network: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Return what a recording takes for granted: addresses, what is trained, each module's mode,
    hooks and numbers, and the precision."""
    tensors = [*network.parameters(), *network.buffers()]
    states = [value for state in optimizer.state.values() for value in state.values()]
    facts: list[Any] = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
    facts += [value.data_ptr() for value in states if isinstance(value, Tensor)]
    for module in network.modules():
        hooks = (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        numbers = (getattr(module, "momentum", None), getattr(module, "p", None))
        facts.append((type(module), module.training, hooks, numbers))
    return [*facts, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]


def recordable(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what the groups of an optimizer must hold, so that all that changes from step to step
    is on the device; None if nothing is known to make it so."""
    if "is_recordable" in vars(type(optimizer)):
        return {}
    is_known = type(optimizer).__module__.startswith("torch.optim.")  # not a class derived from it
    if not is_known or any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        return None
    if isinstance(optimizer, torch.optim.SGD):
        return {"fused": True, "foreach": False}  # the others read the learning rate on the CPU
    return {"capturable": True} if "capturable" in optimizer.defaults else None


def why_not(trainer: Trainer) -> str:
    """Return why the steps of a training cannot be recorded; nothing if they can, on a GPU."""
    between = ("zero_grad", "backward", "optimizer_step")
    hooks = ("on_after_backward", *(f"on_before_{name}" for name in between))
    watching = _overriding(trainer, hooks)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.world_size > 1:
        return "takes one device"
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler | StochasticWeightAveraging):
            return f"makes a step of every batch, and {type(callback).__name__} does not"
    if trainer._detect_anomaly:
        return "leaves nothing for trainer.detect_anomaly to look at"
    if trainer.accumulate_grad_batches > 1:
        return "makes a step of every batch, and trainer.accumulate_grad_batches does not"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "knows no trainer.precision that scales the loss: take bf16-mixed"
    if watching:
        return f"leaves nothing for {watching[0]} to do between backward pass and update"
    return ""


def unknown_callback(trainer: Trainer) -> str:
    """Return the name of a callback that may change what a step does; nothing if there is none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not (isinstance(callback, HARMLESS) or hasattr(callback, "takes_many_steps")):
            return type(callback).__name__
    return ""


def decides_on_cpu(*modules: nn.Module) -> str:
    """Return the name of a module that may decide on the CPU what it computes; nothing if there is
    none."""
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            if not name.startswith(PURE) or part._forward_hooks or part._forward_pre_hooks:
                return name
    return ""


def steps_a_call(trainer: Trainer) -> int:
    """Return how many steps `training_step` may make at once: one where anything counts batches or
    looks at the end of each."""
    counts = (
        not _is_all(trainer.limit_train_batches)
        or not _is_all(trainer.val_check_interval)
        or "SLURM_JOB_ID" in os.environ  # whose signals save at any moment, not between calls
        or trainer.max_steps != -1
        or trainer.min_steps is not None
        or not hasattr(trainer.datamodule, "steps_a_call")  # type: ignore[attr-defined]
        or getattr(trainer.lightning_module, "log_steps", False)
        or _overriding(trainer, ("on_train_batch_start", "on_train_batch_end"))
    )
    return 1 if counts else STEPS_A_CALL


def _is_all(share: Any) -> bool:
    """Whether a share of the batches is all of them; the integer 1 is one batch."""
    return isinstance(share, float) and share == 1.0


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
