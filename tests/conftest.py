"""A small learnable data set, and a way to run the command line."""

import io
import os
import pickle
import re
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Several tests run at a time, one core each. Set before torch is imported, here and in child
# processes.
os.environ["OMP_NUM_THREADS"] = "1"

import train
from cifar10 import archive

TRAIN_SIZE, TEST_SIZE = 1000, 200
BASE = Path(__file__).parents[1] / "configs" / "base.yaml"


def made_up() -> dict[str, np.ndarray]:
    """Return a data set whose classes are colour patterns plus noise: images uint8 [N, 3, 32, 32]
    and labels uint8 [N], keyed by the names of the four arrays."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    images, labels = [], []
    for _ in range(6):
        labels.append(rng.permutation(np.arange(200) % 10))
        noise = rng.normal(0, 40, (200, 3, 32, 32))
        images.append((patterns[labels[-1]] + noise).clip(0, 255).astype(np.uint8))
    return {
        "train_images": np.concatenate(images[:5]),
        "train_labels": np.concatenate(labels[:5]).astype(np.uint8),
        "test_images": images[5],
        "test_labels": labels[5].astype(np.uint8),
    }


def official(data: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Return the same data as the six official batch files: pickles of Python 2 and its NumPy,
    with other module names, and integers for booleans."""
    images = np.concatenate([data["train_images"], data["test_images"]]).reshape(6, -1, 3072)
    labels = np.concatenate([data["train_labels"], data["test_labels"]]).reshape(6, -1)
    files = {}
    for name, pixels, classes in zip(archive.BATCH_MD5, images, labels, strict=True):
        content = pickle.dumps({b"data": pixels, b"labels": classes.tolist()}, protocol=2)
        content = content.replace(b"numpy._core", b"numpy.core", 1)
        old = re.sub(rb"(?<=u1q.)\x89\x88(?=\x87)", b"K\x00K\x01", content, count=1, flags=re.S)
        assert old != content
        files[name] = old
    return files


def tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tarfile_:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tarfile_.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope="session")
def batches() -> dict[str, bytes]:
    """The made-up data set as official batch files."""
    return official(made_up())


@pytest.fixture(scope="session")
def tarball(batches: dict[str, bytes]) -> bytes:
    """The official archive of the same data set."""
    return tar({f"cifar-10-batches-py/{name}": content for name, content in batches.items()})


@pytest.fixture(scope="session")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the made-up data set, shared by the tests that only read it."""
    root = tmp_path_factory.mktemp("data")
    (root / archive.FOLDER).mkdir()
    for name, array in made_up().items():
        np.save(root / archive.FOLDER / f"{name}.npy", array)
    return root


# Arguments of a Trainer that writes and prints nothing.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def on(root: Path) -> list[str]:
    """Return the flags that train on the made-up data set in a folder."""
    return ["--data.root", str(root), "--data.verify", "false", "--data.val_size", "200"]


Run = Callable[..., str]


def copy_runs(source: Path, target: Path) -> None:
    """Copy a folder of runs, preserving hard links."""
    copies: dict[int, str] = {}

    def copy(file: str, to: str) -> None:
        inode = Path(file).stat().st_ino
        if inode in copies:
            os.link(copies[inode], to)
        else:
            copies[inode] = to
            shutil.copy2(file, to)

    shutil.copytree(source, target, copy_function=copy)


Done = dict[tuple[str, ...], tuple[Path, str]]


@pytest.fixture(scope="session")
def done() -> Done:
    """The runs of `run(..., once=True)`: folder and output, by arguments."""
    return {}


@pytest.fixture
def run(
    arrays: Path,
    done: Done,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `python train.py ...` on the small data set in an empty folder; return what it prints.

    base.yaml trains `Small`, unless `--model.network` is given. With `once=True`, for tests of what
    follows a first `fit`, the run is copied from an earlier one with the same arguments.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "warnoptions", ["default"])  # keeps pytest's filters

    def run(*args: object, data: Path = arrays, once: bool = False) -> str:
        words = [str(arg) for arg in args]
        if words[0] == "fit" and "--ckpt_path" not in words:
            after_config = words.index("--config") + 2 if "--config" in words else 1
            words[after_config:after_config] = [
                *(*on(data), "--data.batch_size", "50", "--trainer.max_epochs", "2"),
                *("--trainer.accelerator", "cpu"),
            ]
            # Speedruns have a learning rate for each group.
            if not any(re.search(r"fast9\d|airbench", word) for word in words):
                words[after_config:after_config] = ["--model.optimizer.lr", "0.002"]
            if str(BASE) in words and not any(word.startswith("--model.network") for word in words):
                words[after_config:after_config] = ["--model.network", "tests.small.Small"]
        capsys.readouterr()
        if not once:
            train.main(words)
            return capsys.readouterr().out
        assert not Path("runs").exists(), "only the first run of a test can be a copy"
        if tuple(words) not in done:
            folder = tmp_path_factory.mktemp("done")
            with monkeypatch.context() as there:
                there.chdir(folder)
                train.main(words)
            done[tuple(words)] = folder, capsys.readouterr().out
        folder, out = done[tuple(words)]
        copy_runs(folder / "runs", Path("runs"))
        return out

    return run


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines passed to `print`, for any stream; nothing is printed."""
    lines: list[str] = []
    say = lambda *words, **_: lines.append(" ".join(map(str, words)))  # noqa: E731
    monkeypatch.setattr("builtins.print", say)
    return lines


@pytest.fixture
def fails(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python train.py ...`, expect one line of error and no traceback; return the line."""

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
