"""An optimizer and schedules that PyTorch lacks, for `model.optimizer` and `model.lr_scheduler`."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Of Jordan's Muon (kellerjordan.github.io/posts/muon): an odd polynomial of degree five that, put
# into itself a few times, brings all singular values in (0, 1] near 1, small ones fast.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass
class Group:
    """How some of the parameters are updated.

    Args:
        parameters: Which: a pattern for their names in the network, such as `*.conv*.weight`, and
            in the model's proxy, if there is one, such as `proxy.head.weight`.
        lr: Learning rate, for the mean loss of a batch.
        rule: `sgd`: a step along the gradient, with Nesterov momentum. `muon`: of the same step,
            seen as a matrix with a row for each output channel, the singular values are brought
            near 1 (`orthogonalized`).
        momentum: How much of the sum of past gradients is kept, in [0, 1].
        weight_decay: What is added to the gradient, times the parameter.
        normalize: Of `muon`: scale each parameter before a step, so that its rows have a mean
            square norm of 1.
        until: The part of the training, above 0, after which `LinearDecay` has brought the learning
            rate to zero.

    """

    parameters: str = ""  # which `MuonSGD` refuses, and names the group, as the parser would not
    lr: PositiveFloat = field(kw_only=True)
    rule: Literal["sgd", "muon"] = "sgd"
    momentum: ClosedUnitInterval = 0.85
    weight_decay: NonNegativeFloat = 0.0
    normalize: bool = True
    until: PositiveFloat = 1.0


def plain(group: Group) -> dict[str, Any]:
    """Return a group's settings as numbers and texts that a checkpoint may hold, which the parser's
    types for positive numbers are not."""
    settings = asdict(group)
    return {key: float(v) if isinstance(v, float) else v for key, v in settings.items()}


class MuonSGD(Optimizer):
    """Muon for some parameters and SGD with Nesterov momentum for others, as one optimizer, as the
    two of `airbench94_muon.py` (github.com/KellerJordan/cifar10-airbench) together.

    Every parameter belongs to the one group whose pattern fits its name.

    Args:
        params: Pairs of name and parameter, as `named_parameters()` gives them, or what has these
            pairs as `named`.
        groups: How they are updated, by a name for each group.

    Raises:
        MisconfigurationException: A parameter that no group takes, or two; a group that takes none;
            a vector for `muon`.

    """

    is_recordable = True  # as a CUDA graph: nothing is decided on the CPU

    def __init__(self, params: Iterable[tuple[str, Tensor]], groups: dict[str, Group]) -> None:
        pairs = list(getattr(params, "named", params))
        if not all(isinstance(pair, tuple) for pair in pairs):  # those of model.decay_matrices_only
            raise ValueError("MuonSGD has groups of its own: say their weight_decay there")
        taken: dict[str, list[Tensor]] = {name: [] for name in groups}
        for name, parameter in pairs:
            fitting = [key for key in groups if fnmatchcase(name, groups[key].parameters)]
            if len(fitting) != 1:
                who = " and ".join(fitting) or "none"
                raise MisconfigurationException(
                    f"model.optimizer: one group must take {name}: the patterns of {who} do"
                )
            chosen = fitting[0]
            if groups[chosen].rule == "muon" and parameter.ndim < 2:
                raise MisconfigurationException(
                    f"model.optimizer: {name} is a vector, which rule muon cannot update"
                )
            taken[chosen].append(parameter)
        for name, parameters in taken.items():
            if not parameters:
                others = ", ".join(other for other in groups if other != name)
                raise MisconfigurationException(
                    f"model.optimizer: group {name} takes no parameter: the pattern "
                    f"groups.{name}.parameters is '{groups[name].parameters}' (other groups: "
                    f"{others or 'none'})"
                )
        super().__init__(
            [{"name": name, "params": taken[name], **plain(groups[name])} for name in groups],
            {"momentum": Group.momentum},  # which LearningRateMonitor looks for
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state, whose groups of the same names may come in another order."""
        saved = {group["name"]: group for group in state_dict["param_groups"]}
        groups = [saved[group["name"]] for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; return what the closure, which computes the gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                updates = self._with_momentum(params, group)
                if group["rule"] == "muon":
                    if group["normalize"]:
                        sizes = torch._foreach_norm(params)
                        torch._foreach_clamp_min_(sizes, 1e-7)  # all zero, as nothing scales it
                        factors = [len(p) ** 0.5 / s for p, s in zip(params, sizes, strict=True)]
                        torch._foreach_mul_(params, factors)
                    updates = orthogonalized(updates)
                torch._foreach_mul_(updates, group["lr"])  # a number, or a tensor on the device
                torch._foreach_sub_(params, updates)
        return loss

    def _with_momentum(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        sums = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(sums, group["momentum"])
        torch._foreach_add_(sums, grads)
        return list(torch._foreach_add(grads, sums, alpha=group["momentum"]))


def orthogonalized(updates: list[Tensor], steps: int = 3) -> list[Tensor]:
    """Return the updates [C, ...] with their larger singular values, as matrices [C, N], in
    [0.5, 1.5], and the small ones up to 41 times as large.

    Newton-Schulz iteration, in bfloat16, or in float32 on a processor that is known to be faster in
    it. Those of one shape are done at once.
    """
    a, b, c = NEWTON_SCHULZ
    on_cpu = bool(updates) and updates[0].device.type == "cpu"
    dtype = torch.float32 if on_cpu and bf16_is_slow() else torch.bfloat16
    results: dict[int, Tensor] = {}
    order = sorted(range(len(updates)), key=lambda i: updates[i].shape)
    for shape, places in groupby(order, key=lambda i: updates[i].shape):
        same = list(places)
        x = torch.stack([updates[i].flatten(1) for i in same])
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x  # the smaller product
        for _ in range(steps):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        x = x.mT if is_tall else x
        results |= zip(same, (y.reshape(shape) for y in x), strict=True)
    return [results[i].to(update.dtype) for i, update in enumerate(updates)]


class Schedule(LRScheduler):
    """Learning rates as a function of training progress.

    It counts no steps and keeps no state: whoever trains tells it the progress, so a run that is
    resumed for longer, or with another batch size, is where it should be. A group of the optimizer
    that has `until` has come to the end after that share of the training.
    """

    def __init__(self, optimizer: Optimizer) -> None:  # not LRScheduler's, which counts steps
        self.optimizer = optimizer
        self.set_progress(0.0)

    def factor(self, progress: float) -> float:
        """Return what to multiply each group's own learning rate by at a progress in [0, 1]."""
        raise NotImplementedError

    def set_progress(self, progress: float) -> None:
        """Set the learning rates for the share of the training that is done, in [0, 1]."""
        for group in self.optimizer.param_groups:
            lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = lr * self.factor(min(1.0, progress / group.get("until", 1.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class LinearDecay(Schedule):
    """Lowers the learning rate to zero in a straight line."""

    def factor(self, progress: float) -> float:
        """Return 1 at the start and 0 at the end."""
        return 1 - progress


class WarmupCosine(Schedule):
    """Raises the learning rate from a 25th to its value, then lowers it to zero, both along half a
    cosine wave: the curve of `OneCycleLR`, for the rate that the optimizer was given.

    Args:
        optimizer: Whose rates.
        warmup: The share of the training in which the rate rises, in [0, 1).

    Raises:
        ValueError: `warmup` is not in [0, 1).

    """

    def __init__(self, optimizer: Optimizer, warmup: ClosedUnitInterval = 0.2) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup {warmup} is not in [0, 1)")
        self.warmup = warmup
        super().__init__(optimizer)

    def factor(self, progress: float) -> float:
        """Return 0.04 at the start, 1 after the warm-up and 0 at the end."""
        if progress < self.warmup:
            return 0.04 + 0.96 * _half_wave(progress / self.warmup)
        return 1 - _half_wave((progress - self.warmup) / (1 - self.warmup))


def _half_wave(part: float) -> float:
    """Return a value that rises from 0 to 1."""
    return (1 - math.cos(math.pi * part)) / 2


def bf16_is_slow() -> bool:
    """Return whether this processor, of Intel's or AMD's, computes in float32 faster than in
    bfloat16: it lacks instructions for it, or is Intel's without AMX, as in many virtual machines.
    """
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    has_fast_ones = can.get("avx512_bf16", True) and "Intel" not in can.get("cpu_name", "")
    return not has_fast_ones and not can.get("amx_bf16", True)
