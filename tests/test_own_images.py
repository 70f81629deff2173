"""Images that are not CIFAR-10: made, trained on, tested on."""

import csv
import json
import re
import shlex
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors import safe_open

import convert
import export
import train
from cifar10 import archive
from cifar10.arrays import NAMES, classes_in
from cifar10.batches import Predictions
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import ConvNet
from reports.evaluation import Evaluation
from tests.conftest import BASE, QUIET, Run, made_up

CLASSES = ["лиса", "cat", "sea lion"]
NET = ["--model.network", "networks.ConvNet"]
LAST = "runs/base/version_0/checkpoints/last.ckpt"


def pixels(of: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, 32, 32, 3] of the first three classes, and their labels."""
    data = made_up()
    part = "train" if of == 0 else "test"
    labels = data[f"{part}_labels"]
    return data[f"{part}_images"][labels < 3].transpose(0, 2, 3, 1), labels[labels < 3]


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with arrays of three classes."""
    folder = tmp_path_factory.mktemp("three")
    for number, part in enumerate(("train", "test")):
        images, labels = pixels(number)
        np.save(folder / f"{part}_images.npy", images.transpose(0, 3, 1, 2))
        np.save(folder / f"{part}_labels.npy", labels)
    (folder / NAMES).write_text(json.dumps(CLASSES), encoding="utf-8")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of image files in several formats, by class."""
    folder = tmp_path / "photos"
    images, labels = pixels(0)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray(image).resize((40 + i % 7, 40))
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        kind = ("png", "jpg", "webp")[i % 3]
        picture.save(folder / CLASSES[label] / f"{i:03}.{kind}")
    return folder


def fit(run: Run, data: Path, *more: str) -> str:
    return run("fit", "--config", BASE, *NET, "--data.val_size", "60", *more, data=data)


def test_pictures_become_arrays_that_train_and_predict_by_their_own_names(
    run: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "notes.txt").write_text("not a picture")
    (photos / "cat" / ".DS_Store").write_text("hidden")
    with pytest.raises(SystemExit, match="error: 1 files could not be read"):
        convert.main([str(photos), "--out", "own/pets"])
    printed = capsys.readouterr()
    assert f"skipped {photos / 'cat' / 'notes.txt'}: not an image" in printed.err
    assert "3 classes (cat, sea lion, лиса), 240 training and 60 test images" in printed.out
    assert classes_in("own/pets") == ("cat", "sea lion", "лиса")
    labels = np.load("own/pets/test_labels.npy")
    assert np.bincount(labels).tolist() == [20, 20, 20], "the same share of each class"
    fit(run, Path("own/pets"), "--trainer.max_epochs", "6")
    assert "лиса" in run("test", "--ckpt_path", LAST)
    result = json.loads(Path("runs/base/version_0/test.json").read_text())
    assert result["accuracy"]["value"] > 0.9
    assert [*result["classes"]] == ["cat", "sea lion", "лиса"]
    card = Path("runs/base/version_0/model.md").read_text()
    assert "other images, of which nothing was verified: SHA-256" in card
    assert "cat, sea lion, лиса" in card
    files = sorted((photos / "лиса").iterdir())[:20]
    run("predict", "--ckpt_path", LAST, "--data.images", photos / "лиса")
    with Path("runs/base/version_0/predictions.csv").open(encoding="utf-8") as lines:
        rows = [*csv.DictReader(lines)]
    assert [row["file"] for row in rows][:20] == [str(file) for file in files]
    assert sum(row["class"] == "лиса" for row in rows) > 0.8 * len(rows)
    export.main(["--ckpt_path", LAST, "--format", "safetensors", "--out", "m.safetensors"])
    with safe_open("m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["card"])["classes"] == ["cat", "sea lion", "лиса"]


def test_what_is_not_a_folder_of_classes_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: object, out: str = "new") -> str:
        with pytest.raises(SystemExit) as stopped:
            convert.main([str(source), "--out", str(tmp_path / out)])
        assert not (tmp_path / "new").exists()
        assert not [*tmp_path.glob(".new*")]
        return str(stopped.value.code)

    assert "nothing is neither a folder" in refused("nothing")
    assert "expected a folder for each of 2 to 256 classes, found none" in refused(photos / "cat")
    assert "exists: name a new folder" in refused(photos, "photos")
    assert "torchvision has no data set Nope" in refused("torchvision:Nope")
    (photos / "empty").mkdir()
    assert f"{photos / 'empty'} has fewer than 2 files" in refused(photos)
    for i in range(2):
        (photos / "empty" / f"{i}.txt").touch()
    assert f"{photos / 'empty'}: 0 readable images" in refused(photos)
    shutil.rmtree(photos / "empty")
    two = tmp_path / "two"
    for part, name in (("train", "a"), ("train", "b"), ("test", "c")):
        (two / part / name).mkdir(parents=True)
        (two / part / name / "a.png").touch()
    assert "test has c, which train lacks" in refused(two)
    shutil.copytree(photos / "cat", tmp_path / "vehicles" / "car")
    shutil.copytree(photos / "cat", tmp_path / "vehicles" / "train")
    convert.main([str(tmp_path / "vehicles"), "--out", str(tmp_path / "of_train")])
    assert json.loads((tmp_path / "of_train" / NAMES).read_text()) == ["car", "train"]
    (two / "Val").mkdir()
    assert "has Val, test, train, and Val is not a class" in refused(two)
    with pytest.raises(
        SystemExit, match=f"image files: convert them with python convert.py {photos} --out FOLDER"
    ):
        train.main(["fit", "--config", str(BASE), "--data.root", str(photos)])


def test_a_test_folder_stays_the_test_set_and_copies_in_it_are_named(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both"
    for part in ("train", "test"):
        for name in CLASSES:
            (both / part / name).mkdir(parents=True)
    for name in CLASSES:
        for i, file in enumerate(sorted((photos / name).iterdir())[:12]):
            file.rename(both / ("train" if i % 2 else "test") / name / file.name)
    copied = next((both / "train" / "cat").iterdir())
    Image.open(copied).convert("RGB").resize((90, 90)).save(both / "test" / "cat" / "copy.jpg")
    convert.main([str(both), "--out", str(tmp_path / "new")])
    out = capsys.readouterr().out
    assert "18 training and 19 test images" in out
    assert re.search(rf"{both / 'test' / 'cat' / 'copy.jpg'}  {copied}\n", out)
    images = torch.from_numpy(np.load(tmp_path / "new" / "train_images.npy")) / 255
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
    said = [[float(v) for v in of.split(", ")] for of in re.findall(r"\[([\d., ]+)\]", out)]
    assert said == [pytest.approx(of.tolist(), abs=1e-4) for of in (mean, std)]


def test_a_data_set_of_torchvision_becomes_arrays(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        digits = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + digits.tobytes()
        )
        header = struct.pack(">II", 2049, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    convert.main(["torchvision:MNIST", "--root", str(tmp_path), "--out", str(tmp_path / "new")])
    data = archive.load(tmp_path / "new")
    assert data.train_images.shape == (40, 3, 32, 32)
    assert data.test_labels.tolist() == [*range(10)] * 2
    expected = Image.fromarray(digits[0]).resize((32, 32), Image.Resampling.BICUBIC)
    assert (data.test_images[0].numpy() == np.asarray(expected)).all()
    assert str(classes_in(tmp_path / "new")).startswith("('0 - zero'")


def test_arrays_that_are_not_what_they_should_be_are_refused(
    fails: Run, three: Path, tmp_path: Path
) -> None:
    def refused(of: str, change: Any) -> str:
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in three.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if of == NAMES:
            (folder / of).write_text(change, encoding="utf-8")
        elif change is None:
            (folder / of).unlink()
        else:
            np.save(folder / of, change(np.load(folder / of)))
        return fails("fit", "--config", BASE, *NET, data=folder)

    assert "expected a list of 2 to 256 different names" in refused(NAMES, '["one"]')
    assert "expected a list of 2 to 256 different names" in refused(NAMES, '["a", "a", "b"]')
    assert "is not JSON" in refused(NAMES, "[")
    assert "train_labels reach 2, expected 0 to 1" in refused(NAMES, '["a", "b"]')
    assert "no training image of d" in refused(NAMES, '["a", "b", "c", "d"]')
    assert "train_images are torch.float64" in refused("train_images.npy", lambda x: x / 255)
    assert "test_images are torch.uint8 [60, 3, 28, 28]" in refused(
        "test_images.npy", lambda x: np.ascontiguousarray(x[:, :, 2:30, 2:30])
    )
    assert "test_labels are torch.uint8 [59]" in refused("test_labels.npy", lambda x: x[1:])
    assert "test_labels are torch.int64" in refused("test_labels.npy", lambda x: x.astype(int))
    assert "is damaged" in refused("test_images.npy", None)
    folder = tmp_path / "changed"
    (folder / NAMES).unlink()
    assert "has arrays but no classes.json: add one" in fails("fit", "--config", BASE, data=folder)


def test_a_model_and_images_of_other_classes_do_not_go_together(
    run: Run, fails: Run, three: Path, arrays: Path
) -> None:
    fit(run, three, "--trainer.max_epochs", "1")
    other = ["--data.root", str(arrays), "--data.verify", "false", "--data.val_size", "60"]
    message = "the model has 3 classes (лиса, cat, sea lion), the images have 10 classes (airpl"
    for command, more in (("test", ""), ("validate", ""), ("fit", "--trainer.max_epochs=2")):
        assert message in fails(command, "--ckpt_path", LAST, *other, *filter(None, [more]))
    words = ["--ckpt_path", LAST, "--format", "torch", "--out", "m.pt2", "--data.root", str(arrays)]
    with pytest.raises(SystemExit, match="have other classes than the model: set --data.root"):
        export.main(words)
    settings = ["fit", "--config", BASE, "--data.val_size", "60"]
    assert "returns [2, 10] for 2 images, expected logits [2, 3]" in fails(*settings, data=three)
    wrong = ["--model.network.num_classes", "7"]
    assert "returns [2, 7] for 2 images" in fails(*settings, *NET, *wrong, data=three)
    weights = ["--model.class_weights", "[1, 2]"]
    assert "expected 3 numbers above 0" in fails(*settings, *NET, *weights, data=three)


def test_training_may_start_from_weights_for_other_classes(
    run: Run, three: Path, printed: list[str]
) -> None:
    run("fit", "--config", BASE, *NET, "--trainer.max_epochs", "1")
    fit(run, three, "--model.weights", LAST, "--trainer.max_epochs", "4")
    out = "\n".join(printed)
    assert "not loaded because the shapes differ: dense3.bias, dense3.weight" in out
    assert f"{LAST} was trained on images of other classes" in out
    assert "best  epoch" in out


def test_python_trains_on_own_images(three: Path) -> None:
    data = CIFAR10DataModule(root=str(three), val_size=60, batch_size=40)
    assert data.classes == tuple(CLASSES)
    model = ImageClassifier(ConvNet(num_classes=3), classes=CLASSES)
    trainer = Trainer(max_epochs=3, **QUIET)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/acc"] > 0.8
    assert model.predict_step(data.test_set.batch(torch.arange(5)), 0).shape == (5, 3)
    with pytest.raises(Exception, match="the model has 10 classes"):
        Trainer(max_epochs=1, **QUIET).fit(ImageClassifier(ConvNet()), datamodule=data)


def test_other_test_sets_are_tested_on_and_named(run: Run, fails: Run, tmp_path: Path) -> None:
    run("fit", "--config", BASE, *NET, once=True)
    folder = Path("runs/base/version_0")
    run("test", "--ckpt_path", LAST)
    own, card = (folder / "test.json").read_text(), (folder / "model.md").read_text()
    data = made_up()
    images, labels = data["test_images"].transpose(0, 2, 3, 1), data["test_labels"]
    np.save(tmp_path / "new_v6_data.npy", images[:150])
    np.save(tmp_path / "new_v6_labels.npy", labels[:150].astype(np.int32))
    corrupted = tmp_path / "corrupted"
    corrupted.mkdir()
    np.save(corrupted / "labels.npy", np.tile(labels[:40], 5))
    rng = np.random.default_rng(0)
    for name, strength in (("gaussian_noise", 40), ("none", 0)):
        noise = [rng.normal(0, strength * i, (40, 32, 32, 3)) for i in range(1, 6)]
        parts = [(images[:40] + of).clip(0, 255).astype(np.uint8) for of in noise]
        np.save(corrupted / f"{name}.npy", np.concatenate(parts))
    plain = tmp_path / "plain"
    plain.mkdir()
    np.save(plain / "labels.npy", labels[:100])
    np.save(plain / "images.npy", images[:100])
    by_class = tmp_path / "by_class"
    for i in range(30):
        place = by_class / archive.CLASSES[labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(place / f"{i}.png")

    with np.load(folder / "test.npz") as content:
        is_right = content["logits"].argmax(axis=1) == content["labels"]
    for name, count in (("new_v6", 150), ("by_class", 30), ("plain", 100)):
        out = run("test", "--ckpt_path", LAST, "--data.test_set", tmp_path / name)
        (file,) = folder.glob(f"test_{name}_*.json")
        result = json.loads(file.read_text())
        assert result["accuracy"]["value"] == pytest.approx(is_right[:count].mean(), abs=1e-6)
        assert file.name == f"test_{name}_{result['set']}.json"
        assert file.name in out
    run("test", "--ckpt_path", LAST, "--data.test_set", corrupted)
    (file,) = folder.glob("test_corrupted_*.json")
    found = json.loads(file.read_text())
    assert found["accuracies"]["none"] == pytest.approx([is_right[:40].mean()] * 5)
    noisy = found["accuracies"]["gaussian_noise"]
    assert noisy[0] > noisy[4]
    every = [value for of in found["accuracies"].values() for value in of]
    assert found["mean_accuracy"] == pytest.approx(np.mean(every), abs=1e-6)
    assert found["test/acc"] == pytest.approx(np.mean(every), abs=1e-6)
    assert next(folder.glob("severity_corrupted_*.png")).stat().st_size > 10_000
    assert (folder / "test.json").read_text() == own
    said = (folder / "model.md").read_text()
    assert said.startswith(card)
    (others,) = re.findall(r"## On other test sets\n\n(.*)", said, re.S)
    assert re.findall(r"\*\*(\w+), ", others) == ["new_v6", "by_class", "plain", "corrupted"]
    run("test", "--ckpt_path", LAST, "--data.test_set", corrupted, "--model.tta", "mirror")
    run("test", "--ckpt_path", LAST)
    assert (folder / "model.md").read_text().count("**corrupted, ") == 1
    assert "model.tta mirror (not none)" in (folder / "model.md").read_text()
    file.unlink()
    few = ["--trainer.limit_test_batches", "0.5", "--data.test_set", str(corrupted)]
    np.save(corrupted / "labels.npy", np.tile(labels[:40], 50))
    for array in corrupted.glob("[gn]*.npy"):
        np.save(array, np.concatenate([np.load(array)] * 10))
    assert " images were tested: nothing is written" in run("test", "--ckpt_path", LAST, *few)
    assert not file.exists()

    def refused(path: object, command: str = "test") -> str:
        return fails(command, "--ckpt_path", LAST, "--data.test_set", path)

    assert "no such folder, and no nothing_data.npy" in refused(tmp_path / "nothing")
    assert "has several corruptions: use test" in refused(corrupted, "predict")
    assert "data.test_set is for test and predict" in refused(corrupted, "validate")
    assert "data.test_set '' does not name a folder" in refused("")
    (by_class / archive.CLASSES[labels[0]] / "broken.png").touch()
    for command in ("test", "predict"):
        assert "1 files could not be read and were skipped" in refused(by_class, command)
    (by_class / "unicorn").mkdir()
    assert "unicorn: not among the classes airplane, automobile" in refused(by_class)
    np.save(corrupted / "labels.npy", np.arange(2000) % 11)
    assert "labels.npy: labels from 0 to 10, expected 0 to 9" in refused(corrupted)
    np.save(corrupted / "labels.npy", np.arange(199) % 10)
    assert "expected uint8 [199, 32, 32, 3], as there are 199 labels" in refused(corrupted)
    np.save(corrupted / "labels.npy", np.array(3))
    assert "expected integers [N]" in refused(corrupted)
    np.save(corrupted / "labels.npy", np.arange(1999) % 10)
    for name in ("none", "gaussian_noise"):
        np.save(corrupted / f"{name}.npy", np.zeros((1999, 32, 32, 3), np.uint8))
    assert "1999 images per file, expected 5 severities" in refused(corrupted)
    (corrupted / "labels.npy").unlink()
    assert "no labels.npy next to the arrays; for a pair *_data.npy, *_labels.npy, give" in refused(
        corrupted
    )
    (tmp_path / "new_v6_labels.npy").unlink()
    assert f"there is no {tmp_path / 'new_v6_labels.npy'}" in refused(tmp_path / "new_v6")
    assert "expected a folder, or the common prefix of a pair" in refused(
        tmp_path / "new_v6_data.npy"
    )
    run("fit", "--ckpt_path", LAST, "--trainer.max_epochs", "3")
    assert "## On other test sets" in (folder / "model.md").read_text()


def test_a_report_of_many_classes_shows_those_found_worst() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 30
    logits = torch.randn(3000, 30, generator=generator)
    logits[labels < 25] += 9 * torch.nn.functional.one_hot(labels[labels < 25], 30)
    names = [f"class {i} of a long name" for i in range(30)]
    found = Evaluation(Predictions(logits, labels, torch.arange(3000)), classes=names)
    table = found.table()
    assert table.row_count == 20
    assert table.caption == "the 20 of 30 classes with the lowest recall"
    few = Evaluation(Predictions(logits[:5], labels[:5], torch.arange(5)), classes=names)
    assert few.table().row_count == 5
    assert few.table().caption == "(25 classes have no images)"
    assert len(few.values()["classes"]) == 5
    shown = {str(cell) for cell in table.columns[0].cells}
    assert {f"class {i} of a long name" for i in range(25, 30)} <= shown
    assert len(found.values()["classes"]) == 30
    images = torch.zeros(3000, 3, 32, 32, dtype=torch.uint8)
    assert {"confusion", "mistakes"} <= found.figures(images, lambda *_: None).keys()


def test_the_guide_to_own_images_runs(run: Run, photos: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "configs").symlink_to(root / "configs")
    assert photos == tmp_path / "photos"
    text = (root / "docs" / "own-images.md").read_text()
    (block,) = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    programs: dict[str, Any] = {
        "convert.py": lambda *words: convert.main([*words]),
        "train.py": run,
        "export.py": lambda *words: export.main([*words]),
    }
    for command in block.splitlines():
        program, *words = shlex.split(command)[1:]
        programs[program](*words)
    assert Path("pets.safetensors").exists()
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    names = {"CIFAR10DataModule": CIFAR10DataModule, "ConvNet": ConvNet}
    exec(example, names | {"ImageClassifier": ImageClassifier})


def test_names_of_folders_are_read_as_they_are(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "cat").rename(photos / "cat [bold] $x$")
    hidden = photos / "sea lion" / ".thumbnails"
    hidden.mkdir()
    shutil.copy(next((photos / "sea lion").glob("*.png")), hidden / "copy.png")
    for file in sorted((photos / "лиса").iterdir())[2:]:
        file.unlink()
    convert.main([str(photos), "--out", "own"])
    labels = [np.load(f"own/{part}_labels.npy") for part in ("train", "test")]
    assert [np.bincount(of).tolist() for of in labels] == [[80, 80, 1], [20, 20, 1]]
    words = ["--data.stratify", "true", "--trainer.max_epochs", "1"]
    with pytest.raises(SystemExit, match="set of 60 images lacks images of лиса: make it larger"):
        fit(run, Path("own"), *words)
    fit(run, Path("own"), "--data.val_size", "0", "--trainer.max_epochs", "1")
    assert "cat [bold] $x$" in run("test", "--ckpt_path", LAST)
    result = json.loads(Path("runs/base/version_0/test.json").read_text())
    assert [*result["classes"]] == ["cat [bold] $x$", "sea lion", "лиса"]


def test_outputs_that_are_nan_have_no_accuracy(run: Run, fails: Run, tmp_path: Path) -> None:
    run("fit", "--config", BASE, *NET, once=True)
    checkpoint = torch.load(LAST, weights_only=True)
    checkpoint["state_dict"]["network.dense3.bias"] *= float("nan")
    torch.save(checkpoint, "nan.ckpt")
    images, labels = made_up()["test_images"].transpose(0, 2, 3, 1), made_up()["test_labels"]
    np.save(tmp_path / "labels.npy", labels)
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", images)
    for more in ([], ["--data.test_set", str(tmp_path)]):
        assert "outputs are NaN" in fails("test", "--ckpt_path", "nan.ckpt", *more)
