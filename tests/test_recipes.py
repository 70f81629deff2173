"""The recipes beyond the report: what each adds, on the small data set."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

import export
from cifar10 import archive
from cifar10.augment import MEAN, STD, average_over_views
from cifar10.batches import Batch
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import DeepConvNet, SpeedrunNet
from optimization import Group, LinearDecay, MuonSGD
from tests.conftest import BASE, QUIET, Run, on
from tests.test_train import ROOT, is_same, rows, weights

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {
    "improved": ["--model.network.channels", "[8,8,16]", "--trainer.precision", "32-true"],
    "fast94": [
        *("--model.network.widths", "[16,16,16]", "--data.batch_size", "100"),
        *("--trainer.precision", "32-true"),  # processors without bfloat16 are slow in it
    ],
}
SMALL["airbench94"] = SMALL["fast94"]
SMALL["fast96"] = [
    *SMALL["fast94"],
    *("--model.proxy.widths", "[8,8,8]", "--checkpoint.save_top_k", "-1"),
    *("--model.optimizer.groups.norms.lr", "5"),  # so few images tolerate no more
]
RECIPES = [
    *("improved", "fast94"),
    *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("airbench94", "fast96")),
]
# For tests of improved.yaml's schedule only.
SCHEDULE = ["--model.network", "tests.small.Small", "--trainer.precision", "32-true"]


def checkpoint(recipe: str, epoch: int, version: int = 0) -> Path:
    return Path(f"runs/{recipe}/version_{version}/checkpoints/epoch_{epoch:02d}.ckpt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_learns_goes_on_exactly_and_can_be_trained_for_longer(
    run: Run, recipe: str
) -> None:
    four = ["--config", CONFIGS / f"{recipe}.yaml", "--trainer.max_epochs", "4"]
    run("fit", *four, *SMALL[recipe], once=True)
    assert rows(Path(f"runs/{recipe}/version_0"))[-1]["val/acc"] > 0.5
    run("fit", "--ckpt_path", checkpoint(recipe, 1))
    assert is_same(*(weights(checkpoint(recipe, 3, version)) for version in (0, 1)))
    assert max(group["lr"] for group in groups(checkpoint(recipe, 3))) < 1e-4, "the schedule's end"

    run("fit", "--ckpt_path", checkpoint(recipe, 3), "--trainer.max_epochs", "6")
    rates = [max(group["lr"] for group in groups(checkpoint(recipe, epoch))) for epoch in (4, 5)]
    assert rates[0] > 1e-4, "it goes on as one of six epochs"
    assert rates[1] < 1e-4


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_schedule_goes_on_where_it_was_when_a_rate_is_typed(run: Run, recipe: str) -> None:
    four = ["--config", CONFIGS / f"{recipe}.yaml", "--trainer.max_epochs", "4"]
    run("fit", *four, *SMALL[recipe], once=True)
    lr = "lr" if recipe == "improved" else "groups.filters.lr"
    run("fit", "--ckpt_path", checkpoint(recipe, 1), f"--model.optimizer.{lr}", "0.001")
    for epoch in (2, 3):
        before, now = (groups(checkpoint(recipe, epoch, version))[-1] for version in (0, 1))
        assert now["initial_lr"] == 0.001
        assert now["lr"] / 0.001 == pytest.approx(before["lr"] / before["initial_lr"])


@pytest.mark.slow
def test_groups_are_known_by_name_when_a_run_goes_on(run: Run) -> None:
    run("fit", "--config", CONFIGS / "fast94.yaml", "--trainer.max_epochs", "3", *SMALL["fast94"])
    path = checkpoint("fast94", 1)
    named = torch.load(path, weights_only=True)["hyper_parameters"]["optimizer"]["init_args"]
    backwards = dict(reversed(named["groups"].items()))
    run("fit", "--ckpt_path", path, "--model.optimizer.groups", json.dumps(backwards))
    assert [group["name"] for group in groups(checkpoint("fast94", 2, 1))] == list(backwards)
    assert is_same(*(weights(checkpoint("fast94", 2, version)) for version in (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", ["WarmupCosine", pytest.param("OneCycleLR", marks=pytest.mark.slow)]
)
def test_a_schedule_ends_at_zero_though_an_epoch_has_other_steps(run: Run, scheduler: str) -> None:
    schedule = ["--model.lr_scheduler", scheduler]
    if scheduler == "OneCycleLR":
        schedule += ["--model.lr_scheduler.max_lr", "0.005"]
    improved = CONFIGS / "improved.yaml"
    run("fit", "--config", improved, "--trainer.max_epochs", "4", *SCHEDULE, *schedule)
    expected = [groups(checkpoint("improved", epoch))[0]["lr"] for epoch in range(4)]
    changes = [
        ["--data.batch_size", "100"],
        ["--data.batch_size", "25"],
        ["--trainer.accumulate_grad_batches", "3"],
        ["--data.batch_size", "100", "--model.optimizer.weight_decay", "0"],
    ]
    for i, typed in enumerate(changes, start=1):
        run("fit", "--ckpt_path", checkpoint("improved", 1), *typed)
        for epoch in (2, 3):
            (group,) = groups(checkpoint("improved", epoch, i))
            assert group["lr"] == pytest.approx(expected[epoch], abs=3e-4), typed
        run("fit", "--ckpt_path", checkpoint("improved", 2, i), "--name", "again")
        once, again = (
            weights(Path(f"runs/{folder}/checkpoints/epoch_03.ckpt"))
            for folder in (f"improved/version_{i}", f"again/version_{i - 1}")
        )
        assert is_same(once, again)


def test_a_schedule_over_max_steps_goes_on_step_by_step(run: Run) -> None:
    steps = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "64"]
    run("fit", "--config", CONFIGS / "improved.yaml", *SCHEDULE, *steps)
    run("fit", "--ckpt_path", checkpoint("improved", 1), "--data.batch_size", "100")
    rates: dict[int, set[float]] = {}
    for path in Path("runs/improved").rglob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        rates.setdefault(saved["global_step"], set()).add(groups(path)[0]["lr"])
    assert max(rates[64]) < 1e-9
    assert {48, 56} <= rates.keys()
    assert all(max(at_step) - min(at_step) < 1e-9 for at_step in rates.values())


def test_a_loaded_model_begins_a_new_training_at_full_rate(run: Run) -> None:
    improved = CONFIGS / "improved.yaml"
    run("fit", "--config", improved, *SCHEDULE, "--trainer.max_epochs", "2")
    path = checkpoint("improved", 1)
    model = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = CIFAR10DataModule.load_from_checkpoint(path, weights_only=True)
    Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
        model, data
    )
    assert not any(p.equal(before[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_a_longer_training_begins_with_its_own_rate(run: Run) -> None:
    often = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.filename", "{step}"]
    often += ["--checkpoint.monitor", "null", "--data.batch_size", "200"]
    run("fit", "--config", CONFIGS / "fast94.yaml", *SMALL["fast94"], *often)
    found = Path("runs/fast94/version_0/checkpoints")
    before = weights(found / "8.ckpt")
    run("fit", "--ckpt_path", found / "8.ckpt", "--trainer.max_epochs", "4")
    assert groups(found / "9.ckpt")[2]["lr"] == pytest.approx(0.00511 * 7 / 16)
    assert not is_same(before, weights(found / "9.ckpt")), "the step to 9 was not at rate zero"


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        ["StepLR", "--model.lr_scheduler.step_size", "1", "--model.lr_scheduler.gamma", "0.5"],
        ["lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor", "val/acc",
         "--model.lr_scheduler.mode", "max", "--model.lr_scheduler.patience", "0",
         "--model.lr_scheduler.threshold", "10"],
    ],
)  # fmt: skip
def test_schedules_of_pytorchs_go_on_exactly(run: Run, schedule: list[str]) -> None:
    base = ["--config", CONFIGS / "base.yaml", "--trainer.max_epochs", "4"]
    run("fit", *base, "--model.lr_scheduler", *schedule)
    run("fit", "--ckpt_path", checkpoint("base", 1))
    rates = [[groups(checkpoint("base", e, v))[0]["lr"] for e in (2, 3)] for v in (0, 1)]
    assert rates[0] == rates[1]
    assert rates[0][1] < rates[0][0] < 0.002
    assert is_same(*(weights(checkpoint("base", 3, version)) for version in (0, 1)))
    run("fit", "--ckpt_path", checkpoint("base", 0), "--model.optimizer.lr", "0.001")
    run("fit", "--ckpt_path", checkpoint("base", 1, 2))
    assert is_same(*(weights(checkpoint("base", 3, version)) for version in (2, 3)))
    if schedule[0] == "StepLR":
        run("fit", "--ckpt_path", checkpoint("base", 1), "--model.optimizer.lr", "0.001")
        halved = [groups(checkpoint("base", epoch, 4))[0]["lr"] for epoch in (2, 3)]
        assert halved == pytest.approx([rate / 2 for rate in rates[0]])


def groups(path: Path) -> list[dict[str, float]]:
    (state,) = torch.load(path, weights_only=True)["optimizer_states"]
    groups: list[dict[str, float]] = state["param_groups"]
    return groups


def test_the_schedule_goes_step_by_step(run: Run) -> None:
    often = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.filename", "{step}"]
    often += ["--checkpoint.monitor", "null"]
    wide = ["--data.batch_size", "200", "--trainer.max_epochs", "2"]
    run("fit", "--config", CONFIGS / "airbench94.yaml", *SMALL["fast94"], *wide, *often)
    found = Path("runs/airbench94/version_0/checkpoints")
    heads = [groups(found / f"{step}.ckpt")[2]["lr"] for step in range(1, 9)]
    assert heads == pytest.approx([0.02045 * (1 - step / 8) for step in range(1, 9)])
    bias = [groups(found / f"{step}.ckpt")[0]["lr"] for step in range(1, 9)]
    assert bias == pytest.approx([106 * max(0, 1 - step / 3) for step in range(1, 9)])


def test_without_validation_fast94_trains_on_everything(run: Run) -> None:
    everything = ["--data.val_size", "0", "--trainer.max_epochs", "1"]
    out = run("fit", "--config", CONFIGS / "fast94.yaml", *SMALL["fast94"], *everything)
    assert f"test --ckpt_path {checkpoint('fast94', 0)}" in out
    assert torch.load(checkpoint("fast94", 0), weights_only=True)["global_step"] == 10


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    ("network", "parameters"),
    [(DeepConvNet(), 541_738), (SpeedrunNet(), 1_972_792)],
    ids=["DeepConvNet", "SpeedrunNet"],
)
def test_networks_have_the_size_that_they_state(network: nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert f"{parameters:,} parameters" in (type(network).__doc__ or "")
    for batch_size in (1, 3):
        assert network.eval()(torch.rand(batch_size, 3, 32, 32)).shape == (batch_size, 10)


def test_the_first_layer_whitens_the_images_that_it_saw() -> None:
    smooth = F.interpolate(torch.rand(200, 3, 8, 8), size=32, mode="bilinear")
    images = smooth + 0.3 * torch.randn(200, 3, 32, 32)
    network = SpeedrunNet()
    network.init_from(images)
    assert not network.whiten.weight.requires_grad
    with torch.no_grad():
        outputs = F.conv2d(images, network.whiten.weight).transpose(0, 1).flatten(1)
    assert torch.equal(outputs[:12], -outputs[12:])
    moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    torch.testing.assert_close(moments, torch.eye(12), atol=0.02, rtol=0)
    learns = SpeedrunNet(whiten=False)
    before = learns.whiten.weight.clone()
    learns.init_from(images)
    assert torch.equal(learns.whiten.weight, before)
    assert learns.whiten.weight.requires_grad


def test_filters_begin_as_the_identity_where_asked_to() -> None:
    channels = torch.rand(2, 16, 8, 8)
    for dirac in (True, False):
        conv = SpeedrunNet((16, 16, 16), dirac=dirac).get_submodule("groups.1.conv1")
        assert torch.allclose(conv(F.pad(channels, [1] * 4)), channels) == dirac


def test_only_the_bias_of_batch_norm_learns_unless_asked_to() -> None:
    for learn_scale in (True, False):
        named = dict(SpeedrunNet(learn_scale=learn_scale).named_parameters())
        assert named["groups.0.norm1.bias"].requires_grad
        assert named["groups.0.norm1.weight"].requires_grad == learn_scale


def test_a_run_begins_with_whitened_training_images(run: Run, arrays: Path) -> None:
    run("fit", "--config", CONFIGS / "fast94.yaml", *SMALL["fast94"], "--trainer.max_epochs", "1")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    images = archive.load(arrays, verify=False).train_images[order[200:].sort().values] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    network = SpeedrunNet()
    network.init_from((images - mean) / std)
    trained = weights(checkpoint("fast94", 0))["network.whiten.weight"]
    torch.testing.assert_close(trained.abs(), network.whiten.weight.abs(), atol=1e-3, rtol=1e-3)


# ----------------------------------------------------------------------- test-time augmentation


def views(images: Tensor) -> list[Tensor]:
    padded = F.pad(images, [1] * 4, mode="reflect")
    shifted = [padded[:, :, :32, :32], padded[:, :, 2:, 2:]]
    return [view for one in (images, *shifted) for view in (one, one.flip(-1))]


def test_views_are_averaged_with_their_weights() -> None:
    network, images = SpeedrunNet((8, 8, 8)).eval(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        of_views = torch.stack([network(view) for view in views(images)])
        torch.testing.assert_close(average_over_views(network, images, "none"), of_views[0])
        torch.testing.assert_close(
            average_over_views(network, images, "mirror"), of_views[:2].mean(0)
        )
        torch.testing.assert_close(
            average_over_views(network, images, "mirror-shift"),
            of_views[:2].sum(0) / 4 + of_views[2:].sum(0) / 8,
        )


@pytest.mark.slow
def test_test_and_predict_average_over_views_and_fit_does_not(run: Run, arrays: Path) -> None:
    precise = ["--trainer.precision", "32-true", "--data.test_curve", "true"]
    run("fit", "--config", CONFIGS / "fast94.yaml", *SMALL["fast94"], *precise)
    path = checkpoint("fast94", 1)
    model = ImageClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
    data = archive.load(arrays, verify=False)
    images, labels = data.test_images / 255, data.test_labels.long()
    losses = {}
    for tta in ("none", "mirror-shift"):
        with torch.no_grad():
            losses[tta] = float(F.cross_entropy(average_over_views(model, images, tta), labels))
        flags = ["--model.tta", "none"] if tta == "none" else []  # otherwise set by the recipe
        run("test", "--ckpt_path", path, *flags)
        found = json.loads(Path("runs/fast94/version_0/test.json").read_text())
        assert found["test/loss"] == pytest.approx(losses[tta], abs=1e-5)
        assert found["tta"] == tta
    last = rows(Path("runs/fast94/version_0"))[-1]
    assert last["test/loss"] == pytest.approx(losses["none"], abs=1e-5)

    run("predict", "--ckpt_path", path)
    with torch.no_grad():
        assert model.temperature
        logits = average_over_views(model, images, "mirror-shift")
        expected = (logits / model.temperature).softmax(1)
    with Path("runs/fast94/version_0/predictions.csv").open() as file:
        found = [float(row["probability"]) for row in csv.DictReader(file)]
    assert found == pytest.approx(expected.max(1).values.tolist(), abs=1e-4)


def test_smoothed_labels_are_of_the_training_loss_only() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model = ImageClassifier(network, label_smoothing=0.2)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(8)
    logits = network(pixels / 255)
    smoothed = 0.8 * F.cross_entropy(logits, labels) - 0.02 * logits.log_softmax(1).sum(1).mean()
    torch.testing.assert_close(model._loss(pixels, labels, labels)[0], smoothed)
    model.eval().validation_step(Batch(pixels, labels, labels), 0)
    plain = model.val_metrics.compute()["loss"]
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels))


def test_mixed_images_train_and_resume(run: Run, fails: Run) -> None:
    mixing = ["--data.augment+=torchvision.transforms.v2.MixUp", "--data.augment.num_classes", "10"]
    three = ["--trainer.max_epochs", "3", "--model.label_smoothing", "0.1"]
    run("fit", "--config", BASE, *mixing, *three)
    run("fit", "--ckpt_path", checkpoint("base", 0))
    assert is_same(*(weights(checkpoint("base", 2, version)) for version in (0, 1)))
    weighted = ["--model.class_weights", str([1.0] * 10)]
    assert "labels that are not mixed" in fails("fit", "--config", BASE, *mixing, *weighted)


@pytest.mark.slow
def test_images_grow_with_the_epochs_and_after_resuming(run: Run, fails: Run) -> None:
    growing = [
        "--data.augment+=cifar10.augment.GrowingResize",
        "--data.augment.sizes",
        "[16,16,32]",
    ]
    fast = ["--config", CONFIGS / "airbench94.yaml", *SMALL["fast94"], "--trainer.max_epochs", "3"]
    run("fit", *fast, *growing)
    run("fit", *fast)
    run("fit", "--ckpt_path", checkpoint("airbench94", 1))
    first, plain, resumed = (weights(checkpoint("airbench94", 2, version)) for version in range(3))
    assert not is_same(first, plain)
    assert is_same(first, resumed)
    message = fails("fit", "--config", BASE, *growing, "--model.network", "networks.ConvNet")
    assert "model.network ConvNet does not take images [B, 3, 16, 16]" in message
    no_end = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00"]
    message = fails("fit", *fast, *growing, "--model.lr_scheduler", "null", *no_end)
    assert "data.augment needs to know when training ends: set trainer.max_epochs" in message
    finder = ["--trainer.callbacks+=BatchSizeFinder"]
    assert "only see GrowingResize's smallest images" in fails("fit", *fast, *growing, *finder)


def test_the_proxy_picks_what_trains_and_trains_on_it_too() -> None:
    torch.manual_seed(0)
    network, proxy = (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)) for _ in range(2))
    model = ImageClassifier(network, proxy=proxy, hardest=0.3, label_smoothing=0.1)
    pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(9)
    model.compiled_for = 10  # no batch of this size is compiled
    loss, correct = model.step_loss(pixels, labels, labels)
    weight = proxy.get_parameter("1.weight")
    gradient = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
    of_proxy, of_network = (smooth(one(pixels / 255), labels) for one in (proxy, network))
    hardest = of_proxy.argsort(descending=True)[:3]  # 0.3 of 9, rounded up
    torch.testing.assert_close(loss, of_network[hardest].mean())
    right = (network(pixels / 255).argmax(1) == labels)[hardest].sum()
    assert correct == right
    expected = torch.autograd.grad(of_proxy[hardest].mean(), weight)[0]
    torch.testing.assert_close(gradient, expected)
    for wrong in ({"proxy": proxy, "hardest": 0.0}, {"hardest": 0.5}):
        with pytest.raises(
            MisconfigurationException, match="needs model.proxy and must be above 0"
        ):
            ImageClassifier(network, **wrong)
    with pytest.raises(MisconfigurationException, match="model.proxy Linear does not take images"):
        ImageClassifier(network, proxy=nn.Linear(3, 10))


@pytest.mark.slow
def test_fast96_is_tested_and_used_without_its_proxy(run: Run) -> None:
    fast = ["--config", CONFIGS / "fast96.yaml", *SMALL["fast96"], "--trainer.max_epochs", "3"]
    run("fit", *fast)
    path = checkpoint("fast96", 2)
    before = weights(path)
    assert "proxy.head.weight" in before
    assert "test/acc" in run("test", "--ckpt_path", path)
    run("fit", *fast, "--model.weights", path, "--trainer.max_epochs", "1")
    again = weights(checkpoint("fast96", 0, 1))
    assert torch.equal(again["proxy.whiten.weight"], before["proxy.whiten.weight"]), "whitened"
    network = SpeedrunNet((16, 16, 16), residual=True)
    ImageClassifier.load_from_checkpoint(path, network=network, proxy=None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_a_recipe_trains_in_two_processes_and_is_exported(
    run: Run, arrays: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    fit = ["fit", "--config", CONFIGS / f"{recipe}.yaml", *SMALL[recipe], *on(arrays)]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu"]
    command = [sys.executable, ROOT / "train.py", *fit, *two, "--trainer.max_epochs", "4"]
    subprocess.run([str(word) for word in command], check=True)
    path = checkpoint(recipe, 3)
    assert "test/acc" in run("test", "--ckpt_path", path, "--trainer.devices", "1")
    assert rows(Path(f"runs/{recipe}/version_0"))[-1]["val/acc"] > 0.4
    export.main(["--ckpt_path", str(path), "--format", "onnx", "--out", "model.onnx"])
    assert "test images: same classes" in capsys.readouterr().out


def test_a_group_whose_time_is_over_costs_no_gradient(arrays: Path) -> None:
    class Watch(Callback):
        trains: ClassVar[list[bool]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.trains.append(pl_module.network.whiten.bias.grad is not None)

    groups = {"bias": Group("whiten.bias", lr=0.1, until=0.5), "rest": Group("[gh]*", lr=0.01)}
    model = ImageClassifier(
        SpeedrunNet((8, 8, 8)),
        optimizer=lambda named: MuonSGD(named, groups),
        lr_scheduler=LinearDecay,
    )
    data = CIFAR10DataModule(str(arrays), verify=False, batch_size=200, val_size=200)
    for _ in range(2):  # another fit trains it again
        Watch.trains.clear()
        Trainer(max_epochs=2, callbacks=Watch(), **QUIET).fit(model, datamodule=data)
        assert Watch.trains == [True] * 4 + [False] * 4


# ---------------------------------------------------------------------------- earlier versions

RELEASED = Path(__file__).parent / "data"
EXPECTED = json.loads((RELEASED / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_checkpoints_of_released_versions_are_read_for_ever(
    run: Run, arrays: Path, name: str
) -> None:
    shutil.copytree(arrays, "data")  # the folder that they name
    path = Path("released.ckpt")
    shutil.copy(RELEASED / name, path)
    run("test", "--ckpt_path", path)
    result = json.loads(Path("released/test.json").read_text())
    assert {key: result[key] for key in EXPECTED[name]} == pytest.approx(EXPECTED[name], abs=1e-4)
    assert result["changed"] == {}, "arguments that it lacks are off"
    epochs = torch.load(path, weights_only=True)["epoch"] + 1
    out = run("fit", "--ckpt_path", path, "--trainer.max_epochs", epochs + 1)
    assert "is reset" not in out, "the optimizer keeps its state"
    (folder,) = Path("runs").glob("*/version_0")
    assert [row["epoch"] for row in rows(folder)] == list(range(epochs + 1))
    changed = json.loads((folder / "run.json").read_text())["parts"][-1]["changed"]
    assert {key for key in changed if "." in key and " " not in key} <= {"trainer.max_epochs"}
