"""What is reported on a trained model: the test report, the card, TensorBoard, predictions."""

import copy
import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

import train
from calibration import fit_temperature
from cifar10 import archive
from cifar10.batches import Batch, Predictions
from cifar10.pictures import read_picture
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import ConvNet
from reports import compare, folds, judges
from reports.card import flops
from reports.evaluation import Evaluation
from reports.focus import grad_cam
from reports.saved import read_saved
from tests.conftest import BASE, QUIET, TEST_SIZE, Run
from tests.test_train import CONVNET

RUN_0 = Path("runs/base/version_0")
LAST = RUN_0 / "checkpoints/last.ckpt"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------- the numbers


def some_predictions(size: int = 2000, seed: int = 0) -> Predictions:
    """Return calibrated predictions: labels are drawn from their probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(size, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return Predictions(logits, labels, torch.arange(size))


def test_accuracy_has_the_interval_of_wilson() -> None:
    found = Evaluation(some_predictions())
    test = found.test
    right = int((test.logits.argmax(1) == test.labels).sum())
    assert found.accuracy == right / 2000
    assert (found.low, found.high) == pytest.approx(proportion_confint(right, 2000), abs=1e-6)


def test_classes_are_counted_from_the_confusion_matrix() -> None:
    found = Evaluation(some_predictions())
    logits, labels, _ = found.test
    predicted = logits.argmax(dim=1)
    for true, taken in ((0, 0), (3, 5), (9, 1)):
        count = ((labels == true) & (predicted == taken)).sum()
        assert found.confusion[true, taken] == count
    values = found.values()
    right = ((labels == 3) & (predicted == 3)).sum().item()
    precision, recall = right / (predicted == 3).sum().item(), right / (labels == 3).sum().item()
    cat = values["classes"]["cat"]
    assert cat["precision"]["value"] == pytest.approx(precision, abs=1e-6)
    assert cat["recall"]["value"] == pytest.approx(recall, abs=1e-6)
    assert cat["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    confidence = logits.softmax(dim=1).max(dim=1).values[predicted == 3].mean().item()
    assert cat["confidence"] == pytest.approx(confidence, abs=1e-5)
    never = logits.clone()
    never[:, 9] = -100.0
    trucks = Evaluation(found.test._replace(logits=never)).values()["classes"]["truck"]
    assert trucks["confidence"] is trucks["precision"] is None
    top2 = (logits.topk(2).indices == labels[:, None]).any(dim=1).float().mean().item()
    assert values["top2_accuracy"] == pytest.approx(top2, abs=1e-6)


def test_temperature_undoes_what_made_the_logits_too_large() -> None:
    test, val = some_predictions(5000), some_predictions(5000, seed=1)
    temperature = fit_temperature(3 * val.logits, val.labels)
    assert temperature == pytest.approx(3, rel=0.05)
    sure = Evaluation(test._replace(logits=3 * test.logits), temperature)
    assert sure.as_trained.ece > 0.2
    assert sure.probabilities.ece < 0.03
    assert sure.as_trained.values()["nll"] > sure.probabilities.values()["nll"]


def test_the_error_of_a_calibrated_model_is_what_chance_has() -> None:
    found = [Evaluation(some_predictions(2000, seed)) for seed in range(40)]
    mean = np.mean([of.probabilities.ece for of in found])
    assert mean == pytest.approx(np.mean([of.chance["mean"] for of in found]), rel=0.1)
    above = sum(of.probabilities.ece > of.chance["most"] for of in found)
    assert above <= 6, "one in twenty"
    logits, labels, indices = some_predictions(2000)
    too_sure = Evaluation(Predictions(1.5 * logits, labels, indices))
    assert too_sure.probabilities.ece > too_sure.chance["most"]


def test_a_confident_mistake_has_a_finite_loss() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 0] = 500
    labels = torch.tensor([0, 1, 2])
    found = Evaluation(Predictions(logits, labels, labels)).values()["calibration"]
    assert found["nll"] == pytest.approx(F.cross_entropy(logits, labels).item())


def test_the_numbers_of_probabilities_are_those_of_scikit_learn() -> None:
    logits, labels, _ = some_predictions(3000)
    for temperature in (0.5, 1.0, 2.0):
        probabilities = (logits / temperature).double().softmax(dim=1)
        found = Evaluation(Predictions(logits, labels, torch.arange(3000)), temperature)
        values = found.values()["calibration"]
        expected = probabilities.numpy()
        assert values["nll"] == pytest.approx(
            log_loss(labels, expected, labels=range(10)), abs=1e-6
        )
        brier = brier_score_loss(labels, expected, labels=range(10), scale_by_half=False)
        assert values["brier"] == pytest.approx(brier, abs=1e-6)
        confidence, is_right = expected.max(axis=1), expected.argmax(axis=1) == labels.numpy()
        accuracies, means = calibration_curve(is_right, confidence, n_bins=15, strategy="quantile")
        assert values["ece"] == pytest.approx(abs(accuracies - means).mean(), abs=1e-4)
        risks = [1 - is_right[confidence >= least].mean() for least in confidence]
        assert values["aurc"] == pytest.approx(np.mean(risks), abs=1e-6)
        sure = confidence >= 0.95
        assert values["confident"]["0.95"]["coverage"] == pytest.approx(sure.mean(), abs=1e-6)
        right = pytest.approx(is_right[sure].mean(), abs=1e-6) if sure.any() else None
        assert values["confident"]["0.95"]["accuracy"] == right
        for i, name in enumerate(archive.CLASSES):
            recall = found.values()["classes"][name]["recall"]
            of_class = (labels == i).numpy()
            ends = proportion_confint(is_right[of_class].sum(), of_class.sum())
            assert (recall["low"], recall["high"]) == pytest.approx(ends, abs=1e-6)


def proportion_confint(correct: int, images: int) -> tuple[float, float]:
    """Return Wilson's interval by its formula."""
    share, z = correct / images, 1.959964
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    return middle - z * half / (1 + z * z / images), middle + z * half / (1 + z * z / images)


# ------------------------------------------------------------------------------------- the report


def test_the_report_says_what_a_plain_loop_finds(run: Run, arrays: Path) -> None:
    run(
        "fit",
        "--config",
        BASE,
        *CONVNET,
        "--data.test_curve",
        "true",
        "--model.optimizer.lr",
        "1e-4",
    )
    out = run("test", "--ckpt_path", LAST)
    result = json.loads((RUN_0 / "test.json").read_text())

    network = ConvNet().eval()
    network.load_state_dict(torch.load(RUN_0 / "model.pth", weights_only=True))
    data = archive.load(arrays, verify=False)
    with torch.no_grad():
        logits = network(data.test_images / 255)
    right = int((logits.argmax(dim=1) == data.test_labels).sum())
    assert result["accuracy"]["value"] == pytest.approx(right / TEST_SIZE)
    assert result["accuracy"]["value"] == pytest.approx(
        float(rows(RUN_0 / "metrics.csv")[-1]["test/acc"])
    )
    loss = F.cross_entropy(logits, data.test_labels.long()).item()
    assert result["as_trained"]["nll"] == pytest.approx(loss, abs=1e-4)
    assert result["test/loss"] == pytest.approx(loss, abs=1e-4)
    saved = np.load(RUN_0 / "test.npz")
    assert saved["logits"] == pytest.approx(logits.numpy(), abs=1e-4)
    assert (saved["labels"] == data.test_labels.numpy()).all()
    assert sum(result["confusion"][i][i] for i in range(10)) == right
    assert result["temperature"] > 0
    assert f"accuracy     {right / TEST_SIZE:.2%}, 95 % interval" in out
    assert "confused with" in out

    names = ("confusion", "reliability", "coverage", "mistakes", "focus")
    for name in names:
        assert (RUN_0 / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(RUN_0)).Reload()
    images = {"train/images", *(f"test/{name}" for name in names)}
    assert images == set(events.Tags()["images"])
    assert events.Images("test/confusion")[0].step == 32
    assert events.Tags()["graph"]

    card = (RUN_0 / "model.md").read_text()
    for words in ("78,658 parameters", "not CIFAR-10 as published", "split_seed 0", "commit ",
                  "**Seed**: 0", "config.yaml", "200 of the training images", "**Epochs**: 2 of 2",
                  "million FLOPs an image", "Of epoch 1 (`last.ckpt`)",
                  f"accuracy     {right / TEST_SIZE:.2%}"):  # fmt: skip
        assert words in card
    run("test", "--ckpt_path", RUN_0 / "checkpoints/epoch_00.ckpt")
    again = (RUN_0 / "model.md").read_text()
    assert again.count("## On the test set") == 1
    assert "Of epoch 0 (`epoch_00.ckpt`)" in again


def test_grad_cam_is_where_the_class_is() -> None:
    # A convolution that passes brightness on, and classes that weigh the mean of its map.
    conv = nn.Conv2d(3, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    head = nn.Linear(1, 10, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.arange(10)[:, None] - 4.5)  # brightness favours the last classes
    network = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    images = torch.zeros(2, 3, 32, 32)
    images[0, :, 4:8, 20:30], images[1, :, 16:, :] = 1, 0.5
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.inference_mode():
        found = grad_cam(network, images, torch.tensor([9, 9]))
        none = grad_cam(network, images, torch.tensor([0, 0]))
        assert grad_cam(flat, images, torch.tensor([0, 0])) is None
    assert found is not None
    assert none is not None
    assert torch.equal(found, (images[:, 0] > 0).float())
    assert not none.any(), "what is bright speaks against these"
    assert network[0].weight.grad is None
    # Batch norm cancels the convolution's bias: the zero of its maps is arbitrary.
    shifted = copy.deepcopy(network)
    shifted[0].bias = nn.Parameter(torch.full((1,), -9.0))
    norm = nn.BatchNorm2d(1, eps=0).eval()
    norm.running_mean = torch.tensor([-9.0])
    shifted.insert(1, norm)
    same = grad_cam(shifted, images, torch.tensor([9, 9]))
    assert same is not None
    torch.testing.assert_close(same, found)
    half = grad_cam(network.bfloat16(), images, torch.tensor([9, 9]))
    assert half is not None
    torch.testing.assert_close(half, found)


def test_flops_are_those_of_products_and_sums() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8192, 10))
    assert flops(nn.Sequential(*layers)) == 2 * (3 * 9 * 8 * 32 * 32 + 8192 * 10)


def test_probabilities_are_calibrated_by_what_validation_says(
    run: Run, arrays: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("fit", "--config", BASE, once=True)
    model = ImageClassifier.load_from_checkpoint(LAST).eval()
    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    data.setup()
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        validated = model(batch.images / 255)
        temperature = fit_temperature(validated, batch.labels)
        logits = model(data.test_set.images[:20] / 255)
    assert model.temperature == pytest.approx(temperature, rel=1e-4)
    assert abs(temperature - 1) > 0.05
    largest = (validated / temperature).softmax(dim=1).max(dim=1).values
    assert (largest < model.calibration.unsure_below).sum() == 10, "a twentieth of 200"
    for flags, divisor in (((), temperature), (("--model.calibrate", "false"), 1)):
        run("predict", "--ckpt_path", LAST, *flags)
        expected = (logits / divisor).softmax(dim=1).max(dim=1).values.tolist()
        found = [float(row["probability"]) for row in rows(RUN_0 / "predictions.csv")[:20]]
        assert found == pytest.approx(expected, abs=2e-4)
        least = model.calibration.unsure_below
        sure = ["" if divisor == 1 else "yes" if p >= least else "no" for p in expected]
        assert [row["sure"] for row in rows(RUN_0 / "predictions.csv")[:20]] == sure

    # The same in every training precision, because exports compute in 32 bits too.
    half = ("--trainer.precision", "bf16-mixed", "--trainer.max_epochs", "1", "--name", "half")
    run("fit", "--config", BASE, *half)
    last = Path("runs/half/version_0/checkpoints/last.ckpt")
    monkeypatch.setattr(train, "bf16_is_slow", lambda: False)
    run("predict", "--ckpt_path", last)
    half_model = ImageClassifier.load_from_checkpoint(last).eval()
    with torch.no_grad():
        expected = half_model.probabilities(data.test_set.images).max(dim=1).values
    found = [float(row["probability"]) for row in rows(last.parents[1] / "predictions.csv")]
    assert found == pytest.approx(expected.tolist(), abs=2e-4)

    # Trained on all images, the twin takes the temperature of `LAST`.
    run("fit", "--config", BASE, "--data.val_size", "0", "--name", "twin", "--model.calibrate",
        LAST, "--trainer.max_epochs", "1")  # fmt: skip
    twin = Path("runs/twin/version_0/checkpoints/last.ckpt")
    assert torch.load(twin, weights_only=True)["temperature"] == model.temperature
    assert f"a temperature of {LAST}" in (twin.parents[1] / "model.md").read_text()
    smooth = ["--model.calibrate", str(LAST), "--model.label_smoothing", "0.2"]
    train.main(["validate", "--ckpt_path", str(LAST), *smooth])
    said = capsys.readouterr().err
    assert f"model.calibrate {LAST} was trained with label_smoothing 0.0, not 0.2" in said
    LAST.rename(LAST.with_name("gone.ckpt"))
    run("fit", "--ckpt_path", twin, "--trainer.max_epochs", "2")
    assert "with model.calibrate" not in run(
        "test", "--ckpt_path", twin, "--model.calibrate", "auto"
    )
    result = json.loads((twin.parents[1] / "test.json").read_text())
    assert result["temperature"] == pytest.approx(temperature, rel=1e-4)
    assert f"a temperature of {LAST}" in (twin.parents[1] / "model.md").read_text()


def test_a_model_that_is_right_everywhere_has_no_temperature(run: Run, fails: Run) -> None:
    """The best temperature would be 0, which makes every probability 1."""
    run("fit", "--config", BASE, "--model.network", "tests.small.Flat", "--data.val_size", "10",
        "--data.stratify", "true", "--trainer.max_epochs", "6")  # fmt: skip
    checkpoint = torch.load(LAST, weights_only=True)
    (row,) = (r for r in checkpoint["callbacks"]["History"]["rows"] if r["epoch"] == 5)
    assert row["val/acc"] == 1
    assert checkpoint["temperature"] is None
    assert "was right on every validation image" in run("predict", "--ckpt_path", LAST)


def test_a_temperature_is_of_the_weights_that_it_is_saved_with(run: Run, arrays: Path) -> None:
    every_other = ("--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2")
    run("fit", "--config", BASE, *every_other)
    for name, has_one in (("epoch_01.ckpt", True), ("last.ckpt", False)):
        checkpoint = torch.load(LAST.with_name(name), weights_only=True)
        assert (checkpoint["temperature"] is not None) == has_one
    # The card has the chosen epoch's temperature; weights trained further have none.
    assert "**Probabilities**: calibrated" in (RUN_0 / "model.md").read_text()
    all_images = ("--data.val_size", "0", "--trainer.max_epochs", "4")
    run("fit", "--ckpt_path", LAST.with_name("epoch_01.ckpt"), *all_images, "--name", "on")
    on = Path("runs/on/version_0")
    assert "**Probabilities**: not calibrated" in (on / "model.md").read_text()
    assert torch.load(on / "checkpoints/last.ckpt", weights_only=True)["temperature"] is None
    # A run resumed from a validated checkpoint keeps its temperature.
    early = ("--name", "early", "--checkpoint.save_on_train_epoch_end", "false")
    run("fit", "--config", BASE, *early, "--trainer.max_epochs", "1")
    last = Path("runs/early/version_0/checkpoints/last.ckpt")
    temperature = torch.load(last, weights_only=True)["temperature"]
    last.unlink()
    run("fit", "--ckpt_path", last.with_name("epoch_00.ckpt"))
    assert torch.load(last, weights_only=True)["temperature"] == temperature is not None
    # ModelPruning changes the weights between validation and checkpoint.
    pruning = "lightning.pytorch.callbacks.ModelPruning"
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", "--name", "changed",
        "--trainer.callbacks", pruning,
        "--trainer.callbacks.pruning_fn", "l1_unstructured")  # fmt: skip
    last = sorted(Path("runs/changed").glob("*/checkpoints/*.ckpt"))[-1]
    assert torch.load(last, weights_only=True)["temperature"] is None

    # Checkpoints of earlier versions have no temperature; shared ones have 16 bits.
    older = torch.load(LAST.with_name("epoch_01.ckpt"), weights_only=True)
    del older["temperature"]
    torch.save(older, "older.ckpt")
    run("fit", "--ckpt_path", "older.ckpt", "--trainer.max_epochs", "3", "--name", "older")
    half = {name: weight.half() for name, weight in older["state_dict"].items()}
    shared = {k: v for k, v in older.items() if k not in ("optimizer_states", "lr_schedulers")}
    torch.save({**shared, "temperature": 2.0, "state_dict": half}, "half.ckpt")

    class Breaks(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise RuntimeError("in the middle of a validation")

    data = CIFAR10DataModule(str(arrays), verify=False, val_size=200)
    trainer = Trainer(**QUIET)
    trainer.validate(ImageClassifier.load_from_checkpoint("half.ckpt"), data)
    trainer.save_checkpoint("again.ckpt")
    assert torch.load("again.ckpt", weights_only=False)["temperature"] == 2
    model = ImageClassifier(ConvNet())
    settings = {**QUIET, "max_epochs": 1, "num_sanity_val_steps": 2}
    Trainer(**settings, limit_val_batches=0).fit(model, data)
    assert model.temperature is None
    with pytest.raises(RuntimeError, match="in the middle"):
        Trainer(**QUIET, max_epochs=1, callbacks=[Breaks()]).fit(model, data)
    Trainer(**settings).fit(model, data)
    with torch.no_grad():
        (batch,) = data.val_dataloader()
        logits = model.eval()(batch.images / 255)
    assert model.temperature == pytest.approx(fit_temperature(logits, batch.labels), rel=1e-4)

    class Stops(Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    model = ImageClassifier(ConvNet())
    with pytest.raises(SystemExit):
        Trainer(**QUIET, max_epochs=1, callbacks=[Stops()]).fit(model, data)
    Trainer(**QUIET).test(model, data)
    assert model.temperature is None


def test_without_a_validation_set_probabilities_are_not_calibrated(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, "--data.val_size", "0", "--trainer.max_epochs", "1")
    assert "not calibrated" in (RUN_0 / "model.md").read_text()
    for command in ("test", "predict"):
        assert "probabilities are not calibrated" in run(command, "--ckpt_path", LAST)
    result = json.loads((RUN_0 / "test.json").read_text())
    assert result["temperature"] is None
    assert result["as_trained"]["ece"] == result["calibration"]["ece"]
    assert result["accuracy"]["low"] < result["accuracy"]["value"] < result["accuracy"]["high"]
    taken = ("--ckpt_path", LAST, "--model.calibrate", LAST)
    assert "has no temperature: it was not validated before saving" in fails("predict", *taken)


def test_a_part_of_a_test_is_no_result(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", "--data.val_size", "800",
        "--data.batch_size", "100")  # fmt: skip
    run("test", "--ckpt_path", LAST)
    (RUN_0 / "test.json").unlink()
    assert "no image was tested" in fails(
        "test", "--ckpt_path", LAST, "--trainer.limit_test_batches", "0"
    )
    assert not (RUN_0 / "test.json").exists()


def test_a_network_that_says_no_numbers_is_not_evaluated(run: Run, fails: Run) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["state_dict"]["network.4.bias"][3] = math.nan
    torch.save(checkpoint, LAST)
    assert "outputs are NaN" in fails("test", "--ckpt_path", LAST)
    assert not (RUN_0 / "test.json").exists()


def test_tensorboard_shows_rates_norms_and_confusions_and_changes_nothing(
    run: Run, tmp_path: Path
) -> None:
    augment = tmp_path / "augment.yaml"
    augment.write_text("data:\n  augment:\n    - class_path: cifar10.augment.RandomFlip\n")
    schedule = ("--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR",
                "--model.lr_scheduler.step_size", "1")  # fmt: skip
    both = ("fit", "--config", BASE, *CONVNET, "--config", augment, *schedule)
    run(*both, "--name", "watched", "--trainer.callbacks+=callbacks.ConfusionMatrix",
        "--trainer.callbacks.every_n_epochs", "2")  # fmt: skip
    run(*both, "--name", "alone", "--trainer.logger", "false")
    events = EventAccumulator("runs/watched/version_0").Reload()
    assert [e.value for e in events.Scalars("lr-Adam")] == pytest.approx([0.002, 0.0002])
    weights = torch.load("runs/watched/version_0/model.pth", weights_only=True)
    norm = events.Scalars("weight_norm/conv1.0")[-1].value
    assert norm == pytest.approx(weights["conv1.0.weight"].norm().item(), rel=1e-5)
    assert len(events.Scalars("weight_norm/dense3")) == 2
    assert len(events.Images("val/confusion")) == 1
    alone = torch.load("runs/alone/version_0/model.pth", weights_only=True)
    assert all(torch.equal(weights[key], alone[key]) for key in weights)


def test_what_people_say_of_the_images_is_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = some_predictions(1000)
    predicted, labels = test.logits.argmax(1), test.labels
    wrong = (predicted != labels).nonzero()[:, 0].tolist()
    folder = tmp_path / judges.JUDGES
    assert judges.read_judgements(folder) is None
    folder.mkdir()
    seen = 50 * np.eye(10, dtype=int)[labels.numpy()]
    for i in wrong[:7]:  # most people make these mistakes
        seen[i] = 49 * np.eye(10, dtype=int)[int(predicted[i])]
    for i in wrong[7:10]:  # some make these
        seen[i, int(predicted[i])] = 10
    seen[wrong[10], int(predicted[wrong[10]])] = 1  # a slip
    np.save(folder / judges.SEEN, seen)
    pairs = "".join(f"{i},{i},0.1,1\n" for i in (*wrong[:2], 5, 5))
    (folder / judges.DUPLICATES).write_text(f"TestID,TrainID,Distance,Judgment\n{pairs}")
    votes = {wrong[0]: 2, wrong[3]: 0, wrong[4]: 3}
    (folder / judges.JUDGED).write_text(
        json.dumps([{"id": i, "mturk": {"given": n, "guessed": 5 - n}} for i, n in votes.items()])
    )
    with pytest.raises(MisconfigurationException, match="is damaged, or another version"):
        judges.read_judgements(folder)
    sums = {file.name: pooch.file_hash(str(file)) for file in folder.iterdir()}
    sources = {name: of._replace(sha256=sums[name]) for name, of in judges.SOURCES.items()}
    monkeypatch.setattr(judges, "SOURCES", sources)
    found = Evaluation(test, None, judges.read_judgements(folder))
    of = found.values()["people"]
    # Of 1,000: two duplicates among the mistakes and one that may be right; two wrong labels.
    duplicates, right = {*wrong[:2], 5}, 1000 - len(wrong)
    kept = right - (5 not in wrong)
    assert of["without_duplicates"]["images"] == 1000 - len(duplicates)
    expected = pytest.approx(kept / (1000 - len(duplicates)), abs=1e-6)
    assert of["without_duplicates"]["accuracy"] == expected
    assert of["without_doubtful_labels"]["accuracy"] == pytest.approx(right / 998, abs=1e-6)
    assert of["without_both"]["images"] == 1000 - len(duplicates | {wrong[0], wrong[3]})
    assert (of["mistakes_of_most_people"], of["mistakes_of_some_people"]) == (7, 10)
    assert "without doubtful labels" in found.summary()


def test_two_models_are_compared_on_the_same_images(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("fit", "--config", BASE, once=True)
    run("test", "--ckpt_path", LAST)
    run("test", "--ckpt_path", LAST.with_name("epoch_00.ckpt"))
    first = (RUN_0 / "test.npz").rename(tmp_path / "first.npz")
    run("test", "--ckpt_path", LAST)
    compare.main([str(first), str(RUN_0)])
    printed = capsys.readouterr().out
    right = [
        of["logits"].argmax(1) == of["labels"] for of in map(np.load, (first, RUN_0 / "test.npz"))
    ]
    assert f"{100 * (right[1].mean() - right[0].mean()):+.2f} points" in printed
    compare.main([str(RUN_0), str(RUN_0)])
    assert "+0.00 points, 95 % interval +0.00 to +0.00" in capsys.readouterr().out

    with np.load(first) as content:
        np.savez(tmp_path / "other.npz", **{**content, "images": "other images"})
    for path, words in (("nowhere", "train.py test"), (LAST, "was not written by `train.py test`"),
                        (tmp_path / "other.npz", "different test images")):  # fmt: skip
        with pytest.raises(SystemExit, match=words):
            compare.main([str(RUN_0), str(path)])


def test_folds_predict_every_training_image_once(
    run: Run, arrays: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for fold in range(3):
        flags = ("--data.folds", 3, "--data.fold", fold, "--name", "folds")
        run("fit", "--config", BASE, *flags, "--trainer.max_epochs", 1)
        last = Path(f"runs/folds/version_{fold}/checkpoints/last.ckpt")
        found.append(float(run("validate", "--ckpt_path", last).split()[5]))
    folders = [f"runs/folds/version_{fold}" for fold in range(3)]
    folds.main(folders)
    printed = capsys.readouterr().out
    whole = read_saved(Path("out_of_fold.npz"))
    labels = archive.load(arrays, verify=False).train_labels.numpy()
    assert (whole.labels == labels).all()
    sizes = [334, 333, 333]
    right = sum(share * size for share, size in zip(found, sizes, strict=True))
    assert whole.is_right.sum() == pytest.approx(right, abs=0.2)
    low, high = proportion_confint(int(whole.is_right.sum()), 1000)
    assert f"95 % interval {100 * low:.2f} to {100 * high:.2f}" in printed
    assert "in none" not in printed
    folds.main(folders[:2])
    assert "at least 332 images are in none of these folds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="two folds share an image"):
        folds.main([*folders, folders[0]])
    with pytest.raises(SystemExit, match="train.py validate --ckpt_path CHECKPOINT writes it"):
        folds.main(["nowhere.npz"])


def test_the_comparison_is_mcnemars_and_its_interval_covers() -> None:
    first, second = np.zeros(10_000, bool), np.zeros(10_000, bool)
    first[:930], second[60:1000] = True, True
    found = compare.comparison(first, second)
    assert (found["only_first"], found["only_second"]) == (60, 70)
    # the exact test by its definition: a fair coin for each image that only one gets right
    tail = sum(math.comb(130, k) for k in range(61)) / 2**130
    assert found["p"] == pytest.approx(2 * tail)
    gains = second.astype(float) - first
    error = gains.std() / 100
    assert found["difference"] == pytest.approx(0.001)
    assert found["low"] == pytest.approx(0.001 - 1.96 * error, abs=2e-4)
    assert found["high"] == pytest.approx(0.001 + 1.96 * error, abs=2e-4)


# ------------------------------------------------------------------------------------- pictures


@pytest.fixture
def pictures(arrays: Path, tmp_path: Path) -> Path:
    """A folder with the first test images as PNG."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i, image in enumerate(archive.load(arrays, verify=False).test_images[:20]):
        name = f"more/{i:02}.png" if i >= 10 else f"{i:02}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
    (folder / ".hidden").write_text("")
    return folder


def test_pictures_are_predicted_as_the_test_images_they_are(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    run("fit", "--config", BASE, once=True)
    run("predict", "--ckpt_path", LAST)
    expected = rows(RUN_0 / "predictions.csv")
    nowhere = ("--data.root", tmp_path / "no data set is needed")
    out = run("predict", "--ckpt_path", LAST, "--data.images", pictures, *nowhere)
    found = rows(RUN_0 / "predictions.csv")
    assert [Path(row["file"]).stem for row in found] == [f"{i:02}" for i in range(20)]
    for row, other in zip(found, expected, strict=False):
        for key in ("class", "runner_up"):
            assert row[key] == other[key]
        for key in ("probability", *(f"p_{name}" for name in archive.CLASSES)):
            assert float(row[key]) == pytest.approx(float(other[key]), abs=2e-4)
        every = {name: float(row[f"p_{name}"]) for name in archive.CLASSES}
        assert sum(every.values()) == pytest.approx(1, abs=1e-5)
        assert every[row["class"]] == max(every.values()) == float(row["probability"])
    assert "pictures/07.png" in out
    assert found[7]["class"] in out
    for words, count in (
        (pictures / "*.png", 10),
        (pictures / "**/*.png", 20),
        (f"[{pictures / '00.png'}, {pictures / 'more'}]", 11),
    ):
        run("predict", "--ckpt_path", LAST, "--data.images", words, *nowhere)
        assert len(rows(RUN_0 / "predictions.csv")) == count
    assert "not sure" not in out
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save(checkpoint | {"unsure_below": 1.1}, LAST)
    out = run("predict", "--ckpt_path", LAST, "--data.images", pictures / "07.png", *nowhere)
    assert f"not sure: {found[7]['class']}" in out


def test_pictures_are_explained(run: Run, fails: Run, pictures: Path) -> None:
    run("fit", "--config", BASE, once=True)
    explain = ("predict", "--ckpt_path", LAST, "--data.images", pictures, "--explain", "true")
    assert "feature maps of at least 3 x 3 pixels" in fails(*explain)
    run("fit", "--config", BASE, *CONVNET, "--name", "conv", "--trainer.max_epochs", "1")
    last = Path("runs/conv/version_0/checkpoints/last.ckpt")
    run("predict", "--ckpt_path", last, *explain[3:])
    explained = sorted(Path("runs/conv/version_0/explained").iterdir())
    assert [file.name for file in explained] == [f"{i:04}_{i:02}.png" for i in range(20)]
    beside = np.asarray(Image.open(explained[7]))
    assert (beside[::8, :256:8] == np.asarray(Image.open(pictures / "07.png"))).all()
    assert not (beside[::8, 256::8] == beside[::8, :256:8]).all()
    long = pictures / f"{'n' * 240}.png"
    (pictures / "07.png").rename(long)
    run("predict", "--ckpt_path", last, "--data.images", long, "--explain", "true")
    (only,) = Path("runs/conv/version_0/explained").iterdir()  # the earlier ones are gone
    assert only.name == f"0000_{'n' * 50}.png"
    run("predict", "--ckpt_path", last, "--data.images", long)
    assert not list(Path("runs/conv/version_0/explained").iterdir()), "they are of another one"
    assert "--explain needs --data.images" in fails("predict", "--ckpt_path", last, *explain[-2:])
    run("test", "--ckpt_path", last, "--model.calibrate", "false")
    assert "model.calibrate False (not auto)" in read_saved(last.parents[1]).model
    assert "has another network" in fails("test", "--ckpt_path", last, "--model.calibrate", LAST)


def test_a_file_that_is_no_picture_is_named_and_the_rest_is_done(
    run: Run, fails: Run, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--config", BASE, "--trainer.max_epochs", "1", once=True)
    (pictures / "05.png").write_bytes((pictures / "05.png").read_bytes()[:200])
    (pictures / "notes [1].txt").write_text("no picture")
    with pytest.raises(SystemExit, match="error: 2 of 21 files could not be read"):
        run("predict", "--ckpt_path", LAST, "--data.images", pictures)
    printed = capsys.readouterr()
    assert "05.png: not an image, or damaged" in printed.err
    assert "notes [1].txt: not an image" in printed.err
    assert len(rows(RUN_0 / "predictions.csv")) == 19
    assert "no matching file" in fails(
        "predict", "--ckpt_path", LAST, "--data.images", "nowhere.jpg"
    )
    assert "data.images is empty" in fails("predict", "--ckpt_path", LAST, "--data.images", "")
    assert not list(RUN_0.glob(".*"))


def square(size: int, *, turned: bool = False) -> Image.Image:
    """Return an image, red on the left and blue on the right; turned, on top and below."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[:, : size // 2, 0] = pixels[:, size // 2 :, 2] = 200
    return Image.fromarray(pixels.swapaxes(0, 1) if turned else pixels)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif"])
def test_formats_are_read_alike(tmp_path: Path, name: str) -> None:
    square(320).save(tmp_path / name)
    image = read_picture(tmp_path / name)
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
    assert image[:, 16, 4].tolist() == pytest.approx([200, 0, 0], abs=8)
    assert image[:, 16, 27].tolist() == pytest.approx([0, 0, 200], abs=8)


def test_modes_sizes_and_rotation(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    turn = Image.Exif()
    turn[0x0112] = 8  # to be rotated left to stand upright
    square(64, turned=True).save(file, exif=turn)
    upright = read_picture(file)
    for row in (4, 27):
        assert upright[:, row, 4].tolist() == [200, 0, 0]
        assert upright[:, row, 27].tolist() == [0, 0, 200]

    wide = Image.new("RGB", (400, 100), "lime")
    wide.paste(square(100), (150, 0))
    wide.save(file)
    middle = read_picture(file)
    assert middle[:, 16, 4].tolist() == [200, 0, 0], "the square in its middle"
    assert middle[:, 16, 27].tolist() == [0, 0, 200]

    clear = square(64).convert("RGBA")
    clear.putalpha(0)
    clear.save(file)
    assert read_picture(file).min() == 255, "what is transparent is white"

    grey = np.full((32, 32), 130, np.uint8)
    Image.fromarray(grey).save(file)
    assert {*read_picture(file).flatten().tolist()} == {130}
    Image.fromarray(grey.astype(np.uint16) * 256).save(file)
    assert {*read_picture(file).flatten().tolist()} == {130}, "16 bits"
    Image.fromarray(grey).convert("1").save(file)
    assert read_picture(file).shape == (3, 32, 32)


def test_a_batch_without_a_picture_has_no_prediction() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch = Batch(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), none, none)
    assert ImageClassifier(ConvNet()).predict_step(batch, 0).shape == (0, 10)
