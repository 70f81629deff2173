"""What leaves the laboratory: the same predictions, in a file that needs nothing of it."""

import json
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
from networks import ConvNet

ROOT = Path(__file__).parents[1]
CHECKPOINT = Path("runs/normalised/version_0/checkpoints/epoch_01.ckpt")
MEAN, STD = (0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)


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


def elsewhere(code: str, folder: Path) -> Tensor:
    """Run Python that knows nothing of this project; it saves its probabilities as p.npy."""
    np.save(folder / "images.npy", some(7).numpy())
    subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True, timeout=100)
    return torch.from_numpy(np.load(folder / "p.npy"))


def test_onnx_says_the_same_for_every_size_of_batch(out: Out) -> None:
    printed = out("onnx", "exports/model.onnx")
    assert "the same classes for 200 test images, probabilities within" in printed
    session = onnxruntime.InferenceSession("exports/model.onnx")
    for count in (1, 7):
        (found,) = session.run(None, {"images": some(count).numpy()})
        assert found.dtype == np.float32
        assert torch.allclose(torch.from_numpy(found), expected(some(count)), atol=1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(archive.CLASSES)
    assert json.loads(metadata["epoch"]) == 1
    assert [path.name for path in Path("exports").iterdir()] == ["model.onnx"]


def test_a_torch_program_needs_nothing_of_this_project(out: Out, tmp_path: Path) -> None:
    out("torch", "model.pt2")
    found = elsewhere(
        "import json, numpy, torch\n"
        "extra = {'card.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=extra).module()\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "assert len(json.loads(extra['card.json'])['classes']) == 10\n"
        "numpy.save('p.npy', program(images).detach().numpy())\n",
        tmp_path,
    )
    assert torch.allclose(found, expected(some(7)), atol=1e-5)


def test_weights_come_with_a_card_that_says_how_to_use_them(out: Out) -> None:
    out("weights", "model.pth")
    card = json.loads(Path("model.json").read_text())
    assert card["network"]["class_path"] == "networks.ConvNet"
    assert card["mean"] == pytest.approx(MEAN)
    assert card["std"] == pytest.approx(STD)
    assert card["classes"] == list(archive.CLASSES)
    assert (card["recipe"], card["epoch"]) == ("normalised", 1)
    assert 0 < card["val/acc"] <= 1
    network = ConvNet(**card["network"]["init_args"]).eval()
    network.load_state_dict(torch.load("model.pth", weights_only=True))
    mean, std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
    probabilities = network((some(3) / 255 - mean) / std).softmax(dim=1)
    assert torch.allclose(probabilities, expected(some(3)), atol=1e-6)


def test_a_network_of_ones_own_is_exported(out: Out) -> None:
    tiny = Path("runs/tiny/version_0/checkpoints/last.ckpt")
    assert "the same classes" in out("onnx", "tiny.onnx", tiny)
    out("weights", "tiny.pth", tiny)
    card = json.loads(Path("tiny.json").read_text())
    assert card["network"]["init_args"] == {"width": 5}
    assert (card["mean"], card["std"]) == ([0, 0, 0], [1, 1, 1])


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


def test_wrong_calls_are_refused_in_one_line_and_leave_nothing(
    out: Out, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
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
    before = sorted(Path().rglob("*"))

    def refused(message: str, format_: str, file: str, checkpoint: Path = CHECKPOINT) -> None:
        with pytest.raises(SystemExit) as stopped:
            out(format_, file, checkpoint)
        code = stopped.value.code
        line = code if isinstance(code, str) else capsys.readouterr().err
        assert code
        assert line.startswith("error: ")
        assert message in line
        assert len(line.strip().splitlines()) == 1
        assert sorted(Path().rglob("*")) == before

    refused("no checkpoint nowhere.ckpt", "onnx", "m.onnx", Path("nowhere.ckpt"))
    refused("not a checkpoint", "onnx", "m.onnx", Path("damaged.ckpt"))
    refused("does not say how to build its network", "onnx", "m.onnx", Path("hostile.ckpt"))
    refused("full is a folder", "torch", "full")
    refused("full holds other things", "page", "full")
    refused("is a file of the run", "onnx", str(CHECKPOINT))
    refused(".json", "weights", "m.json")
    refused("notes.json is no card of weights", "weights", "notes.pth")
    refused("is a file of the run", "weights", str(CHECKPOINT.parents[1] / "model.pth"))
    refused("mine holds other things", "page", "mine")
    refused("format", "keras", "m")
    with monkeypatch.context() as patch:
        patch.setattr(export, "NEEDS", ("onnx", "no_such_package"))
        refused("needs no_such_package: pip install -e '.[export]'", "onnx", "m.onnx")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    refused("npm command is not installed", "page", "page")


@pytest.mark.real_images
def test_the_page_in_a_browser_says_what_the_network_says(out: Out, arrays: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    out("page", "page")
    assert "http" not in Path("page/index.html").read_text(), "nothing from elsewhere"
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
