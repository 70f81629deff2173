"""A whole optimizer step, recorded once as a CUDA graph and replayed for every batch.

A small network's step is a hundred kernels of a few microseconds each. Launching them one by one
keeps the CPU busier than the GPU; a replay launches all of them at once.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar10.batches import Batch, Batches

STEPS_A_CALL = 32  # of `training_step`: amortises Lightning's bookkeeping
WARM_UP = 3  # steps before recording, in which libraries choose kernels and allocate memory

# Modules whose forward pass always launches the same kernels. They decide nothing on the CPU, which
# a recording would freeze.
PURE = ("torch.nn.", "torchvision.models.", "torchvision.ops.", "networks.", "cifar10.augment.")

# Callbacks that change nothing a recording holds, and look at nothing within a step. Others declare
# this with an attribute `takes_many_steps`: True if they may see the batches of a call as one.
HARMLESS = (
    callbacks.DeviceStatsMonitor,
    callbacks.EarlyStopping,
    callbacks.LearningRateMonitor,
    callbacks.ModelCheckpoint,
    callbacks.ModelSummary,
    callbacks.ProgressBar,
    callbacks.Timer,
    callbacks.WeightAveraging,
)
BETWEEN = (  # hooks around the backward pass and the update
    "on_after_backward", "on_before_zero_grad", "on_before_backward", "on_before_optimizer_step",
)  # fmt: skip


class RecordableModule(LightningModule):
    """A module whose `training_step` may make many optimizer steps in one call, each recorded.

    Lightning counts such a call as one step. The overridden hooks keep it from making steps itself;
    `many_steps` counts the others. Epoch schedules, checkpoints and validation work as usual.
    Subclasses have `step_loss`, `images_of_step`, `network`, `proxy`, `augment` and
    `train_metrics`.

    Args:
        cuda_graph: `auto`: record on one GPU if every part of a step is known to allow it. True:
            also with unknown modules; raise if anything else prevents it. On a CPU the calls are
            the same, without a recording.

    """

    step_loss: Callable[..., tuple[Tensor, Tensor]]
    images_of_step: Callable[[int], int]
    network: nn.Module
    proxy: nn.Module | None
    augment: Any
    train_metrics: Any
    compile_mode: Any = "off"

    def __init__(self, cuda_graph: bool | Literal["auto"] = "auto") -> None:
        super().__init__()
        self.cuda_graph = cuda_graph
        self.steps_a_call = 0  # 0: Lightning makes the steps
        self.steps_inside_call = 0  # done in the current call
        self.inside_epoch_by: tuple[int, int] | None = None  # from a mid-epoch checkpoint

    def choose_steps(self, optimizer: Optimizer) -> None:
        """Decide who makes the steps: Lightning, one by one, or `many_steps`."""
        self.steps_a_call = 0
        if self.cuda_graph is True or (self.cuda_graph == "auto" and self.device.type == "cuda"):
            reason = self._why_not_recorded(optimizer)
            if reason and self.cuda_graph is True:
                raise MisconfigurationException(f"model.cuda_graph {reason}")
            if not reason:
                self.steps_a_call = steps_a_call(self.trainer)
                settings = recordable(optimizer) or {}
                self.recorded = RecordedStep(self._optimize, optimizer, settings)
                # Loss and correct predictions, summed over the images of a call.
                self.sums = torch.zeros(2, device=self.device, dtype=torch.float32)
        if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
            datamodule.steps_a_call = max(1, self.steps_a_call)
        if self.inside_epoch_by not in (None, self._counting()):
            raise MisconfigurationException(
                "the checkpoint was saved mid-epoch by a run that counted batches differently: "
                "resume with its batch size, device and callbacks, or from the end of an epoch"
            )

    def _why_not_recorded(self, optimizer: Optimizer) -> str:
        """Return why this training's steps can't be recorded; an empty string if they can."""
        if "step_loss" not in vars(type(self)):  # a subclass's training step may differ
            return f"supports only ImageClassifier itself, not {type(self).__name__}"
        if self.compile_mode in ("reduce-overhead", "max-autotune"):
            return f"and model.compile {self.compile_mode} both record CUDA graphs: use only one"
        if recordable(optimizer) is None:
            return f"does not know how to record {type(optimizer).__name__}"
        reason = why_not(self.trainer)
        if reason or self.cuda_graph is True:
            return reason
        return decides_on_cpu(*filter(None, (self.network, self.proxy, self.augment)))

    def many_steps(self, chunk: Batch) -> Tensor:
        """Make one step for each batch in a chunk; return their mean loss []."""
        self.sums.zero_()
        loader = self.trainer.train_dataloader
        size = loader.step_size if isinstance(loader, Batches) else len(chunk.labels)
        batches = list(zip(*(torch.split(tensor, size) for tensor in chunk), strict=True))
        for number, batch in enumerate(batches):
            self.steps_inside_call = number
            if number:
                for config in self.trainer.lr_scheduler_configs:
                    if config.interval == "step":
                        self.lr_scheduler_step(config.scheduler, None)
            self.recorded(*batch)
        self.steps_inside_call = 0
        loop, extra_steps = self.trainer.fit_loop.epoch_loop, len(batches) - 1
        loop._batches_that_stepped += extra_steps  # the loggers' step
        for steps in vars(loop.automatic_optimization.optim_progress.optimizer.step).values():
            steps.increment_by(extra_steps)
        loss, correct = self.sums.unbind()
        images = sum(self.images_of_step(len(batch[0])) for batch in batches)
        loss = loss / images
        self.train_metrics.update(loss, correct.long(), images)
        return loss

    def _optimize(self, *batch: Tensor) -> None:
        """Make one step on the device and add up its loss. This is recorded."""
        optimizer, trainer = self.trainer.optimizers[0], self.trainer
        torch.clear_autocast_cache()  # it holds casts of outdated weights
        optimizer.zero_grad()
        loss, correct = self.step_loss(*batch)
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
            self.configure_gradient_clipping(
                optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
            optimizer.step()
            self.sums[0] += loss.detach() * self.images_of_step(len(batch[0]))
            self.sums[1] += correct

    def steps_an_epoch(self) -> int:
        """Return the number of optimizer steps per epoch."""
        trainer, batches = self.trainer, self.trainer.train_dataloader
        if self.steps_a_call > 1 and isinstance(batches, Batches):
            return batches.steps
        return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def is_at_end(self) -> bool:
        """Return whether all batches of an epoch are done but the epoch isn't counted yet, as in
        checkpoints saved by the validation at its end."""
        return self._is_inside() and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    def _is_inside(self) -> bool:
        return self.trainer.fit_loop.epoch_progress.current.ready > self.current_epoch

    def steps_into_epoch(self) -> int:
        """Return the number of optimizer steps done in an epoch that isn't counted yet."""
        if self.is_at_end():
            return self.steps_an_epoch()
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        calls = progress.current.ready if self._is_inside() else 0
        return calls * max(self.steps_a_call, 1) // self.trainer.accumulate_grad_batches

    def steps_of_training(self) -> float:
        """Return the number of optimizer steps of the whole training; infinity if it has no end."""
        steps = self.trainer.estimated_stepping_batches  # sets up the data loader if needed
        epochs = self.trainer.max_epochs or 0
        return self.steps_an_epoch() * epochs if self.steps_a_call > 1 and epochs > 0 else steps

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, unless `many_steps` has."""
        if not self.steps_a_call:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless `many_steps` has."""
        if not self.steps_a_call:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Call `training_step` and update the weights, unless `many_steps` has."""
        if self.steps_a_call:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def _counting(self) -> tuple[int, int]:
        """Return how an epoch's batches are counted: steps per call, batch size."""
        data = getattr(self.trainer, "datamodule", None) if self._trainer else None
        # A checkpoint can't hold the parser's number types.
        return max(1, self.steps_a_call), int(getattr(data, "batch_size", 0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how batches are counted; raise in the middle of a call."""
        if self.steps_inside_call:
            raise MisconfigurationException(
                "cannot save within a training_step call: resume from an earlier checkpoint"
            )
        checkpoint["steps_a_call"], checkpoint["batch_size"] = self._counting()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how batches were counted if the checkpoint is from mid-epoch."""
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        epochs = loops.get("epoch_progress", {"current": {"processed": 0, "started": 0}})["current"]
        if epochs["processed"] < epochs["started"]:
            size = checkpoint.get("batch_size", self._counting()[1])
            self.inside_epoch_by = checkpoint.get("steps_a_call", 1), size


class RecordedStep:
    """Runs an optimizer step on a batch: replayed on a GPU, directly elsewhere.

    A recording holds kernels and addresses. It reads learning rates from tensors, which are filled
    from the optimizer's groups. If anything else in the groups changes, such as the momentum that
    `OneCycleLR` cycles, the step is recorded again. A batch of another size than the first is not
    replayed. If anything else changes between steps, e.g. a parameter is replaced or frozen, call
    `forget`.

    Args:
        step: Computes gradients and updates the parameters, all on the device; takes a batch's
            tensors.
        optimizer: Makes the update. Its groups hold numbers, and tensors only during a step that is
            not replayed.
        settings: Further entries of the groups during such a step (`recordable`).

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
            MisconfigurationException: The step can't be recorded.

        """
        if not batch[0].is_cuda:
            self.step(*batch)
            return
        self._follow_groups(batch[0].device)
        is_usual = not self.inputs or len(batch[0]) == len(self.inputs[0])
        if self.graph is None and is_usual and self.warm_ups == WARM_UP:
            self._record()
        if self.graph is not None and is_usual:
            for buffer, tensor in zip(self.inputs, batch, strict=True):
                buffer.copy_(tensor)
            self.graph.replay()
            return
        self.inputs = self.inputs or [tensor.clone() for tensor in batch]
        self.warm_ups += is_usual
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream), self._tensors_in_groups():
            self.step(*batch)
        main.wait_stream(self.stream)

    def forget(self) -> None:
        """Drop the recording because the step has changed; the next steps make a new one."""
        self.constants = []

    def _follow_groups(self, device: torch.device) -> None:
        """Drop the recording if the groups have changed; update the learning rates."""
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
            for state in self.optimizer.state.values():  # on the CPU after a resume
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(device)
        for i, group in enumerate(groups):
            if group["lr"] != self.lrs[i]:
                self.rates[i].fill_(group["lr"])
                self.lrs[i] = group["lr"]

    @contextmanager
    def _tensors_in_groups(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        saved = [dict(group) for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(self.settings, lr=rate)
        try:
            yield
        finally:
            for group, numbers in zip(groups, saved, strict=True):
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
    """Return the options an optimizer's groups need to keep everything that changes between steps
    on the device; None if no such options are known."""
    if "is_recordable" in vars(type(optimizer)):
        return {}
    is_known = type(optimizer).__module__.startswith("torch.optim.")  # no subclass of one
    if not is_known or any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        return None
    if isinstance(optimizer, torch.optim.SGD):
        return {"fused": True, "foreach": False}  # the others read lr on the CPU
    return {"capturable": True} if "capturable" in optimizer.defaults else None


def why_not(trainer: Trainer) -> str:
    """Return why a trainer's steps can't be recorded on a GPU; an empty string if they can."""
    scales_loss = getattr(trainer.precision_plugin, "scaler", None) is not None
    unknown = [
        type(callback).__name__
        for callback in _callbacks(trainer)
        if not (isinstance(callback, HARMLESS) or hasattr(callback, "takes_many_steps"))
        or any(is_overridden(hook, callback, Callback) for hook in BETWEEN)
    ]
    reasons = {
        "supports a single device only": trainer.world_size > 1,
        "makes a step for every batch, so trainer.accumulate_grad_batches must be 1": (
            trainer.accumulate_grad_batches > 1
        ),
        "does not support trainer.detect_anomaly: it skips replayed steps": trainer._detect_anomaly,
        "does not support a trainer.precision that scales the loss: use bf16-mixed": scales_loss,
        f"does not know what {', '.join(unknown)} may do within a step": unknown,
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def decides_on_cpu(*modules: nn.Module) -> str:
    """Return the name of a module that may make decisions on the CPU; otherwise an empty string."""
    for module in modules:
        for part in module.modules():
            name = f"{type(part).__module__}.{type(part).__qualname__}"
            if not name.startswith(PURE) or part._forward_hooks or part._forward_pre_hooks:
                return name
    return ""


def steps_a_call(trainer: Trainer) -> int:
    """Return how many steps a `training_step` call may make: one if anything counts batches or acts
    on each."""
    shares = (trainer.limit_train_batches, trainer.val_check_interval)
    needs_single_steps = (
        any(share != 1.0 or isinstance(share, int) for share in shares)  # 1 is one batch, 1.0 all
        or "SLURM_JOB_ID" in os.environ  # its signals may save within a call
        or trainer.max_steps != -1
        or trainer.min_steps is not None
        or not hasattr(trainer.datamodule, "steps_a_call")  # type: ignore[attr-defined]
        or getattr(trainer.lightning_module, "log_steps", False)
        or any(_watches_batches(callback) for callback in _callbacks(trainer))
    )
    return 1 if needs_single_steps else STEPS_A_CALL


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _watches_batches(callback: Callback) -> bool:
    """Return whether a callback acts at the start or end of each batch."""
    if isinstance(callback, callbacks.ModelCheckpoint):
        return bool(callback._every_n_train_steps or callback._train_time_interval)
    if isinstance(callback, callbacks.LearningRateMonitor):
        return callback.logging_interval != "epoch"
    if isinstance(callback, callbacks.ProgressBar) or getattr(callback, "takes_many_steps", False):
        return False
    hooks = ("on_train_batch_start", "on_train_batch_end")
    return any(is_overridden(hook, callback, Callback) for hook in hooks)
