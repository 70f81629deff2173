"""The model and its training step: network, loss, optimizer, metrics."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, OneCycleLR, ReduceLROnPlateau
from torchmetrics import Metric

from calibration import Calibration
from cifar10.archive import CLASSES
from cifar10.augment import (
    MEAN,
    STD,
    Augment,
    GrowingResize,
    TestTimeAugmentation,
    average_over_views,
)
from cifar10.batches import Batch, Batches
from cuda_graph import RecordableModule
from networks import has_large_stem
from runs import natural_mode, read_checkpoint, read_weights

CompileMode = Literal[
    "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]
FINDERS = (BatchSizeFinder, LearningRateFinder)
INIT_IMAGES = 5000  # training images for a network's `init_from`


class Diverged(MisconfigurationException):
    """The loss or a weight is NaN or infinite."""


class ImageClassifier(RecordableModule):
    """Trains a network on images with cross entropy.

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc` once per
    epoch: means over the images, accuracy as a fraction.

    Args:
        network: Maps normalised float images [B, 3, 32, 32] to logits [B, classes].
        optimizer: Creates the optimizer from the parameters.
        lr_scheduler: Creates the scheduler from the optimizer: one from `optimization`, which
            follows training progress, or one of PyTorch's.
        lr_interval: Step the scheduler after every `step` or `epoch`. `auto`: by step for those
            from `optimization`, `OneCycleLR` and `CyclicLR`, by epoch for others.
        normalize: Subtract a mean from images in [0, 1] and divide by a standard deviation, in
            training and evaluation: `cifar10` for the statistics of its training images, or
            {mean: [r, g, b], std: [r, g, b]}.
        label_smoothing: Share of each training target, in [0, 1], to spread evenly over all
            classes.
        classes: Class names, by label; the command line takes them from the images.
        class_weights: Class weights, above 0, in the training loss: the sum of a batch's weighted
            losses is divided by the sum of their weights, as in PyTorch's `CrossEntropyLoss`.
        weights: Start from the weights in this file: a checkpoint, or a network's weights alone,
            as in `model.pth`. Weights of other shapes are listed and skipped.
        decay_matrices_only: Exclude vectors (biases, normalisation scales) from the optimizer's
            weight decay.
        softmax_before_loss: Apply softmax to the logits before the loss, which applies its own: the
            mistake in the report's code, kept to measure its cost.
        compile: Compile the training step, from pixels to loss, with `torch.compile` in this mode;
            true means `default`. On a GPU, `reduce-overhead` and `max-autotune` use CUDA graphs.
        cuda_graph: Record a training step, from pixels to new weights, as a CUDA graph and replay
            it, many steps per `training_step` call. `auto`: on one GPU, if every part of the step
            is known to allow it. True: also with unknown modules, which must decide nothing on the
            CPU; raise if a step can't be recorded.
        log_steps: Also log `train/loss_step`, every `trainer.log_every_n_steps` steps.
        tta: Test-time augmentation in `validate`, `test` and `predict`, but not during `fit`: the
            views of an image whose logits are averaged; `mirror` has two, `mirror-shift` six.
        calibrate: `auto`: divide logits by a temperature to compute probabilities. Each validation
            during `fit` fits one, and checkpoints of the same weights save it. False: use the
            logits as they are. A checkpoint file: use its temperature, for a model without a
            validation set. Predicted classes don't change. A threshold is saved with it: the
            largest probability of one validation image in twenty is below, and such predictions are
            "not sure".
        proxy: A small network that sees each batch first and picks the images to train on, those
            with its largest losses (Jordan's `airbench96_faster.py`). It trains on them too, with
            the same optimizer, where its parameter names start with `proxy.`, and is unused after
            training. Training loss and accuracy cover only the images picked. With several devices,
            each picks from its share of the batch. Gradients are clipped by the joint norm of both
            networks.
        hardest: Share of a batch that `proxy` picks, in (0, 1]; half by default.

    Raises:
        MisconfigurationException: The network does not map [B, 3, 32, 32] to [B, classes].

    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None
    compiled_for: int  # batch size
    counted: int  # index of the last batch counted in the metrics

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["auto", "step", "epoch"] = "auto",
        normalize: Literal["cifar10"] | dict[str, list[float]] | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        classes: list[str] | None = None,
        class_weights: list[float] | None = None,
        weights: str | None = None,
        decay_matrices_only: bool = False,
        softmax_before_loss: bool = False,
        compile: CompileMode | bool = "off",
        cuda_graph: bool | Literal["auto"] = "auto",
        log_steps: bool = False,
        tta: TestTimeAugmentation = "none",
        calibrate: bool | str = "auto",
        proxy: nn.Module | None = None,
        hardest: ClosedUnitInterval | None = None,
    ) -> None:
        super().__init__(cuda_graph)
        ignored = ["network", "proxy", "optimizer", "lr_scheduler"]
        # For use from Python; the command line also saves how to build the ignored ones.
        self.save_hyperparameters(ignore=ignored, logger=False)
        self.network = network
        self.proxy = proxy
        self.hardest = 0.5 if hardest is None else hardest
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.softmax_before_loss = softmax_before_loss
        if isinstance(compile, bool):  # YAML reads `off` as false
            compile = "default" if compile else "off"
        self.compile_mode = compile
        self.log_steps = log_steps
        self.lr: float | None = None  # found by Lightning's LearningRateFinder
        self.frozen: list[nn.Parameter] = []  # by `_freeze`
        self.label_smoothing = label_smoothing
        loss_weights = None if class_weights is None else torch.tensor(class_weights).float()
        self.classes = CLASSES if classes is None else tuple(classes)
        count = len(self.classes)
        if loss_weights is not None and not (len(loss_weights) == count and min(loss_weights) > 0):
            raise MisconfigurationException(
                f"model.class_weights {class_weights}: expected {count} numbers above 0"
            )
        self.register_buffer("class_weights", loss_weights, persistent=False)
        self.is_new = True  # its networks may still run `init_from`
        self.starts_from = weights
        self.decay_matrices_only = decay_matrices_only
        self.tta = self.views = tta
        self.calibrates = bool(calibrate)
        self.calibration = Calibration(calibrate)
        for name, values in _normalization(normalize).items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.is_normalizing = normalize is not None
        self.augment = Augment()
        self.train_metrics = Means()
        self.val_metrics = Means()
        self.test_metrics = Means()
        if not self.hardest > 0 or (hardest is not None and proxy is None):
            raise MisconfigurationException(
                f"model.hardest {hardest}: needs model.proxy and must be above 0"
            )
        self._check_networks()
        if weights is not None:
            _start_from(read_weights(weights), network)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32] in [0, 1] to logits [B, classes].

        Raises:
            TypeError: The images are integers.
        """
        if not images.is_floating_point():
            raise TypeError("expected float images in [0, 1]: divide pixels by 255")
        return self.network(self.normalized(images))

    def normalized(self, images: Tensor) -> Tensor:
        """Normalise float images [B, 3, 32, 32] in [0, 1], if `normalize` is set."""
        return (images - self.mean) / self.std if self.is_normalizing else images

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return a batch's mean loss []; log the epoch's metrics after its last batch."""
        is_repeated = self.counted == batch_idx  # LBFGS evaluates a batch several times
        self.counted = batch_idx
        if self.steps_a_call:
            loss = self.many_steps(batch)  # also updates the weights
        else:
            loss, correct = self.step_loss(*batch)
            if not is_repeated:
                images = self.images_of_step(len(batch.labels))
                self.train_metrics.update(loss.detach(), correct, images)
        if self.log_steps:
            self.log("train/loss_step", loss, batch_size=len(batch.labels))
        if self.trainer.is_last_batch and not is_repeated:
            self._log_epoch("train", self.train_metrics)
        loader = self.trainer.train_dataloader
        if self.trainer.world_size > 1 and isinstance(loader, Batches):
            loss = loss * loader.weight(batch_idx)
        return loss

    def step_loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss [] and the number of correct predictions int64 [] of a batch: pixels
        uint8 [B, 3, 32, 32], labels and indices int64 [B]."""
        size = len(batch[0])
        self.compiled_for = self.compiled_for or size
        # A short last batch isn't worth its own compilation.
        return (self.compiled_loss if size == self.compiled_for else self._loss)(*batch)

    def _loss(self, pixels: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = self.augment(pixels, labels, indices)
        images = self.normalized(images)
        proxy_loss = None
        if self.proxy is not None:
            logits = self.proxy(images)
            losses = self._cross_entropy(logits.detach(), targets, reduction="none")
            hardest = losses.topk(self.images_of_step(len(losses))).indices
            images, targets = images[hardest], targets[hardest]
            proxy_loss = self._cross_entropy(logits[hardest], targets)
        logits = self.network(images)
        loss = self._cross_entropy(logits, targets)
        if proxy_loss is not None:  # adds only its gradient
            loss = loss + (proxy_loss - proxy_loss.detach())
        labels = targets.argmax(dim=1) if targets.ndim > 1 else targets  # the larger if mixed
        return loss, (logits.argmax(dim=1) == labels).sum()

    def _cross_entropy(self, logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Return the training loss, [] or [B], for labels int64 [B] or class probabilities
        [B, classes]."""
        weights = None if self.class_weights is None else self.class_weights.float()
        smoothing, scores = self.label_smoothing, self._scores(logits)
        return F.cross_entropy(
            scores, targets, weights, reduction=reduction, label_smoothing=smoothing
        )

    def _scores(self, logits: Tensor) -> Tensor:
        """Return the loss's input, float32 even if the weights have 16 bits."""
        return logits.float().softmax(dim=1) if self.softmax_before_loss else logits.float()

    def images_of_step(self, size: int) -> int:
        """Return how many images of a batch are trained on."""
        return size if self.proxy is None else max(1, round(size * self.hardest))

    def _logits(self, pixels: Tensor) -> Tensor:
        return average_over_views(self.forward, pixels / 255, self.views)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits [B, classes] of a batch of the validation set, or of the test set for
        its curve; update the metrics."""
        logits = self._evaluate(batch, self.test_metrics if dataloader_idx else self.val_metrics)
        if not dataloader_idx:
            self.calibration.add(logits, batch.labels, batch.indices)
        return logits

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits [B, classes] of a batch of a test set; update the metrics."""
        return self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Batch, metrics: "Means") -> Tensor:
        if not len(batch.labels):  # a rank whose share of the batch is empty
            return torch.zeros(0, len(self.classes), device=batch.labels.device)
        logits = self._logits(batch.images)
        loss = F.cross_entropy(self._scores(logits), batch.labels)
        metrics.update(loss, (logits.argmax(dim=1) == batch.labels).sum(), len(batch.labels))
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities [B, classes]."""
        if not len(batch.images):  # no file in this batch could be read
            return torch.zeros(0, len(self.classes))
        return self.probabilities(batch.images)

    def probabilities(self, pixels: Tensor) -> Tensor:
        """Map pixels uint8 [B, 3, 32, 32] to probabilities float32 [B, classes], with test-time
        augmentation; calibrated if `calibrate` is not false and a temperature is known."""
        logits = self._logits(pixels).float()
        return (logits / (self.temperature or 1.0)).softmax(dim=1)

    @property
    def temperature(self) -> float | None:
        """The temperature that logits are divided by, or None."""
        return self.calibration.temperature if self.calibrates else None

    # ------------------------------------------------------------------ optimizer and schedule

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and a scheduler if there is one; errors name the bad argument."""
        self._unfreeze()  # after a fit that failed
        named = [*self.network.named_parameters()]
        named += [] if self.proxy is None else self.proxy.named_parameters("proxy")
        named = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        parameters: Any = Parameters(p for _, p in named)
        parameters.named = named
        if self.decay_matrices_only:
            vectors = [p for p in parameters if p.ndim < 2]
            matrices = {"params": [p for p in parameters if p.ndim >= 2]}
            parameters = [matrices, {"params": vectors, "weight_decay": 0.0}]
        with _refused("model.optimizer"):
            optimizer = self.make_optimizer(parameters)
            decays = [group.get("weight_decay") for group in optimizer.param_groups]
            if self.decay_matrices_only and not any(decays):
                raise ValueError("model.decay_matrices_only needs an optimizer with weight_decay")
            accumulates = self.trainer.accumulate_grad_batches > 1
            accumulates |= self._has(GradientAccumulationScheduler)
            if isinstance(optimizer, LBFGS) and accumulates:
                raise ValueError(
                    "LBFGS evaluates each batch several times, so accumulation would add up all of "
                    "these gradients: turn gradient accumulation off"
                )
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        self.choose_steps(optimizer)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self._scheduler(self.make_lr_scheduler, optimizer)
        has_progress = hasattr(scheduler, "set_progress")
        has_own_rates = isinstance(scheduler, OneCycleLR | CyclicLR)
        default = "step" if has_progress or has_own_rates else "epoch"
        monitor = _monitor(scheduler)
        # A validation metric changes only when validation runs.
        waits = isinstance(scheduler, ReduceLROnPlateau) and not monitor.startswith("train/")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": default if self.lr_interval == "auto" else self.lr_interval,
                "monitor": monitor,
                "frequency": (self.trainer.check_val_every_n_epoch or 1) if waits else 1,
            },
        }

    def _scheduler(self, make: Any, optimizer: Optimizer) -> Any:
        has_fixed_steps = not self._has(GradientAccumulationScheduler)
        self.total_steps = total = self.steps_of_training() if has_fixed_steps else math.inf
        keywords = make.keywords if isinstance(make, partial) else {}
        with _refused("model.lr_scheduler"):
            needs_steps = keywords.get("total_steps", 0) is None and keywords.get("epochs") is None
            if needs_steps and total < math.inf:  # OneCycleLR, which raises without an end
                make = partial(make, total_steps=total)
            scheduler: Any = make(optimizer)
            if hasattr(scheduler, "set_progress") and total == math.inf:
                raise ValueError(
                    "the schedule needs to know when training ends: set trainer.max_epochs or "
                    "max_steps, and use trainer.accumulate_grad_batches instead of "
                    "GradientAccumulationScheduler"
                )
            if getattr(scheduler, "total_steps", total) < total < math.inf:
                raise ValueError(
                    f"a schedule over {scheduler.total_steps} steps ends before the training, "
                    f"which takes {total}"
                )
            duration = total
            if self.lr_interval != "step" and self.trainer.num_training_batches < math.inf:
                duration = total / self.steps_an_epoch()
            if isinstance(scheduler, CosineAnnealingLR) and scheduler.T_max < duration < math.inf:
                rank_zero_only(print)(
                    f"model.lr_scheduler: the learning rate rises again after T_max "
                    f"{scheduler.T_max} of {math.ceil(duration)}"
                )
            if isinstance(scheduler, OneCycleLR | CyclicLR) and any(map(self._has, FINDERS)):
                raise ValueError(
                    f"{type(scheduler).__name__} sets its own learning rates: remove "
                    "LearningRateFinder and BatchSizeFinder"
                )
            if isinstance(scheduler, ReduceLROnPlateau):
                if self.lr_interval == "step":
                    raise ValueError("ReduceLROnPlateau needs model.lr_interval epoch")
                monitor = _monitor(scheduler)
                natural = natural_mode(monitor)
                if natural not in (None, scheduler.mode):
                    raise ValueError(
                        f"mode {scheduler.mode} treats the worst {monitor} as the best; to "
                        "monitor another metric, use lightning.pytorch.cli.ReduceLROnPlateau"
                    )
        return scheduler

    def _has(self, callback: type[Callback]) -> bool:
        return any(isinstance(c, callback) for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Pass training progress to a schedule from `optimization`; leave others to Lightning."""
        if not hasattr(scheduler, "set_progress"):
            super().lr_scheduler_step(scheduler, metric)
            return
        step = self.trainer.global_step + self.steps_inside_call + self.step_offset
        scheduler.set_progress(step / self.total_steps)
        self._freeze(step / self.total_steps)

    def _freeze(self, progress: float) -> None:
        """Stop computing gradients for optimizer groups whose `until` has passed, except under DDP,
        which would wait for them, and in a compiled step, which would be recompiled."""
        strategy = self.trainer.strategy
        if self.compile_mode != "off" or not isinstance(strategy, SingleDeviceStrategy):
            return
        for group in self.trainer.optimizers[0].param_groups:
            is_over = progress >= group.get("until", 1.0) < 1
            for parameter in group["params"] if is_over else ():
                if parameter.requires_grad:
                    self.frozen.append(parameter.requires_grad_(False))
                    if self.steps_a_call:
                        self.recorded.forget()

    def _unfreeze(self) -> None:
        while self.frozen:
            self.frozen.pop().requires_grad_(True)

    def _restart_schedules(self) -> None:
        """Set the learning rates of a resumed run by the share of epochs done: epochs may now have
        another number of steps, or the optimizer may be new."""
        trainer = self.trainer
        # With max_steps, or a varying number of batches per step, global_step itself counts.
        if trainer.max_steps == -1 and not self._has(GradientAccumulationScheduler):
            steps = self.current_epoch * self.steps_an_epoch() + self.steps_into_epoch()
            self.step_offset = steps - trainer.global_step
        self.resumed_at_end = self.is_at_end()
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if config.reduce_on_plateau:
                if (metric := scheduler.__dict__.pop("pending", None)) is not None:
                    scheduler.step(metric)
                continue
            if hasattr(scheduler, "set_progress"):
                self.lr_scheduler_step(scheduler, None)
                continue
            is_by_epoch = config.interval == "epoch"
            epochs = self.current_epoch + self.resumed_at_end  # each stepped them once
            steps = epochs if is_by_epoch else trainer.global_step + self.step_offset
            if isinstance(scheduler, OneCycleLR | CyclicLR):  # functions of the step
                scheduler.last_epoch = steps - 1
            for _ in range(steps - scheduler.last_epoch):
                scheduler.step()

    # ---------------------------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Take the augmentation from the data module and prepare the training step. Initialise new
        networks that have `init_from` from training images."""
        self.views = "none" if stage == "fit" else self.tta
        data = getattr(self.trainer, "datamodule", None)
        self.augment = getattr(data, "augmentation", self.augment)
        if stage != "fit":
            return
        self.seed = self.trainer.strategy.broadcast(torch.initial_seed())
        self.step_offset = 0  # schedule step minus global step
        self.resumed_at_end = False  # of an epoch
        # Otherwise cuDNN sums some gradients in a different order on each run.
        torch.backends.cudnn.deterministic = True
        has_graphs = self.compile_mode in ("reduce-overhead", "max-autotune")
        is_cuda = self.trainer.strategy.root_device.type == "cuda"
        if has_graphs and is_cuda and self.trainer.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                f"model.compile {self.compile_mode} uses CUDA graphs, which overwrite gradients "
                "that trainer.accumulate_grad_batches keeps: use --model.compile default"
            )
        self.compiled_loss, self.compiled_for = self._loss, 0
        if self.compile_mode != "off":
            self.compiled_loss = torch.compile(self._loss, mode=self.compile_mode, dynamic=False)
        if has_large_stem(self.network):
            rank_zero_only(print)(
                "model.network: its first layers reduce 32 x 32 images to 8 x 8; "
                "networks.library_network builds ResNets for small images"
            )
        if self.class_weights is not None and self.trainer.world_size > 1:
            raise MisconfigurationException("model.class_weights supports a single device only")
        for network in (None if self.starts_from else self.network, self.proxy):
            if data is not None and self.is_new and hasattr(network, "init_from"):
                pixels = data.train_set.images[data.train_set.indices[:INIT_IMAGES]]
                with torch.no_grad():
                    network.init_from(self.to(pixels.device).normalized(pixels / 255))  # type: ignore[union-attr, operator]
        self.is_new = False  # for a second fit from Python
        resizes = [step for step in self.augment.growing if isinstance(step, GrowingResize)]
        for size in {size for step in resizes for size in step.sizes}:
            self._check_networks(size)
        if resizes and self._has(BatchSizeFinder):
            raise MisconfigurationException(
                "BatchSizeFinder would only see GrowingResize's smallest images: remove either"
            )
        if self.class_weights is not None and any(self.augment.mixes):
            raise MisconfigurationException("model.class_weights needs labels that are not mixed")

    def _check_networks(self, size: int = 32) -> None:
        _check("model.network", self.network, size, len(self.classes))
        if self.proxy is not None:
            _check("model.proxy", self.proxy, size, len(self.classes))

    def on_train_start(self) -> None:
        """Restart schedules. Start the epoch: Lightning doesn't when it resumes mid-epoch."""
        if self.trainer.global_step > 0:
            self._restart_schedules()
        elif self.lr is not None or self._has(BatchSizeFinder):
            # Schedules must start at the learning rate found, and end with the batch size found.
            self.trainer.strategy.setup_optimizers(self.trainer)
            if self.lr is not None and self.trainer.is_global_zero:
                print(f"LearningRateFinder: learning rate {self.lr:.3g}")
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Seed dropout and augmentation with (seed, epoch, rank), so that a resumed run draws the
        same numbers as an uninterrupted one."""
        entropy = (self.seed, self.current_epoch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        progress = 0.0
        if self.augment.growing:
            if (total := self.steps_of_training()) == math.inf:
                raise MisconfigurationException(
                    "data.augment needs to know when training ends: set trainer.max_epochs"
                )
            progress = self.current_epoch * self.steps_an_epoch() / total
        if self.augment.begin_epoch(self.current_epoch, progress) and self.steps_a_call:
            self.recorded.forget()
        self.train_metrics.reset()
        self.counted = -1

    def on_train_epoch_end(self) -> None:
        """Step ReduceLROnPlateau if the epoch was resumed midway; Lightning doesn't."""
        loop = self.trainer.fit_loop
        is_whole = loop.epoch_loop._num_ready_batches_reached()
        if loop.restarting and is_whole and not self.resumed_at_end:
            loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)

    def on_validation_epoch_start(self) -> None:
        """During `fit`, collect predictions to fit the temperature on."""
        is_training = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        self.calibration.begin(self.state_dict() if is_training else None)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the evaluated sets; fit the temperature."""
        for stage, metrics in (("val", self.val_metrics), ("test", self.test_metrics)):
            if metrics.update_called:
                self._log_epoch(stage, metrics)
        self.calibration.end()

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def _log_epoch(self, stage: str, metrics: "Means") -> None:
        """Log the means of an epoch, over all ranks, and reset them."""
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        if self.trainer.state.fn == "fit" and stage != "test":
            self._refuse_divergence(f"{stage}/loss", values[f"{stage}/loss"])
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)  # one value per epoch
        metrics.reset()

    def _refuse_divergence(self, what: str, *values: Tensor) -> None:
        if torch.stack([value.isfinite().all() for value in values]).all():
            return
        groups = self.trainer.optimizers[0].param_groups
        rates = ", ".join(f"{group.get('initial_lr', group['lr']):.3g}" for group in groups)
        precision = self.trainer.precision
        hint = f" and trainer.precision {precision}: try bf16-mixed"
        raise Diverged(
            f"training diverged in epoch {self.current_epoch}, step {self.trainer.global_step}: "
            f"{what} is NaN or infinite, at learning rate {rates}"
            + (hint if precision == "16-true" else "")
        )

    def on_train_end(self) -> None:
        """Raise `Diverged` if a weight is NaN or infinite; drop the temperature if it belongs to
        earlier weights."""
        self._unfreeze()
        self._refuse_divergence("a weight", *self.network.parameters())
        self.calibration.temperature = self.calibration.temperature_of(self.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the temperature of these weights, and the metric that `ReduceLROnPlateau` will see
        next. Raise `Diverged` if the training loss or a weight is NaN or infinite."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["found_lr"] = self.lr
        self.calibration.save(checkpoint)
        for key in self.augment.state_dict(prefix="augment."):  # belongs to the data module
            checkpoint["state_dict"].pop(key, None)
        if self.train_metrics.update_called:
            self._refuse_divergence("train/loss", self.train_metrics.compute()["loss"])
        self._refuse_divergence("a weight", *self.network.parameters())
        trainer = self.trainer
        if trainer.state.status == "running" and trainer.is_last_batch:
            states = checkpoint.get("lr_schedulers", [])
            for config, state in zip(trainer.lr_scheduler_configs, states, strict=False):
                is_due = (self.current_epoch + 1) % config.frequency == 0
                metric = trainer.callback_metrics.get(str(config.monitor))
                if config.reduce_on_plateau and is_due and metric is not None:
                    state["pending"] = float(metric)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the temperature. Drop schedulers' lengths and learning rates: OneCycleLR may now
        end elsewhere, and the optimizer's groups may be in another order."""
        super().on_load_checkpoint(checkpoint)
        self.lr = checkpoint.get("found_lr")
        self.calibration.load(checkpoint)
        if self.proxy is None:  # the run may have had one
            for key in [key for key in checkpoint["state_dict"] if key.startswith("proxy.")]:
                del checkpoint["state_dict"][key]
        checkpoint["state_dict"].update(self.augment.state_dict(prefix="augment."))
        for state in checkpoint.get("lr_schedulers", []):
            for key in ("total_steps", "base_lrs", "_schedule_phases"):
                state.pop(key, None)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> "ImageClassifier":  # type: ignore[override]
        """Load a trained model from a checkpoint of this version or an earlier one."""
        settings = read_checkpoint(checkpoint_path).get("hyper_parameters", {})
        kwargs = {
            "map_location": "cpu",
            "weights_only": True,
            **settings,
            "weights": None,
            "calibrate": bool(settings.get("calibrate", True)),  # a file's temperature is saved
            **kwargs,
        }
        model = super().load_from_checkpoint(checkpoint_path, **kwargs)
        model.is_new = False
        return model

    @property  # type: ignore[misc]  # Lightning's can also be set
    def example_input_array(self) -> Tensor:
        """Images [128, 3, 32, 32] for the summary's shapes, in the weights' dtype."""
        return torch.zeros(128, 3, 32, 32, dtype=next(self.network.parameters()).dtype)


class Parameters(list[nn.Parameter]):
    """Trainable parameters, as any optimizer takes them; `named` pairs them with their names."""

    named: list[tuple[str, nn.Parameter]]


class Means(Metric):
    """Mean loss and accuracy over images. An update costs a few additions on the device and never
    makes the CPU wait."""

    loss: Tensor
    correct: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros(()), "sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, mean_loss: Tensor, correct: Tensor, images: int) -> None:
        """Add a batch: its mean loss [], number of correct predictions int64 [], and size."""
        # Not in-place: the initial zero has the weights' dtype, perhaps bfloat16.
        self.loss = self.loss + mean_loss.float() * images
        self.correct += correct
        self.images += images

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` [] and `acc` [], a fraction, over all ranks."""
        return {"loss": self.loss / self.images, "acc": self.correct.float() / self.images}


def _monitor(scheduler: Any) -> str:
    """Return the metric that ReduceLROnPlateau follows; only Lightning's class names one."""
    return str(getattr(scheduler, "monitor", "val/loss"))


@contextmanager
def _refused(key: str) -> Iterator[None]:
    """Prefix an error from an argument's class with the argument's key."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        raise MisconfigurationException(f"{key}: {error}") from error


def _normalization(normalize: str | dict[str, list[float]] | None) -> dict[str, Any]:
    """Return the mean and standard deviation of each channel."""
    statistics: Any = {"mean": MEAN, "std": STD} if normalize in ("cifar10", None) else normalize
    if set(statistics) != {"mean", "std"} or any(len(v) != 3 for v in statistics.values()):
        raise MisconfigurationException(
            f"model.normalize {normalize}: expected cifar10, or mean and std of 3 channels"
        )
    return statistics


def _start_from(weights: dict[str, Tensor], network: nn.Module) -> None:
    """Load weights. Print which stay random because their shape differs, such as the last layer's
    for other classes."""
    initial = network.state_dict()
    skipped = [n for n in initial.keys() & weights.keys() if initial[n].shape != weights[n].shape]
    network.load_state_dict({**weights, **{name: initial[name] for name in skipped}})
    if skipped:
        names = ", ".join(sorted(skipped))
        rank_zero_only(print)(f"model.weights: not loaded because the shapes differ: {names}")


def _check(key: str, network: nn.Module, size: int, classes: int) -> None:
    """Raise before a run starts if the network's input or output shape doesn't fit."""
    name, copied = f"{key} {type(network).__name__}", copy.deepcopy(network).cpu().float().eval()
    try:
        with torch.no_grad():
            shape = list(copied(torch.zeros(2, 3, size, size)).shape)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"{name} does not take images [B, 3, {size}, {size}]: {error}"
        ) from error
    if shape != [2, classes]:
        hint = f": networks.library_network makes it with {classes} classes"
        raise MisconfigurationException(
            f"{name} returns {shape} for 2 images, expected logits {[2, classes]}"
            + (hint if shape == [2, 1000] else "")
        )
