"""What leaves the laboratory: the same predictions, in a file that needs nothing of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import export
from cifar10 import archive
from cifar10.augment import average_over_views
from networks import ConvNet

ROOT = Path(__file__).parents[1]
CHECKPOINT = Path("runs/normalised/version_0/checkpoints/epoch_01.ckpt")
MEAN, STD = (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)


class Branching(nn.Module):
    """A network whose way depends on the image, which a program without Python cannot follow."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1) if images.sum() > 0 else -images.flatten(1))


class Tiny(nn.Module):
    """A network of a user's own."""

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
    import train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "normalised.yaml").write_text(
        "data:\n  augment:\n    - class_path: cifar10.augment.RandomFlip\n"
        "    - class_path: cifar10.augment.Normalize\n"
    )
    base = ["fit", "--config", str(ROOT / "configs" / "base.yaml")]
    small = ["--data.root", str(arrays), "--data.verify", "false", "--data.val_size", "200",
             "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]  # fmt: skip
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

    def out(format_: str, file: str, checkpoint: Path = CHECKPOINT) -> str:
        capsys.readouterr()
        export.main(["--ckpt_path", str(checkpoint), "--format", format_, "--out", file])
        return capsys.readouterr().out

    return out


def some(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def expected(images: Tensor) -> Tensor:
    """Return the probabilities of the checkpoint by PyTorch alone."""
    weights = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    network = ConvNet().eval()
    network.load_state_dict({k.removeprefix("network."): v for k, v in weights.items()})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return network((images / 255 - mean) / std).softmax(dim=1)


def as_documented(file: str, folder: Path, *more: Path) -> None:
    """Run the lines of docs/export.md that use a file, where nothing of this project is but what
    is copied there; expect the class and probabilities of the checkpoint."""
    text = (ROOT / "docs" / "export.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.S) if f'"{file}"' in c]
    code += "import sys; numpy.save('p.npy', numpy.asarray(probabilities.tolist()))\n"
    code += f"assert {str(ROOT)!r} not in sys.path\n"
    away = folder / "away"
    away.mkdir()
    for path in (*folder.glob("model.*"), *more):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, away / path.name)
    image = some(1)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(away / "photo.png")
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=away, check=True, timeout=100, text=True,
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    found = torch.from_numpy(np.load(away / "p.npy")).float()
    assert torch.allclose(found, expected(image), atol=1e-5)
    assert ran.stdout.strip() == archive.CLASSES[int(expected(image).argmax())]


def test_onnx_says_the_same_for_every_size_of_batch(out: Out, tmp_path: Path) -> None:
    printed = out("onnx", "exports/model.onnx")
    assert "the same classes for 200 test images, probabilities within" in printed
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


def test_a_torch_program_needs_nothing_of_this_project(out: Out, tmp_path: Path) -> None:
    out("torch", "model.pt2")
    program = torch.export.load("model.pt2").module()
    for count in (1, 7):
        assert torch.allclose(program(some(count)), expected(some(count)), atol=1e-5)
    as_documented("model.pt2", tmp_path)


def test_weights_come_with_a_card_that_says_how_to_use_them(out: Out, tmp_path: Path) -> None:
    out("weights", "model.pth")
    out("weights", "model.pth")  # replaces the first
    card = json.loads(Path("model.json").read_text())
    assert card["network"]["class_path"] == "networks.ConvNet"
    assert card["mean"] == pytest.approx(MEAN)
    assert card["std"] == pytest.approx(STD)
    assert card["classes"] == list(archive.CLASSES)
    assert (card["recipe"], card["epoch"]) == ("normalised", 1)
    assert 0 < card["val/acc"] <= 1
    as_documented("model.pth", tmp_path, ROOT / "networks")


def test_a_checkpoint_of_weights_only_is_exported(out: Out) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    for key in ("callbacks", "optimizer_states", "lr_schedulers", "loops"):
        del checkpoint[key]
    torch.save(checkpoint, "weights.ckpt")
    for _ in range(2):  # the second time it replaces the first
        out("weights", "model.pth", Path("weights.ckpt"))
    assert "val/acc" not in json.loads(Path("model.json").read_text())


def test_a_network_of_ones_own_is_exported(out: Out) -> None:
    tiny = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert "the same classes" in out("onnx", "tiny.onnx", tiny)
    out("weights", "tiny.pth", tiny)
    card = json.loads(Path("tiny.json").read_text())
    assert card["network"]["init_args"] == {"width": 5}
    assert (card["mean"], card["std"]) == ([0, 0, 0], [1, 1, 1])
    # Its recipe averages over views, and so does what was exported; weights are of one view.
    network, images = Tiny(5).eval(), some(3)
    network.load_state_dict(torch.load("tiny.pth", weights_only=True))
    with torch.no_grad():
        logits = average_over_views(network, images / 255, card["test_time_augmentation"])
    (found,) = onnxruntime.InferenceSession("tiny.onnx").run(None, {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(found), logits.softmax(1), atol=1e-5)
    assert not torch.allclose(network(images / 255).softmax(1), logits.softmax(1), atol=1e-5)


def test_an_export_that_differs_is_not_kept(out: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model.onnx").write_text("an earlier one")
    before = sorted(Path().iterdir())

    def one_class(images: Tensor) -> Tensor:
        return torch.eye(10)[torch.zeros(len(images), dtype=torch.int64)]

    def less_sure(images: Tensor) -> Tensor:
        return 0.9 * expected(images) + 0.01

    for wrong, message in ((one_class, "names another class for"), (less_sure, "differ by")):
        monkeypatch.setitem(export.FORMATS, "onnx", lambda *_, wrong=wrong: wrong)
        with pytest.raises(SystemExit, match=f"error: the export.* {message}"):
            out("onnx", "model.onnx")
    assert sorted(Path().iterdir()) == before
    assert Path("model.onnx").read_text() == "an earlier one"


def changed(name: str, network: nn.Module, **settings: object) -> Path:
    """Save the checkpoint with another network in it."""
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
    out("weights", "model.pth", branching)  # a network that is made of another
    for format_, file in (("onnx", "new/model.onnx"), ("torch", "new/model.pt2")):
        with pytest.raises(SystemExit) as stopped:
            out(format_, file, branching)
        message = str(stopped.value.code)
        assert message.startswith(f"error: --format {format_} cannot hold Branching (")
        assert message.endswith("): --format weights can")
        assert len(message.splitlines()) == 1
    nn.init.constant_(layer.bias, float("nan"))
    diverged = changed("diverged.ckpt", Branching(layer), **settings)
    with pytest.raises(SystemExit, match="error: the export's probabilities differ by nan"):
        out("weights", "new/model.pth", diverged)
    assert not Path("new").exists()


def test_wrong_calls_are_refused_in_one_line_and_leave_nothing(
    out: Out, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    Path("link.ckpt").symlink_to(CHECKPOINT)
    Path("damaged.ckpt").write_bytes(CHECKPOINT.read_bytes()[:5000])
    hostile = torch.load(CHECKPOINT, weights_only=True)
    hostile["hyper_parameters"]["_instantiator"] = "subprocess.Popen"
    hostile["hyper_parameters"]["network"] = {
        "class_path": "subprocess.Popen", "init_args": {"args": ["touch", "hacked"]},
    }  # fmt: skip
    torch.save(hostile, "hostile.ckpt")
    Path("notes.json").write_text("{}")
    Path("mine").mkdir()
    Path("mine/index.html").write_text("my own page")

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}

    before = files()

    def refused(message: str, format_: str, file: str, checkpoint: Path = CHECKPOINT) -> None:
        with pytest.raises(SystemExit) as stopped:
            out(format_, file, checkpoint)
        code = stopped.value.code
        line = code if isinstance(code, str) else capsys.readouterr().err
        assert code
        assert line.startswith("error: ")
        assert message in line
        assert len(line.strip().splitlines()) == 1
        assert files() == before

    refused("no checkpoint nowhere.ckpt", "onnx", "m.onnx", Path("nowhere.ckpt"))
    refused("not a checkpoint", "onnx", "m.onnx", Path("damaged.ckpt"))
    refused("does not say how to build its network", "onnx", "m.onnx", Path("hostile.ckpt"))
    refused("full is no file", "onnx", "full")
    refused("full holds other things", "page", "full")
    refused("--out .: name a new", "page", ".")
    refused("--out .: name a new", "weights", ".")
    refused("is a file of the run", "onnx", str(CHECKPOINT))
    refused("is a file of the run", "onnx", str(CHECKPOINT), Path("link.ckpt"))
    refused("card will be the .json file", "weights", "m.json")
    refused("ends in .pt2", "torch", "m.torch")
    refused("notes.json is no card of weights", "weights", "notes.pth")
    refused("is a file of the run", "weights", str(CHECKPOINT.parents[1] / "model.pth"))
    refused("mine holds other things", "page", "mine")
    refused("format", "keras", "m")
    with monkeypatch.context() as patch:
        patch.setattr(export, "NEEDS", ("onnx", "no_such_package"))
        said = "needs no_such_package: pip install -e '.[export]'"
        refused(f"--format onnx {said}", "onnx", "m.onnx")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refused("the npm command is not installed: install npm", "page", "new/page")


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
        webdriver.Chrome(options, service) as browser,
    ):

        def says(text: str) -> None:
            WebDriverWait(browser, 30).until(
                lambda browser: text in browser.find_element(By.ID, "result").text
            )

        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        browser.get(f"http://127.0.0.1:{port}")
        says("Choose a picture.")
        for i, probabilities in enumerate(expected(images)):
            browser.find_element(By.ID, "file").send_keys(str(Path(f"{i}.png").resolve()))
            best = int(probabilities.argmax())
            says(f"{archive.CLASSES[best]}, {100 * float(probabilities[best]):.1f} %")
        Path("notes.txt").write_text("no picture")
        browser.find_element(By.ID, "file").send_keys(str(Path("notes.txt").resolve()))
        says("notes.txt is no picture")
        server.kill()
