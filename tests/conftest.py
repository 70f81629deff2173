"""A small learnable data set in the official form, and a way to run the command line."""

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# Several tests run at a time, each on a core. Said before torch is imported, here and in what they
# start.
os.environ["OMP_NUM_THREADS"] = "1"

import train
from cifar10 import archive

TRAIN_SIZE, TEST_SIZE = 1000, 200


def made_up_batches() -> dict[str, bytes]:
    """Return the six official batch files of a data set whose classes are colour patterns plus
    noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    files = {}
    for name in archive.BATCHES:
        labels = rng.permutation(np.arange(200) % 10)
        noise = rng.normal(0, 40, (200, 3, 32, 32))
        images = (patterns[labels] + noise).clip(0, 255).astype(np.uint8)
        batch = {b"data": images.reshape(200, 3072), b"labels": labels.tolist()}
        files[name] = pickle.dumps(batch, protocol=2)
    return files


@pytest.fixture(scope="session")
def batches() -> dict[str, bytes]:
    """The made-up data set, in the official form."""
    return made_up_batches()


@pytest.fixture
def folder(batches: dict[str, bytes], tmp_path: Path) -> Path:
    """A data folder with the official batch files in it."""
    root = tmp_path / "data"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name, content in batches.items():
        (root / "cifar-10-batches-py" / name).write_bytes(content)
    return root


@pytest.fixture(scope="session")
def tarball(batches: dict[str, bytes]) -> bytes:
    """The official archive of the same data set."""
    return tar({f"cifar-10-batches-py/{name}": content for name, content in batches.items()})


def tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tarfile_:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tarfile_.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope="session")
def arrays(batches: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that was loaded from before, shared by the tests that only read it."""
    root = tmp_path_factory.mktemp("data")
    (root / archive.ARCHIVE).write_bytes(
        tar({f"cifar-10-batches-py/{name}": content for name, content in batches.items()})
    )
    archive.load(root, verify=False)
    return root


Run = Callable[..., str]


@pytest.fixture
def run(
    arrays: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `python train.py ...` on the small data set in an empty folder; return what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, data: Path = arrays) -> str:
        words = [str(arg) for arg in args]
        if words[0] == "fit" and "--ckpt_path" not in words:
            after_config = words.index("--config") + 2 if "--config" in words else 1
            words[after_config:after_config] = [
                *("--data.root", str(data), "--data.verify", "false", "--data.val_size", "200"),
                *("--data.batch_size", "50", "--trainer.max_epochs", "2"),
                *("--trainer.accelerator", "cpu"),
            ]
            if not any("fast94" in word for word in words):  # which has a rate for each group
                words[after_config:after_config] = ["--model.optimizer.lr", "0.002"]
        capsys.readouterr()
        train.main(words)
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python train.py ...`, expect it to fail with one line and no traceback; return it."""

    def fails(*args: object, **kwargs: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*args, **kwargs)
        if isinstance(stopped.value.code, str):  # Python prints it, and exits with 1
            message = stopped.value.code
        else:
            assert stopped.value.code
            message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert len(message.strip().splitlines()) == 1
        return message

    return fails
