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

# From Jordan's Muon (kellerjordan.github.io/posts/muon): an odd polynomial of degree five. Iterated
# a few times, it brings all singular values in (0, 1] near 1, small ones fast.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass
class Group:
    """How a group of parameters is updated.

    Args:
        parameters: Pattern for their names in the network, such as `*.conv*.weight`, or in the
            model's proxy, such as `proxy.head.weight`.
        lr: Learning rate, for the mean loss of a batch.
        rule: `sgd`: SGD with Nesterov momentum. `muon`: the same step, as a matrix with a row for
            each output channel, with its singular values brought near 1 (`orthogonalized`).
        momentum: Share of the sum of past gradients that is kept, in [0, 1].
        weight_decay: Multiple of the parameter that is added to its gradient.
        normalize: For `muon`: before a step, scale each parameter so that the mean squared norm of
            its rows is 1.
        until: Share of the training, above 0, after which a schedule from `optimization` has
            brought the learning rate to zero.

    """

    parameters: str = ""  # `MuonSGD` refuses it and names the group; the parser would not
    lr: PositiveFloat = field(kw_only=True)
    rule: Literal["sgd", "muon"] = "sgd"
    momentum: ClosedUnitInterval = 0.85
    weight_decay: NonNegativeFloat = 0.0
    normalize: bool = True
    until: PositiveFloat = 1.0


def plain(group: Group) -> dict[str, Any]:
    """Return a group's settings as plain numbers and strings: a checkpoint can't hold the parser's
    types for positive numbers."""
    settings = asdict(group)
    return {key: float(v) if isinstance(v, float) else v for key, v in settings.items()}


class MuonSGD(Optimizer):
    """Muon for some parameters and SGD with Nesterov momentum for others: the two optimizers of
    `airbench94_muon.py` (github.com/KellerJordan/cifar10-airbench) in one.

    Every parameter belongs to the one group whose pattern matches its name.

    Args:
        params: Pairs of name and parameter, as from `named_parameters()`, or an object with these
            pairs in `named`.
        groups: The groups, by name.

    Raises:
        MisconfigurationException: A parameter matches no group or several, a group matches no
            parameter, or a `muon` group matches a vector.

    """

    is_recordable = True  # as a CUDA graph: it decides nothing on the CPU

    def __init__(self, params: Iterable[tuple[str, Tensor]], groups: dict[str, Group]) -> None:
        pairs = list(getattr(params, "named", params))
        if not all(isinstance(pair, tuple) for pair in pairs):  # from model.decay_matrices_only
            raise ValueError(
                "MuonSGD defines its own groups: set weight_decay there instead of "
                "model.decay_matrices_only"
            )
        members: dict[str, list[Tensor]] = {name: [] for name in groups}
        for name, parameter in pairs:
            matches = [key for key in groups if fnmatchcase(name, groups[key].parameters)]
            if len(matches) != 1:
                raise MisconfigurationException(
                    f"model.optimizer: {name} must match exactly one group's pattern, but "
                    f"matches {' and '.join(matches) or 'none'}"
                )
            chosen = matches[0]
            if groups[chosen].rule == "muon" and parameter.ndim < 2:
                raise MisconfigurationException(
                    f"model.optimizer: {name} is a vector, which rule muon cannot update"
                )
            members[chosen].append(parameter)
        for name, parameters in members.items():
            if not parameters:
                others = ", ".join(other for other in groups if other != name)
                raise MisconfigurationException(
                    f"model.optimizer: group {name} matches no parameter: the pattern "
                    f"groups.{name}.parameters is '{groups[name].parameters}' (other groups: "
                    f"{others or 'none'})"
                )
        super().__init__(
            [{"name": name, "params": members[name], **plain(groups[name])} for name in groups],
            {"momentum": Group.momentum},  # LearningRateMonitor looks for it
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whose groups are matched by name: their order may differ."""
        saved = {group["name"]: group for group in state_dict["param_groups"]}
        groups = [saved[group["name"]] for group in self.param_groups]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; return the result of `closure`, which computes the gradients."""
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
                        torch._foreach_clamp_min_(sizes, 1e-7)  # no NaN for all-zero parameters
                        factors = [len(p) ** 0.5 / s for p, s in zip(params, sizes, strict=True)]
                        torch._foreach_mul_(params, factors)
                    updates = orthogonalized(updates)
                torch._foreach_mul_(updates, group["lr"])  # a float, or a tensor on the device
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

    Newton-Schulz iteration in bfloat16, or in float32 on a CPU that is known to be faster in it.
    Updates of the same shape are batched.
    """
    a, b, c = NEWTON_SCHULZ
    on_cpu = bool(updates) and updates[0].device.type == "cpu"
    dtype = torch.float32 if on_cpu and bf16_is_slow() else torch.bfloat16
    results: dict[int, Tensor] = {}
    order = sorted(range(len(updates)), key=lambda i: updates[i].shape)
    for shape, group in groupby(order, key=lambda i: updates[i].shape):
        indices = list(group)
        x = torch.stack([updates[i].flatten(1) for i in indices])
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x  # the smaller product
        for _ in range(steps):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        x = x.mT if is_tall else x
        results |= zip(indices, (y.reshape(shape) for y in x), strict=True)
    return [results[i].to(update.dtype) for i, update in enumerate(updates)]


class Schedule(LRScheduler):
    """Learning rates as a function of training progress.

    It counts no steps and keeps no state: the training loop passes it the progress. A run resumed
    for more epochs, or with another batch size, gets the right learning rate. An optimizer group
    with `until` reaches its end after that share of the training.
    """

    def __init__(self, optimizer: Optimizer) -> None:  # not LRScheduler's, which counts steps
        self.optimizer = optimizer
        self.set_progress(0.0)

    def factor(self, progress: float) -> float:
        """Return the multiplier of each group's learning rate at a progress in [0, 1]."""
        raise NotImplementedError

    def set_progress(self, progress: float) -> None:
        """Set the learning rates for the share of the training done, in [0, 1]."""
        for group in self.optimizer.param_groups:
            lr = group.setdefault("initial_lr", group["lr"])
            group["lr"] = lr * self.factor(min(1.0, progress / group.get("until", 1.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


class LinearDecay(Schedule):
    """Lowers the learning rate to zero linearly."""

    def factor(self, progress: float) -> float:
        """Return 1 at the start and 0 at the end."""
        return 1 - progress


class WarmupCosine(Schedule):
    """Raises the learning rate from 1/25 of the optimizer's value to that value, then lowers it to
    zero, each along half a cosine wave: the curve of `OneCycleLR`.

    Args:
        optimizer: The optimizer to schedule.
        warmup: Share of the training in which the learning rate rises, in [0, 1).

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
    """Return whether this Intel or AMD CPU is faster in float32 than in bfloat16: it lacks bfloat16
    instructions, or is Intel's without AMX, as in many virtual machines."""
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older PyTorch
    has_fast_bf16 = cpu.get("avx512_bf16", True) and "Intel" not in cpu.get("cpu_name", "")
    return not has_fast_bf16 and not cpu.get("amx_bf16", True)
