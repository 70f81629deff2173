"""What is trained and how one step goes: network, loss, optimizer, metrics."""

import math
import warnings
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric

from cifar10.archive import CLASSES
from cifar10.augment import TestTimeAugmentation, Transform, average_over_views
from cifar10.batches import Batch, Batches

CompileMode = Literal[
    "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
]


INIT_IMAGES = 5000  # that a network's `init_from` sees


class Diverged(MisconfigurationException):
    """Loss or weights are no finite numbers any more: nothing will come of the run."""


class Means(Metric):
    """Mean loss and accuracy over images. A step costs a few additions on the device, and nothing
    that would make the CPU wait for it."""

    loss: Tensor
    finite: Tensor
    correct: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros(()), "sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("finite", torch.zeros((), dtype=torch.int64), "min")

    def update(self, mean_loss: Tensor, correct: Tensor, images: int) -> None:
        """Add a batch: its mean loss [], its right predictions int64 [], its size."""
        # Not in place: the zero that it begins with is as short as the weights, perhaps bfloat16.
        self.loss = self.loss + mean_loss.float() * images
        self.correct += correct
        self.images += images
        self.finite += self.loss.isfinite()  # batches before the first that is not

    def compute(self) -> dict[str, Tensor]:
        """Return `loss` [] and `acc` [], a fraction, over all ranks."""
        return {"loss": self.loss / self.images, "acc": self.correct.float() / self.images}


class ImageClassifier(LightningModule):
    """Trains a network on images with cross entropy.

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc`, once an
    epoch: means over the images, accuracy as a fraction.

    Args:
        network: Maps float images [B, 3, 32, 32] to logits [B, 10].
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the scheduler from the optimizer. One that has `total_steps`, such as
            `OneCycleLR`, is told them and goes on with every step; any other with every epoch.
        label_smoothing: Of the training loss, in [0, 1]: the part of the target that is spread
            evenly over all classes.
        softmax_before_loss: Apply softmax to the logits before the loss, which applies its own: the
            slip in the report's code, kept to measure what it costs.
        compile: Train with a step that `torch.compile` has compiled in this mode, from pixels to
            loss; true means `default`. On a GPU `reduce-overhead` and `max-autotune` use CUDA
            graphs.
        log_steps: Log `train/loss_step` too, every `trainer.log_every_n_steps` steps.
        tta: Test-time augmentation of `validate`, `test` and `predict`: the views of an image whose
            logits are averaged (`average_over_views`). During `fit` there is none.

    Raises:
        MisconfigurationException: The network does not map [B, 3, 32, 32] to [B, 10].

    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
        softmax_before_loss: bool = False,
        compile: CompileMode | bool = "off",
        log_steps: bool = False,
        tta: TestTimeAugmentation = "none",
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.softmax_before_loss = softmax_before_loss
        # YAML reads `off` as false.
        if isinstance(compile, bool):
            compile = "default" if compile else "off"
        self.compile_mode = compile
        self.log_steps = log_steps
        self.label_smoothing = label_smoothing
        self.tta = self.views = tta
        self.transform = Transform()
        self.train_metrics = Means()
        self.val_metrics = Means()
        self.test_metrics = Means()
        _check(network)

    @property  # type: ignore[misc]  # Lightning's can also be set
    def example_input_array(self) -> Tensor:
        """Images [128, 3, 32, 32] for the summary's shapes, of the type of the weights."""
        return torch.zeros(128, 3, 32, 32, dtype=next(self.network.parameters()).dtype)

    def setup(self, stage: str) -> None:
        """Take over the data module's way from pixels to images, to make it part of the step; let a
        network that wants to see training images before it begins see some."""
        self.views = "none" if stage == "fit" else self.tta
        datamodule = getattr(self.trainer, "datamodule", None)
        self.transform = getattr(datamodule, "transform", self.transform)
        if stage == "fit" and datamodule is not None and hasattr(self.network, "init_from"):
            train_set = datamodule.train_set
            pixels, _, indices = train_set.batch(train_set.indices[:INIT_IMAGES])
            with torch.no_grad():
                images = self.transform.eval()(pixels.cpu(), indices.cpu())
            self.transform.train()
            self.network.init_from(images)  # type: ignore[operator]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Lightning notes some fifty times a step which hook runs; `nn.Module`
        would ask each time whether that is a parameter, for a twentieth of a millisecond in all."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images [B, 3, 32, 32], as `transform` makes them, to logits [B, 10]."""
        return self.network(images)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with its scheduler if there is one.

        Raises:
            MisconfigurationException: Values that the optimizer or the scheduler refuses.
        """
        try:
            named = self.network.named_parameters()
            optimizer = self.make_optimizer([(n, p) for n, p in named if p.requires_grad])
            for group in optimizer.param_groups:
                group.pop("param_names", None)  # else a callback could add no group without
            scheduler = self._scheduler(optimizer) if self.make_lr_scheduler else None
        except (TypeError, ValueError, ArithmeticError) as error:
            raise MisconfigurationException(f"model.optimizer or lr_scheduler: {error}") from error
        if scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step" if hasattr(scheduler, "total_steps") else "epoch",
                "monitor": getattr(scheduler, "monitor", None),  # of ReduceLROnPlateau
            },
        }

    def _scheduler(self, optimizer: Optimizer) -> Any:
        make = self.make_lr_scheduler
        assert make is not None
        steps = self.trainer.estimated_stepping_batches
        given = make.keywords if isinstance(make, partial) else {}  # all arguments of the class
        if given.get("total_steps", 0) is None and given.get("epochs") is None:
            make = partial(make, total_steps=steps)  # type: ignore[call-arg]
        scheduler = make(optimizer)
        end = getattr(scheduler, "total_steps", steps)
        if end < steps < math.inf:
            raise ValueError(
                f"a schedule over {end} steps ends before the training, which takes {steps}"
            )
        return scheduler

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a schedule over all steps go on towards what may be another end, with the rates of
        what may be groups in another order."""
        for state in checkpoint.get("lr_schedulers", []):
            for key in ("total_steps", "base_lrs", "_schedule_phases"):  # the last is OneCycleLR's
                state.pop(key, None)

    def _steps_done(self) -> int:
        """Return how many steps of the schedule lie behind the run, as its epochs are now: others
        may have had another number of steps."""
        trainer = self.trainer
        if trainer.estimated_stepping_batches == trainer.max_steps:
            return trainer.global_step
        accumulate = trainer.accumulate_grad_batches
        per_epoch = math.ceil(trainer.num_training_batches / accumulate)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        of_this_epoch = 0 if progress.is_last_batch else progress.current.ready // accumulate
        return self.current_epoch * per_epoch + of_this_epoch

    def _place_schedules(self) -> None:
        """Have the schedules of a resumed run where the run is, should they begin anew or should an
        epoch have another number of steps, and set the rates, should the end be another."""
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the optimizer has made no step before
                if config.reduce_on_plateau:
                    awaited = scheduler.__dict__.pop("awaited", None)
                    if awaited is not None:
                        scheduler.step(awaited)
                elif config.interval == "step":
                    scheduler.last_epoch = self._steps_done() - 1
                    scheduler.step()
                else:
                    for _ in range(self.current_epoch - scheduler.last_epoch):
                        scheduler.step()

    def on_fit_start(self) -> None:
        """Remember the run's seed, and prepare the step."""
        self.seed = self.trainer.strategy.broadcast(torch.initial_seed())
        self.compiled_loss = self._loss
        has_graphs = self.compile_mode in ("reduce-overhead", "max-autotune")
        if has_graphs and self.device.type == "cuda" and self.trainer.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                f"model.compile {self.compile_mode} uses CUDA graphs, which write over gradients "
                "that trainer.accumulate_grad_batches keeps: choose model.compile default"
            )
        if self.compile_mode != "off":
            self.compiled_loss = torch.compile(self._loss, mode=self.compile_mode, dynamic=False)
        self.compiled_for = 0

    def on_train_start(self) -> None:
        """Begin an epoch, as Lightning does not say so where a run goes on in the middle of one."""
        if self.trainer.global_step > 0:
            self._place_schedules()
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Let dropout and augmentation follow from (seed, epoch, rank), so that a resumed run draws
        what an unbroken one draws."""
        entropy = (self.seed, self.current_epoch, self.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        self.transform.epoch.fill_(self.current_epoch)
        self.train_metrics.reset()
        self.first_step = self.global_step

    def _loss(self, pixels: Tensor, labels: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss [] and the number of right predictions int64 [] of a batch: pixels
        uint8 [B, 3, 32, 32], labels and indices int64 [B]."""
        return self._score(self._logits(pixels, indices), labels)

    def _logits(self, pixels: Tensor, indices: Tensor) -> Tensor:
        images = self.transform(pixels, indices)
        return average_over_views(self.network, images, self.views)

    def _score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()  # of weights in bfloat16 too
        scores = logits.softmax(dim=1) if self.softmax_before_loss else logits
        smoothing = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
        return loss, (logits.argmax(dim=1) == labels).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; with the last of an epoch, log the epoch's metrics."""
        size = len(batch.labels)
        self.compiled_for = self.compiled_for or size
        # A short last batch is not worth a compilation of its own.
        loss_of = self.compiled_loss if size == self.compiled_for else self._loss
        loss, correct = loss_of(*batch)
        self.train_metrics.update(loss.detach(), correct, size)
        if self.log_steps:
            self.log("train/loss_step", loss, batch_size=size)
        if self.trainer.is_last_batch:
            self._refuse_no_number()
            self._log_epoch("train", self.train_metrics)
        loader = self.trainer.train_dataloader
        if self.trainer.world_size > 1 and isinstance(loader, Batches):
            loss = loss * loader.weight(batch_idx)
        return loss

    def _refuse_no_number(self) -> None:
        """Stop a run whose loss has become infinite or no number since the epoch began."""
        metrics = self.train_metrics
        if not metrics.update_called:
            return
        with metrics.sync_context():  # of all ranks, the one that was first
            if metrics.loss.isfinite():
                return
            batches = int(metrics.finite)
        step = self.first_step + batches // self.trainer.accumulate_grad_batches
        raise self._diverged(f"train/loss is no finite number from step {step} on")

    def _diverged(self, what: str) -> Diverged:
        rates = []
        for group in self.trainer.optimizers[0].param_groups:
            now, begun = group["lr"], group.get("initial_lr", group["lr"])
            name = f"{group['name']} " if "name" in group else ""
            rates.append(f"{name}{begun:.3g}{f' (now {now:.3g})' if now != begun else ''}")
        return Diverged(
            f"{what}, in epoch {self.current_epoch}, at learning rate {', '.join(rates)}"
        )

    def _refuse_ruin(self) -> None:
        """Stop a run of which nothing can come, such as the last step of an epoch may leave."""
        self._refuse_no_number()
        are_finite = torch.stack([p.isfinite().all() for p in self.network.parameters()])
        if not are_finite.all():
            raise self._diverged(f"weights are not finite after step {self.global_step}")

    def on_train_end(self) -> None:
        """Let no run end well whose weights are ruined."""
        self._refuse_ruin()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep no ruined weights; keep what a plateau's schedule will be told after this."""
        self._refuse_ruin()
        trainer = self.trainer
        if trainer.state.status == "running" and trainer.is_last_batch:
            states = checkpoint.get("lr_schedulers", [])
            for config, state in zip(trainer.lr_scheduler_configs, states, strict=False):
                if config.reduce_on_plateau and config.monitor in trainer.callback_metrics:
                    state["awaited"] = float(trainer.callback_metrics[config.monitor])

    def _log_epoch(self, stage: str, metrics: Means) -> None:
        """Log the means of an epoch, over all ranks, and begin anew."""
        values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)  # one value an epoch
        metrics.reset()

    def _evaluate(self, batch: Batch, metrics: Means) -> Tensor:
        size = len(batch.labels)
        if not size:  # a rank whose share of the batch is empty
            nothing = batch.labels.new_zeros(())
            metrics.update(nothing, nothing, 0)
            return torch.zeros(0, len(CLASSES), device=batch.labels.device)
        logits = self._logits(batch.images, batch.indices)
        metrics.update(*self._score(logits, batch.labels), size)
        return logits

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Evaluate one batch of the validation set, or of the test set for its curve; return its
        logits [B, 10]."""
        return self._evaluate(batch, self.test_metrics if dataloader_idx else self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the sets that were evaluated."""
        for stage, metrics in (("val", self.val_metrics), ("test", self.test_metrics)):
            if metrics.update_called:
                is_fit = self.trainer.state.fn == "fit"
                if is_fit and stage == "val" and not metrics.compute()["loss"].isfinite():
                    raise self._diverged("val/loss is no finite number")
                self._log_epoch(stage, metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate one batch of the test set; return its logits [B, 10]."""
        return self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test set's metrics."""
        self._log_epoch("test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return class probabilities [B, 10]."""
        if not len(batch.images):  # of the files of this batch none is an image
            return torch.zeros(0, len(CLASSES))
        return self._logits(batch.images, batch.indices).float().softmax(dim=1)


@torch.no_grad()
def _check(network: nn.Module) -> None:
    """Refuse a network of other shapes before a run begins."""
    expected = [2, len(CLASSES)]
    was_training = network.training
    try:
        logits = network.eval()(torch.zeros(2, 3, 32, 32))
        shape = list(logits.shape)
    except Exception as error:
        raise MisconfigurationException(
            f"model.network {type(network).__name__} does not take images [B, 3, 32, 32]: {error}"
        ) from error
    finally:
        network.train(was_training)
    if shape != expected:
        raise MisconfigurationException(
            f"model.network {type(network).__name__} returns {shape} for 2 images, "
            f"expected logits {expected}"
        )
