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

import cuda_graph as graphs
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

    def update(
        self, mean_loss: Tensor, correct: Tensor, images: int, finite: Tensor | None = None
    ) -> None:
        """Add a batch: its mean loss [], its right predictions int64 [], its size; or several, and
        how many of them come before the first whose loss is not finite."""
        were_finite = self.loss.isfinite()
        # Not in place: the zero that it begins with is as short as the weights, perhaps bfloat16.
        self.loss = self.loss + mean_loss.float() * images
        self.correct += correct
        self.images += images
        self.finite += self.loss.isfinite() if finite is None else finite.long() * were_finite

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
        cuda_graph: Record a training step, from pixels to new weights, as a CUDA graph and replay
            it, with many steps in one call of `training_step`. `auto`: on one GPU, where all that
            the step consists of is known to allow it. True: on any device and with any modules,
            which must not decide anything on the CPU; what cannot be recorded is refused.
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
        cuda_graph: bool | Literal["auto"] = "auto",
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
        self.cuda_graph = cuda_graph
        self.steps_a_call = 0  # one step, which Lightning makes
        self.is_inside_call = False
        self.inside_epoch_by: int | None = None  # `steps_a_call` of a checkpoint that is
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
                images = self.transform.to(pixels.device).eval()(pixels, indices)
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
            self._choose_steps(optimizer)
            if (datamodule := getattr(self.trainer, "datamodule", None)) is not None:
                datamodule.steps_a_call = max(1, self.steps_a_call)
            self._refuse_other_count()
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
        steps = self._steps_of_training()
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

    def _choose_steps(self, optimizer: Optimizer) -> None:
        """Decide who makes the steps: Lightning, one by one, or `_many_steps`."""
        self.steps_a_call = 0
        is_asked = self.cuda_graph is True
        if not is_asked and (self.cuda_graph is False or self.device.type != "cuda"):
            return
        settings = graphs.recordable(optimizer)
        hindrance = graphs.why_not(self.trainer)
        if settings is None:
            hindrance = f"does not know how {type(optimizer).__name__} can be recorded"
        if self.compile_mode in ("reduce-overhead", "max-autotune"):
            hindrance = f"and model.compile {self.compile_mode} would both record"
        if type(self) is not ImageClassifier:  # whose training step may be another
            hindrance = f"is for ImageClassifier itself, and {type(self).__name__} is another class"
        if not is_asked:
            hindrance = hindrance or graphs.decides_on_cpu(self.network, self.transform)
            hindrance = hindrance or graphs.unknown_callback(self.trainer)
        elif hindrance:
            raise MisconfigurationException(f"model.cuda_graph {hindrance}")
        if not hindrance:
            self.steps_a_call = graphs.steps_a_call(self.trainer)
            self.recorded = graphs.RecordedStep(
                self._optimize, optimizer, settings or {}, self.network
            )

    def _refuse_other_count(self) -> None:
        """Refuse to resume inside an epoch whose batches are as many steps as they were not."""
        if self.inside_epoch_by not in (None, max(1, self.steps_a_call)):
            raise MisconfigurationException(
                "the checkpoint is from inside an epoch whose batches were counted in another way: "
                "resume with the device and the callbacks that it had, or from the end of an epoch"
            )

    def _steps_an_epoch(self) -> int:
        trainer, batches = self.trainer, self.trainer.train_dataloader
        if self.steps_a_call > 1 and isinstance(batches, Batches):
            return batches.steps
        return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)

    def _steps_of_training(self) -> float:
        steps = self.trainer.estimated_stepping_batches  # loads the batches, if they are not yet
        epochs = self.trainer.max_epochs or 0
        return self._steps_an_epoch() * epochs if self.steps_a_call > 1 and epochs > 0 else steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a schedule over all steps go on towards what may be another end, with the rates of
        what may be groups in another order."""
        for state in checkpoint.get("lr_schedulers", []):
            for key in ("total_steps", "base_lrs", "_schedule_phases"):  # the last is OneCycleLR's
                state.pop(key, None)
        loops = checkpoint.get("loops", {}).get("fit_loop", {})
        epochs = loops.get("epoch_progress", {"current": {"processed": 0, "started": 0}})["current"]
        if epochs["processed"] < epochs["started"]:
            self.inside_epoch_by = checkpoint.get("steps_a_call", 1)

    def _steps_done(self) -> int:
        """Return how many steps of the schedule lie behind the run, as its epochs are now: others
        may have had another number of steps."""
        trainer = self.trainer
        if trainer.estimated_stepping_batches == trainer.max_steps:
            return trainer.global_step
        progress = trainer.fit_loop.epoch_loop.batch_progress
        calls = 0 if progress.is_last_batch else progress.current.ready
        of_this_epoch = calls * max(self.steps_a_call, 1) // trainer.accumulate_grad_batches
        return self.current_epoch * self._steps_an_epoch() + of_this_epoch

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
        # Else cuDNN sums some gradients of weights in another order every time.
        torch.backends.cudnn.deterministic = True
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
        self.sums = torch.zeros(
            3, device=self.device, dtype=torch.float32
        )  # of the steps of a call: see `_optimize`

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

    def _best_loss(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `_loss` does, compiled if that is wanted."""
        size = len(batch[0])
        self.compiled_for = self.compiled_for or size
        # A short last batch is not worth a compilation of its own.
        return (self.compiled_loss if size == self.compiled_for else self._loss)(*batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; with the last of an epoch, log the epoch's metrics."""
        if self.steps_a_call:
            loss = self._many_steps(batch)
        else:
            loss, correct = self._best_loss(*batch)
            self.train_metrics.update(loss.detach(), correct, len(batch.labels))
        if self.log_steps:
            self.log("train/loss_step", loss, batch_size=len(batch.labels))
        if self.trainer.is_last_batch:
            self._refuse_no_number()
            self._log_epoch("train", self.train_metrics)
        loader = self.trainer.train_dataloader
        if self.trainer.world_size > 1 and isinstance(loader, Batches):
            loss = loss * loader.weight(batch_idx)
        return loss

    def _many_steps(self, chunk: Batch) -> Tensor:
        """Make a step of each of several batches, which came as one; return the mean loss [].

        Lightning, which believes this to be one step, makes no other, is told of the others, and
        sets the learning rates after the last.
        """
        if self.trainer.accumulate_grad_batches > 1:  # by now
            raise MisconfigurationException("a callback accumulates: set --model.cuda_graph false")
        self.sums.zero_()
        self.recorded.follow()
        self.is_inside_call = self.steps_a_call > 1
        loader = self.trainer.train_dataloader
        size = loader.step_size if isinstance(loader, Batches) else len(chunk.labels)
        batches = list(zip(*(torch.split(tensor, size) for tensor in chunk), strict=True))
        for number, batch in enumerate(batches):
            if number:
                self._step_schedulers()
            self.recorded(*batch)
        self.is_inside_call = False
        loop, more = self.trainer.fit_loop.epoch_loop, len(batches) - 1
        loop._batches_that_stepped += more  # the step of loggers
        for steps in vars(loop.automatic_optimization.optim_progress.optimizer.step).values():
            steps.increment_by(more)
        loss, correct, finite = self.sums.unbind()
        loss = loss / len(chunk.labels)
        self.train_metrics.update(loss, correct.long(), len(chunk.labels), finite)
        return loss

    def _optimize(self, *batch: Tensor) -> None:
        """Make one step on the device and add up its loss: what is recorded."""
        optimizer, size = self.trainer.optimizers[0], len(batch[0])
        torch.clear_autocast_cache()  # of the weights before the last step
        optimizer.zero_grad()
        loss, correct = self._best_loss(*batch)
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]
            self.configure_gradient_clipping(
                optimizer,
                self.trainer.gradient_clip_val,
                self.trainer.gradient_clip_algorithm,
            )
            optimizer.step()
            self.sums[0] += loss.detach() * size
            self.sums[1] += correct
            self.sums[2] += self.sums[0].isfinite()

    def _step_schedulers(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == "step":
                self.lr_scheduler_step(config.scheduler, None)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, unless a step of `_many_steps` has."""
        if not self.steps_a_call:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless `_many_steps` has."""
        if not self.steps_a_call:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Call `training_step` and update the weights, unless `_many_steps` has."""
        if self.steps_a_call:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

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
        if self.is_inside_call:
            raise MisconfigurationException(
                "nothing is saved of some of the steps of a call: resume from an earlier checkpoint"
            )
        checkpoint["steps_a_call"] = max(1, self.steps_a_call)
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
