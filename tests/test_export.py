"""Exports give the same predictions, in a file that needs nothing of this project."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import export
import train
from cifar10 import archive
from cifar10.augment import average_over_views
from cifar10.pictures import read_picture
from datamodule import CIFAR10DataModule
from lightning_module import ImageClassifier
from networks import ConvNet
from tests.conftest import BASE, QUIET, on, tar

ROOT = Path(__file__).parents[1]
CHECKPOINT = Path("runs/normalised/version_0/checkpoints/epoch_01.ckpt")
MEAN, STD = (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)


class Branching(nn.Module):
    """A network whose control flow depends on the image, which needs Python to run."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1) if images.sum() > 0 else -images.flatten(1))


class Tiny(nn.Module):
    """A custom network."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture(scope="session")
def trained(arrays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of two recipes."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "normalised.yaml").write_text(
        "model:\n  normalize: cifar10\n"
        "data:\n  augment:\n    - class_path: cifar10.augment.RandomFlip\n"
    )
    base = ["fit", "--config", str(BASE)]
    small = [*on(arrays), "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    small += ["--model.optimizer.lr", "1e-4"]  # with mistakes, so that there is a temperature
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*base, "--config", "normalised.yaml", *small])
        tiny = ["--model.network", "tests.test_export.Tiny", "--model.network.width", "5"]
        tiny += ["--model.tta", "mirror-shift"]
        train.main([*base, *small, *tiny, "--name", "tiny"])
    return folder


Out = Callable[..., str]


@pytest.fixture
def out(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Out:
    """Export in a copy of the folder; return what is printed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def out(format_: str, file: str, checkpoint: Path = CHECKPOINT, *more: str) -> str:
        capsys.readouterr()
        export.main(["--ckpt_path", str(checkpoint), "--format", format_, "--out", file, *more])
        return capsys.readouterr().out

    return out


def some(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def expected(images: Tensor) -> Tensor:
    """Return the checkpoint's probabilities by PyTorch alone."""
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    weights = checkpoint["state_dict"]
    network = ConvNet().eval()
    network.load_state_dict({k.removeprefix("network."): v for k, v in weights.items()})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    logits = network((images / 255 - mean) / std)
    return (logits / checkpoint["temperature"]).softmax(dim=1)


def as_documented(file: str, folder: Path, *more: Path) -> None:
    """Run the lines of docs/export.md that use a file, in a folder that has nothing of this project
    but the copied files. Expect the class and probabilities of `predict` for a 4:3 JPEG photo that
    lies on its side."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    (code,) = [block for block in blocks if f'"{file}"' in block]
    code += "import sys; numpy.save('p.npy', numpy.asarray(probabilities.tolist()))\n"
    code += f"assert {str(ROOT)!r} not in sys.path\n"
    away = folder / "away"
    away.mkdir()
    for path in (Path(file), *more):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, away / path.name)
    (away / "picture.py").write_text(blocks[0])
    photo = some(1)[0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(photo).resize((640, 480)).save(away / "photo.jpg", exif=exif)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=away, check=True, timeout=300, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    found = torch.from_numpy(np.load(away / "p.npy")).float()
    assert torch.allclose(found, expected(read_picture(away / "photo.jpg")[None]), atol=1e-5)
    trainer = Trainer(**QUIET)
    data = CIFAR10DataModule(images=str(away / "photo.jpg"))
    predictions: Any = trainer.predict(ImageClassifier.load_from_checkpoint(CHECKPOINT), data)
    (predicted,) = predictions
    assert torch.allclose(found, predicted, atol=1e-5)
    assert ran.stdout.strip() == archive.CLASSES[int(predicted.argmax())]


def test_the_documented_lines_read_a_picture_as_predict_does(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    documented: dict[str, Any] = {}
    exec(blocks[0], documented)
    upright = Image.fromarray(some(1)[0].permute(1, 2, 0).numpy()).resize((400, 300))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "turned.jpg", exif=exif)
    upright.save(tmp_path / "rgb.png")
    upright.convert("L").save(tmp_path / "grey.png")
    upright.convert("P").save(tmp_path / "palette.png")
    upright.convert("CMYK").save(tmp_path / "print.jpg")
    upright.putalpha(upright.convert("L"))
    upright.save(tmp_path / "transparent.png")
    for path in tmp_path.iterdir():
        found = documented["read_picture"](str(path))
        assert found.dtype == np.uint8
        assert np.array_equal(found, read_picture(path)[None].numpy()), path.name
        squashed = Image.open(path).convert("RGB").resize((32, 32))
        assert not np.array_equal(found[0].transpose(1, 2, 0), np.asarray(squashed))


def test_onnx_says_the_same_for_every_size_of_batch(out: Out, tmp_path: Path) -> None:
    printed = out("onnx", "exports/model.onnx")
    assert "on 200 test images: same classes, probabilities within" in printed
    session = onnxruntime.InferenceSession("exports/model.onnx")
    for count in (1, 7):
        (found,) = session.run(None, {"images": some(count).numpy()})
        assert found.dtype == np.float32
        assert torch.allclose(torch.from_numpy(found), expected(some(count)), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(archive.CLASSES)
    assert (json.loads(metadata["recipe"]), json.loads(metadata["epoch"])) == ("normalised", 1)
    assert 0 < json.loads(metadata["val/acc"]) <= 1
    assert [path.name for path in Path("exports").iterdir()] == ["model.onnx"]
    Path("exports/model.onnx").rename("model.onnx")
    as_documented("model.onnx", tmp_path)


@pytest.mark.slow
def test_a_torch_program_needs_nothing_of_this_project(out: Out, tmp_path: Path) -> None:
    out("torch", "model.pt2")
    extra = {"card.json": ""}
    program = torch.export.load("model.pt2", extra_files=extra).module()
    card = json.loads(extra["card.json"])
    assert card["input"].startswith("uint8")
    assert card["output"].startswith("probabilities")
    assert not {"mean", "std", "temperature"} & card.keys(), "they are in the program"
    for count in (1, 7):
        assert torch.allclose(program(some(count)), expected(some(count)), atol=1e-5)
    as_documented("model.pt2", tmp_path)


def card_of(file: str) -> dict[str, Any]:
    with safe_open(file, "pt") as weights:
        return json.loads(weights.metadata()["card"])


def test_weights_come_with_a_card_that_says_how_to_use_them(out: Out, tmp_path: Path) -> None:
    out("safetensors", "model.safetensors")
    card = card_of("model.safetensors")
    assert card["network"]["class_path"] == "networks.ConvNet"
    assert card["mean"] == pytest.approx(MEAN)
    assert card["std"] == pytest.approx(STD)
    assert card["classes"] == list(archive.CLASSES)
    assert (card["recipe"], card["epoch"]) == ("normalised", 1)
    assert 0 < card["val/acc"] <= 1
    as_documented("model.safetensors", tmp_path, ROOT / "networks")


def test_a_checkpoint_of_weights_only_is_exported(out: Out) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    for key in ("callbacks", "optimizer_states", "lr_schedulers", "loops"):
        del checkpoint[key]
    torch.save(checkpoint, "weights.ckpt")
    out("safetensors", "model.safetensors", Path("weights.ckpt"))
    assert "val/acc" not in card_of("model.safetensors")


def test_a_checkpoint_to_share_needs_nothing_of_its_run(
    out: Out, arrays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no test result of epoch 1" in out("checkpoint", "before.ckpt")
    train.main(["test", "--ckpt_path", str(CHECKPOINT)])
    said = out("checkpoint", "share/small.ckpt")
    assert "half precision changes the class of 0 of 200 test images" in said
    assert CHECKPOINT.stat().st_size > 5 * Path("share/small.ckpt").stat().st_size
    results = json.loads((CHECKPOINT.parents[1] / "test.json").read_text())
    card = Path("share/small.md").read_text()
    digest = hashlib.sha256(Path("share/small.ckpt").read_bytes()).hexdigest()
    assert f"**SHA-256**: {digest}" in card
    assert "**Command**: `python train.py fit --config " in card
    assert f"accuracy     {results['test/acc']:.2%}" in card
    assert "Repeat" not in card
    content = Path("share/small.ckpt").read_bytes()
    assert b"optimizer_states" not in content
    assert content.count(str(arrays).encode()) == 1, "in the command that started the run"

    Path("runs").rename("gone")
    there = ["--data.root", str(arrays)]
    train.main(["test", "--ckpt_path", "share/small.ckpt", *there])
    again = json.loads(Path("share/small/test.json").read_text())
    assert again["test/acc"] == results["test/acc"]
    assert again["test/loss"] == pytest.approx(results["test/loss"], abs=1e-3)
    assert Path("share/small.md").read_text() == card
    model = ImageClassifier.load_from_checkpoint("share/small.ckpt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    out("onnx", "small.onnx", Path("share/small.ckpt"), *there)
    start = ["--model.weights", "share/small.ckpt", "--trainer.max_epochs", "1"]
    config = ["--config", str(BASE), "--config", "normalised.yaml"]
    train.main(["fit", *config, *on(arrays), *start, "--name", "from"])
    with pytest.raises(SystemExit, match="weights only, so it can't be resumed: to start from"):
        train.main(["fit", "--ckpt_path", "share/small.ckpt"])

    Image.new("RGB", (40, 32), "red").save("photo.png")
    capsys.readouterr()
    elsewhere = ["--data.root", "nothing", "--data.images", "photo.png"]
    train.main(["predict", "--ckpt_path", "share/small.ckpt", *elsewhere])
    assert "photo.png" in capsys.readouterr().out
    assert not Path("nothing").exists()


def test_an_export_takes_the_temperature_of_another_run(out: Out, arrays: Path) -> None:
    twin = torch.load(CHECKPOINT, weights_only=True) | {"temperature": 3.0, "unsure_below": 0.25}
    torch.save(twin, "twin.ckpt")
    images, model = some(20), ImageClassifier.load_from_checkpoint(CHECKPOINT).eval()
    with torch.no_grad():
        logits = model(images / 255)
    for value, temperature in (("twin.ckpt", 3.0), ("false", 1.0)):
        flag = ("--model.calibrate", value, "--overwrite")
        out("torch", "model.pt2", CHECKPOINT, *flag)
        said = {"card.json": ""}
        program = torch.export.load("model.pt2", extra_files=said).module()
        torch.testing.assert_close(program(images), (logits / temperature).softmax(dim=1))
        assert json.loads(said["card.json"])["unsure_below"] == (0.25 if temperature > 1 else None)
    with pytest.raises(SystemExit, match="keeps its run's calibration"):
        out("checkpoint", "model.ckpt", CHECKPOINT, "--model.calibrate", "twin.ckpt")
    never = torch.load(CHECKPOINT, weights_only=True) | {"temperature": None}
    torch.save(never, CHECKPOINT.with_name("last.ckpt"))  # as after an epoch without validation
    assert "not calibrated" in out("checkpoint", "model.ckpt", CHECKPOINT.with_name("last.ckpt"))
    (line,) = re.findall(r"\*\*Probabilities\*\*: (.*)", Path("model.md").read_text())
    assert line == "not calibrated"
    tiny = Path("runs/tiny/version_0/checkpoints/epoch_01.ckpt")
    with pytest.raises(SystemExit, match="has another network"):
        out("onnx", "model.onnx", tiny, "--model.calibrate", "twin.ckpt")


@pytest.mark.slow
def test_the_card_of_a_shared_checkpoint_tells_of_its_own_epoch(
    out: Out, arrays: Path, tmp_path: Path
) -> None:
    last = CHECKPOINT.with_name("last.ckpt")
    train.main(["test", "--ckpt_path", str(last)])
    assert "Of epoch 1 (`last.ckpt`)" in (CHECKPOINT.parents[1] / "model.md").read_text()
    (tmp_path / "moved").symlink_to(arrays)
    more = ["--trainer.max_epochs", "3", "--data.root", str(tmp_path / "moved")]
    lr = ["--model.optimizer.lr", "1e-4"]
    train.main(["fit", "--ckpt_path", str(last), *more, *lr])
    assert "no test result of epoch 2: run `train.py test` first" in out(
        "checkpoint", "a.ckpt", last
    )
    card = Path("a.md").read_text()
    assert "Of epoch" not in card
    assert "`a.ckpt`, epoch 2, validation accuracy " in card
    content = Path("a.ckpt").read_bytes()
    assert str(tmp_path / "moved").encode() not in content
    train.main(["test", "--ckpt_path", str(last)])
    out("checkpoint", "a.ckpt", last, "--overwrite")
    (result,) = re.findall("Of epoch 2 .*", Path("a.md").read_text(), re.S)
    out("checkpoint", "b.ckpt", Path("a.ckpt"), "--data.root", str(arrays))
    again = Path("b.md").read_text()
    assert result in again
    assert again.count("SHA-256**") == 1


def test_nan_is_not_shared(out: Out) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    for value in checkpoint["state_dict"].values():
        value *= float("nan") if value.is_floating_point() else 1
    torch.save(checkpoint, "nan.ckpt")
    with pytest.raises(SystemExit, match="outputs are NaN"):
        out("checkpoint", "small.ckpt", Path("nan.ckpt"))
    assert not Path("small.ckpt").exists()


def test_a_checkpoint_to_share_keeps_single_precision_where_half_changes_much(out: Out) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["state_dict"][next(reversed(checkpoint["state_dict"]))] *= 1e8  # infinite in half
    torch.save(checkpoint, "large.ckpt")
    assert ", so single is kept" in out("checkpoint", "small.ckpt", Path("large.ckpt"))
    kept = torch.load("small.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(kept[key], value) for key, value in checkpoint["state_dict"].items())


def test_an_earlier_export_is_replaced_only_with_overwrite(out: Out) -> None:
    tiny = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    for file in ("m.safetensors", "runs/tiny/version_0/m.safetensors"):
        out("safetensors", file)
        with pytest.raises(SystemExit, match=f"error: --out {file} exists: add --overwrite"):
            out("safetensors", file, tiny)
        assert card_of(file)["recipe"] == "normalised"
        out("safetensors", file, tiny, "--overwrite")
        assert card_of(file)["recipe"] == "tiny"


def test_a_page_is_replaced_as_a_whole(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"package/dist/{name}": b"code" for name in export.RUNTIME_FILES}

    def npm_pack(_: str, folder: Path, **__: object) -> Path:
        (folder / "package.tgz").write_bytes(tar(files))
        return folder / "package.tgz"

    monkeypatch.setattr(archive, "npm_pack", npm_pack)
    monkeypatch.setitem(export.FORMATS, "page", lambda classifier, _: (b"model", classifier))
    out("page", "page")
    assert {path.name for path in Path("page").iterdir()} == export.PAGE_FILES
    Path("page/index.html").write_text("old")
    with pytest.raises(SystemExit, match="error: --out page exists: add --overwrite"):
        out("page", "page")
    out("page", "page", CHECKPOINT, "--overwrite")
    assert '"recipe": "normalised"' in Path("page/index.html").read_text()
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(export, "RUNTIME_FILES", ("missing.mjs",))
    with pytest.raises(KeyError):
        out("page", "page", CHECKPOINT, "--overwrite")
    assert sorted(Path().rglob("*")) == before


def test_a_network_of_ones_own_is_exported(out: Out) -> None:
    tiny = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert "images: same classes" in out("onnx", "tiny.onnx", tiny)
    out("safetensors", "tiny.safetensors", tiny)
    card = card_of("tiny.safetensors")
    assert card["network"]["init_args"] == {"width": 5}
    assert (card["mean"], card["std"]) == ([0, 0, 0], [1, 1, 1])
    # The recipe averages over views, and so does the ONNX file; the weights are for one view.
    network, images = Tiny(5).eval(), some(3)
    network.load_state_dict(load_file("tiny.safetensors"))
    with torch.no_grad():
        logits = average_over_views(network, images / 255, card["test_time_augmentation"])
    (found,) = onnxruntime.InferenceSession("tiny.onnx").run(None, {"images": images.numpy()})
    probabilities = (logits / card["temperature"]).softmax(dim=1)
    assert torch.allclose(torch.from_numpy(found), probabilities, atol=1e-5)
    assert not torch.allclose(network(images / 255), logits, atol=1e-5)


def test_an_export_that_differs_is_not_kept(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model.onnx").write_text("an earlier one")
    before = sorted(Path().iterdir())

    def one_class(images: Tensor) -> Tensor:
        return torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)]

    def less_sure(images: Tensor) -> Tensor:
        return 0.9 * expected(images) + 0.01

    for wrong, message in ((one_class, "predicts another class for"), (less_sure, "differ by")):
        monkeypatch.setitem(export.FORMATS, "onnx", lambda *_, wrong=wrong: (b"", wrong))
        with pytest.raises(SystemExit, match=f"error: the export.* {message}"):
            out("onnx", "model.onnx", CHECKPOINT, "--overwrite")
    assert sorted(Path().iterdir()) == before
    assert Path("model.onnx").read_text() == "an earlier one"


def changed(name: str, network: nn.Module, **settings: object) -> Path:
    """Save the checkpoint with another network."""
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint["hyper_parameters"]["network"] = settings
    weights = network.state_dict()
    checkpoint["state_dict"] = {f"network.{key}": value for key, value in weights.items()}
    torch.save(checkpoint, name)
    return Path(name)


def test_what_a_format_cannot_hold_is_refused_in_one_line(out: Out) -> None:
    layer = nn.Linear(3072, 10)
    linear = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3072,
              "out_features": 10}}  # fmt: skip
    settings = {"class_path": "tests.test_export.Branching", "init_args": {"layer": linear}}
    branching = changed("branching.ckpt", Branching(layer), **settings)
    out("safetensors", "model.safetensors", branching)  # a network built from another
    for format_, file in (("onnx", "new/model.onnx"), ("torch", "new/model.pt2")):
        with pytest.raises(SystemExit) as stopped:
            out(format_, file, branching)
        message = str(stopped.value.code)
        assert message.startswith(f"error: --format {format_} does not support Branching (")
        assert message.endswith("): use --format safetensors")
        assert len(message.splitlines()) == 1
    nn.init.constant_(layer.bias, float("nan"))
    diverged = changed("diverged.ckpt", Branching(layer), **settings)
    with pytest.raises(SystemExit, match="error: the export's probabilities differ by nan"):
        out("safetensors", "new/model.safetensors", diverged)
    assert not Path("new").exists()


class Buggy(nn.Module):
    """A network with a bug that shows only after training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3072, 10)

    def forward(self, images: Tensor) -> Tensor:
        if self.layer.bias[0] == 7:
            raise KeyError("a bug")
        return self.layer(images.flatten(1))


def test_a_bug_in_the_network_shows_its_traceback(out: Out) -> None:
    network = Buggy()
    nn.init.constant_(network.layer.bias, 7)
    path = changed("buggy.ckpt", network, class_path="tests.test_export.Buggy")
    for format_ in ("onnx", "safetensors"):
        with pytest.raises(KeyError, match="a bug"):
            out(format_, f"new.{format_}", path)


def test_wrong_calls_are_refused_in_one_line_and_leave_nothing(
    out: Out, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("full.onnx").mkdir()
    Path("full.onnx/letter.txt").write_text("dear")
    Path("link.ckpt").symlink_to(CHECKPOINT)
    Path("damaged.ckpt").write_bytes(CHECKPOINT.read_bytes()[:5000])
    hostile = torch.load(CHECKPOINT, weights_only=True)
    hostile["hyper_parameters"]["_instantiator"] = "subprocess.Popen"
    hostile["hyper_parameters"]["network"] = {
        "class_path": "subprocess.Popen", "init_args": {"args": ["touch", "hacked"]},
    }  # fmt: skip
    torch.save(hostile, "hostile.ckpt")
    Path("mine").mkdir()
    Path("mine/index.html").write_text("my own page")

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}

    before = files()

    def refused(message: str, format_: str, file: str, *more: Any) -> None:
        with pytest.raises(SystemExit) as stopped:
            out(format_, file, *more)
        code = stopped.value.code
        line = code if isinstance(code, str) else capsys.readouterr().err
        assert code
        assert line.startswith("error: ")
        assert message in line
        assert len(line.strip().splitlines()) == 1
        assert files() == before

    run = CHECKPOINT.parents[1]
    always = [CHECKPOINT, "--overwrite"]  # refused even then
    refused("no checkpoint nowhere.ckpt", "onnx", "m.onnx", Path("nowhere.ckpt"))
    refused("not a checkpoint", "onnx", "m.onnx", Path("damaged.ckpt"))
    refused("can't build its network", "onnx", "m.onnx", Path("hostile.ckpt"))
    refused("--out .: name a new folder", "page", ".")
    refused("--out .: name a file that ends in .safetensors", "safetensors", ".")
    refused("name a file that ends in .pt2", "torch", "m.torch")
    refused("mine exists: add --overwrite", "page", "mine")
    refused("--format keras: expected onnx", "keras", "m")
    refused("link.ckpt exists and is not an export", "checkpoint", "link.ckpt", *always)
    refused("exists and is not an export", "checkpoint", str(CHECKPOINT), *always)
    Path("notes.md").write_text("my own notes")
    before = files()
    refused("notes.md exists and is not an export", "checkpoint", "notes.ckpt", *always)
    refused("model.md exists and is not an export", "checkpoint", str(run / "model.ckpt"), *always)
    refused("--format weights: expected onnx, torch, safetensors (for weights)", "weights", "m.pth")
    refused("full.onnx exists and is not an export", "onnx", "full.onnx", *always)
    refused("full.onnx exists and is not an export", "page", "full.onnx", *always)
    refused(f"{run} exists and is not an export", "page", str(run), *always)
    refused("config.yaml exists and is not an export", "page", str(run / "config.yaml"), *always)
    refused("name a file that ends in .onnx", "onnx", str(CHECKPOINT), *always)
    refused("name a file that ends in .onnx", "onnx", str(CHECKPOINT), Path("link.ckpt"), always[1])
    refused("name a file that ends in .onnx", "onnx", str(run / "model.pth"), *always)
    refused("name a file that ends in .pt2", "torch", str(run / "model.pth"), *always)
    with monkeypatch.context() as patch:
        patch.setattr(export, "ONNX_PACKAGES", ("onnx", "no_such_package"))
        said = "needs no_such_package: pip install -e '.[export]'"
        refused(f"--format onnx {said}", "onnx", "m.onnx")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refused("the npm command is not installed: install npm", "page", "new/page")


def photos(images: Tensor) -> dict[str, Image.Image]:
    """Return noisy images of several sizes, shapes and modes by file name."""
    rng = np.random.default_rng(0)
    sizes = {"a.png": (45, 45), "b.png": (700, 401), "c.png": (30, 1000), "d.jpg": (2049, 1234),
             "e.jpg": (640, 480), "f.png": (16, 20), "g.webp": (500, 333)}  # fmt: skip
    found = {}
    for (name, size), image in zip(sizes.items(), images, strict=False):
        large = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size)
        noisy = np.array(large) + rng.normal(0, 30, (size[1], size[0], 3))
        found[name] = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    found["clear.png"] = found["b.png"].convert("RGBA")
    found["clear.png"].putalpha(found["b.png"].convert("L").point(lambda v: 255 * (v > 90)))
    return found


@pytest.mark.real_images
def test_the_page_in_a_browser_says_what_the_network_says(out: Out, arrays: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    out("page", "page")
    assert "://" not in Path("page/index.html").read_text(), "nothing from elsewhere"
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    images = archive.load(arrays, verify=False).test_images[:10]
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{i}.png")
    options = webdriver.ChromeOptions()
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
    flags += ["disable-background-networking", f"user-data-dir={Path.cwd() / 'chrome'}"]
    for flag in flags:
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with (
        subprocess.Popen(
            [*command, "--directory", "page"], stdout=subprocess.PIPE, text=True
        ) as server,
        contextlib.ExitStack() as at_end,
    ):
        at_end.callback(server.kill)  # even if something here fails
        browser = at_end.enter_context(webdriver.Chrome(options, service))

        def says(text: str) -> None:
            WebDriverWait(browser, 30).until(
                lambda browser: browser.find_element(By.ID, "result").text.startswith(text)
            )

        least = torch.load(CHECKPOINT, weights_only=True)["unsure_below"]

        def says_of(probabilities: Tensor) -> None:
            largest, best = probabilities.max(dim=0)
            unsure = "not sure: " * bool(largest < least)
            says(f"{unsure}{archive.CLASSES[best]}, {100 * float(largest):.1f} %")

        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        browser.get(f"http://127.0.0.1:{port}")
        says("Choose an image.")
        for i, probabilities in enumerate(expected(images)):
            browser.find_element(By.ID, "file").send_keys(str(Path(f"{i}.png").resolve()))
            says_of(probabilities)
        for name, picture in photos(images).items():
            picture.save(name)
            browser.find_element(By.ID, "file").send_keys(str(Path(name).resolve()))
            (probabilities,) = expected(read_picture(Path(name))[None])
            says_of(probabilities)
            seen = browser.execute_script(
                "return [...document.getElementById('canvas').getContext('2d')"
                ".getImageData(0, 0, 32, 32).data]"
            )
            pixels = np.array(seen).reshape(32, 32, 4)[..., :3].transpose(2, 0, 1)
            assert (pixels == read_picture(Path(name)).numpy()).all(), name
        Path("notes.txt").write_text("no picture")
        browser.find_element(By.ID, "file").send_keys(str(Path("notes.txt").resolve()))
        says("notes.txt is not an image")
