"""The trained models that ship with the project."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from lightning_module import ImageClassifier

FOLDER = Path(__file__).parents[1] / "pretrained"
NAMES = ("base", "improved", "fast94")
LARGEST = 5_000_000  # bytes


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, where results may be written."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(FOLDER, "pretrained"))


@pytest.mark.parametrize("name", NAMES)
def test_a_pretrained_model_is_small_and_the_one_of_its_card(copied: Path, name: str) -> None:
    content, card = (copied / f"{name}.ckpt").read_bytes(), (copied / f"{name}.md").read_text()
    assert len(content) <= LARGEST
    assert f"**SHA-256**: {hashlib.sha256(content).hexdigest()}" in card
    assert f"**Command**: `python train.py fit --config configs/{name}.yaml" in card
    for line in ("**Seed**: 0", "**Validation**: accuracy", "on the test images of CIFAR-10"):
        assert line in card
    assert b"optimizer_states" not in content


def test_a_photo_is_classified_without_the_data_set(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (60, 40), "skyblue").save("photo.jpg")
    for name in NAMES:
        checkpoint = str(copied / f"{name}.ckpt")
        train.main(["predict", "--ckpt_path", checkpoint, "--data.images", "photo.jpg"])
        assert "photo.jpg" in capsys.readouterr().out
        assert (copied / name / "predictions.csv").exists()
        model = ImageClassifier.load_from_checkpoint(checkpoint).eval()
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert not Path("data").exists()
    assert not Path("runs").exists()
