"""Muon and SGD as one optimizer, and its schedule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optimization
from optimization import Group, LinearDecay, MuonSGD, WarmupCosine
from tests.conftest import Run

ROOT = Path(__file__).parents[1]


def train_together(
    ours: list[nn.Parameter],
    theirs: list[nn.Parameter],
    optimizers: list[Any],
    steps: int = 5,
    scale: float = 1.0,
) -> None:
    """Give both the same gradients and falling learning rates; theirs are scaled."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.grad = mine.grad.clone().view_as(its)
        for optimizer, factor in zip(optimizers, (1.0, scale), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 - step / steps) * factor
            optimizer.step()


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def test_the_rule_sgd_is_pytorchs() -> None:
    shapes = ((8,), (4, 3, 3, 3))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    group = Group("*", lr=0.1, momentum=0.85, weight_decay=0.02)
    mine = MuonSGD([("a", ours[0]), ("b", ours[1])], {"all": group})
    its = torch.optim.SGD(theirs, lr=0.1, momentum=0.85, weight_decay=0.02, nesterov=True)
    train_together(ours, theirs, [mine, its])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("computes_in_32_bits", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (40, 2, 3, 3)])
def test_the_rule_muon_is_pytorchs_on_filters_as_matrices(
    shape: tuple[int, ...], computes_in_32_bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimization, "bf16_is_slow", lambda: computes_in_32_bits)
    ours, theirs = parameters(shape, shape), parameters(shape, shape)
    theirs = [nn.Parameter(p.detach().flatten(1)) for p in theirs]
    group = Group("*", lr=0.1, rule="muon", momentum=0.6, normalize=False)
    mine = MuonSGD([("a", ours[0]), ("b", ours[1])], {"all": group})
    its = torch.optim.Muon(theirs, lr=0.1, momentum=0.6, weight_decay=0.0, ns_steps=3)
    # PyTorch's Muon takes larger steps for tall matrices.
    rows, columns = theirs[0].shape
    for its_group in its.param_groups:
        its_group["adjust_lr_fn"] = "original"
    tall = max(1, rows / columns) ** 0.5
    before = [p.detach().clone() for p in ours]
    train_together(ours, theirs, [mine, its], steps=1, scale=1 / tall)
    for start, one, other in zip(before, ours, theirs, strict=True):
        torch.testing.assert_close(one, other.view_as(one), atol=2e-3, rtol=0.02)
        singular = torch.linalg.svdvals((one - start).flatten(1)) / 0.1
        assert singular.min() > 0.3, "three iterations bring all near 1"
        assert singular.max() < 1.6
    train_together(ours, theirs, [mine, its], scale=1 / tall)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other.view_as(one), atol=4e-3, rtol=0.02)


def test_muon_normalises_the_weights_before_each_step() -> None:
    (filters,) = parameters((16, 3, 3, 3))
    optimizer = MuonSGD([("conv", filters)], {"it": Group("conv", lr=1e-6, rule="muon")})
    filters.grad = torch.randn_like(filters)
    optimizer.step()
    torch.testing.assert_close(filters.norm(), torch.tensor(4.0), atol=1e-4, rtol=0)


def test_muon_takes_filters_that_are_all_zero() -> None:
    filters = nn.Parameter(torch.zeros(4, 3, 3, 3))
    optimizer = MuonSGD([("conv", filters)], {"it": Group("conv", lr=0.1, rule="muon")})
    filters.grad = torch.randn_like(filters)
    optimizer.step()
    assert filters.isfinite().all()
    assert filters.any()


@pytest.mark.parametrize("warmup", [-0.5, 1, 2])
def test_warmup_cosine_has_a_part_to_rise_and_one_to_fall(warmup: float) -> None:
    optimizer = torch.optim.SGD(parameters((2,)), lr=1.0)
    with pytest.raises(ValueError, match=r"is not in \[0, 1\)"):
        WarmupCosine(optimizer, warmup)


def test_each_parameter_has_the_group_that_fits() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    names = {"first": "0.*", "bias": "1.bias", "rest": "1.w*"}
    groups = {name: Group(pattern, lr=1) for name, pattern in names.items()}
    optimizer = MuonSGD(network.named_parameters(), groups)
    taken = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert taken == [
        [id(network[0].weight), id(network[0].bias)], [id(network[1].bias)],
        [id(network[1].weight)],
    ]  # fmt: skip


def test_linear_decay_ends_where_each_group_says() -> None:
    one, other = parameters((2,), (2,))
    groups = {"a": Group("one", lr=1, until=0.5), "b": Group("other", lr=10)}
    optimizer = MuonSGD([("one", one), ("other", other)], groups)
    schedule = LinearDecay(optimizer)
    rates = []
    for step in range(6):  # extra steps do not train backwards
        schedule.set_progress(step / 4)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[1, 10], [0.5, 7.5], [0, 5], [0, 2.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("total", [50, 400])
def test_warmup_cosine_is_the_curve_of_one_cycle(total: int) -> None:
    rates: list[list[float]] = [[], []]
    optimizers = [torch.optim.SGD(parameters((2,)), lr=3.0) for _ in rates]
    ours = WarmupCosine(optimizers[0], 0.2)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizers[1], max_lr=3.0, pct_start=0.2, total_steps=total, cycle_momentum=False
    )
    for step in range(total):
        if step:
            ours.set_progress(step / total)
            optimizers[1].step()
            theirs.step()
        for found, optimizer in zip(rates, optimizers, strict=True):
            found.append(optimizer.param_groups[0]["lr"])
    # PyTorch's schedule is a step ahead.
    assert rates[0] == pytest.approx(rates[1], abs=3.0 * 1.6 * 5 / total)
    assert max(rates[0]) == 3.0
    assert rates[0][0] == pytest.approx(0.12)


@pytest.mark.parametrize("total", [1, 2, 5])
def test_warmup_cosine_of_a_few_steps_trains_and_ends_at_zero(total: int) -> None:
    optimizer = torch.optim.SGD(parameters((2,)), lr=1.0)
    schedule = WarmupCosine(optimizer, 0.2)
    for step in range(total):
        assert optimizer.param_groups[0]["lr"] > 0
        schedule.set_progress((step + 1) / total)
    assert optimizer.param_groups[0]["lr"] == 0


SMALL = [
    *("--config", ROOT / "configs" / "fast94.yaml", "--trainer.max_epochs", "3"),
    *("--data.val_size", "200", "--data.batch_size", "100", "--model.network.widths", "[8,8,8]"),
]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "",
            "{a: {parameters: '*.bias', lr: 1}}",
            ": groups.0.conv1.weight must match exactly one group's pattern, but matches none",
        ),
        (
            ".more",
            "{parameters: '*d.weight', lr: 1}",
            ": head.weight must match exactly one group's pattern, but matches head and more",
        ),
        (
            ".more",
            "{parameters: heda, lr: 1}",
            "group more matches no parameter: the pattern groups.more.parameters is 'heda'",
        ),
        (
            ".filters.rule",
            "adam",
            "rule: expected one of 'sgd', 'muon', not adam",
        ),
        (".filters.lr", "-1", "lr: expected a value v>0, not -1"),
        (".norms.momentum", "1.5", "momentum: expected a value v>=0 and v<=1, not 1.5"),
        (".whitening.until", "0", "until: expected a value v>0, not 0"),
        (".head.rate", "1", "unknown option rate: options are parameters, rule,"),
        (".norms.rule", "muon", "groups.0.norm1.bias is a vector, which rule muon cannot update"),
    ],
)
def test_wrong_groups_are_refused_in_one_line(
    fails: Run, flag: str, value: str, message: str
) -> None:
    assert message in fails("fit", *SMALL, f"--model.optimizer.groups{flag}", value)


def test_a_decay_without_an_end_is_refused(fails: Run) -> None:
    endless = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00"]
    assert "set trainer.max_epochs or max_steps" in fails("fit", *SMALL, *endless)


def test_a_schedule_that_ends_before_the_training_is_refused(fails: Run) -> None:
    short = ["--model.lr_scheduler.max_lr", "1", "--model.lr_scheduler.epochs", "1"]
    short += ["--model.lr_scheduler.steps_per_epoch", "5"]
    message = fails("fit", "--model.lr_scheduler", "OneCycleLR", *short)
    assert "a schedule over 5 steps ends before the training, which takes 32" in message


def test_one_value_of_one_group_can_be_typed(run: Run) -> None:
    run("fit", *SMALL, "--trainer.max_epochs", "1", "--model.optimizer.groups.filters.rule", "sgd",
        "--model.optimizer.groups.filters.lr", "2.9")  # fmt: skip
    checkpoint = torch.load("runs/fast94/version_0/checkpoints/last.ckpt", weights_only=True)
    filters = checkpoint["optimizer_states"][0]["param_groups"][3]
    assert (filters["name"], filters["rule"], filters["initial_lr"]) == ("filters", "sgd", 2.9)
    assert (filters["momentum"], filters["parameters"]) == (0.6, "*.conv?.weight")
