"""The user's own image files, read as uint8 [3, 32, 32]."""

import functools
import glob
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cifar10.archive import CIFAR10Error
from cifar10.batches import Batch

BATCH_SIZE = 64
bar = functools.partial(tqdm, leave=False, disable=None)  # on a terminal only
MANY = 200  # files from which on worker processes pay off
if HAS_HEIF := importlib.util.find_spec("pillow_heif") is not None:  # optional: phones write HEIC
    importlib.import_module("pillow_heif").register_heif_opener()


def find_pictures(images: str | Sequence[str]) -> list[Path]:
    """Return the files that `images` names: files, all files in and below folders, matches of
    patterns. Files are sorted within an entry and listed once. Raise for an entry without files."""
    pictures: dict[Path, None] = {}
    for entry in [images] if isinstance(images, str) else images:
        path = Path(entry)
        if path.is_dir():
            inside = files_in(path)
        else:
            matches = glob.glob(entry, recursive=True)  # noqa: PTH207  # Path refuses absolute ones
            inside = [path] if path.is_file() else [Path(match) for match in matches]
        if not (files := sorted(p for p in inside if p.is_file())):
            raise CIFAR10Error(f"data.images {entry}: no matching file, or an empty folder")
        pictures |= dict.fromkeys(files)
    return list(pictures)


def files_in(folder: Path) -> list[Path]:
    """Return all files in and below a folder, sorted by name, except hidden ones (.DS_Store) and
    those in hidden folders."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in files if not any(n[0] == "." for n in p.relative_to(folder).parts))


def folders_in(folder: Path) -> list[str]:
    """Return the names of sub-folders, except hidden ones and `__*` (from archives)."""
    return sorted(
        p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))
    )


def read_picture(path: Path) -> Tensor:
    """Return the image in a file as `to_pixels` does, turned upright by its EXIF data. For a file
    that is not an image, Pillow may raise any exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large files and odd metadata
        with Image.open(path) as file:
            return to_pixels(ImageOps.exif_transpose(file))


def to_pixels(picture: Image.Image) -> Tensor:
    """Return an image of any size and mode as uint8 [3, 32, 32]: its largest central square,
    resized, on white where it is transparent. A 32 x 32 image is not resampled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip
            picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        # Crop first: some versions of Pillow resize a tall image's height before its width.
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
        picture = square.resize((32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def why_unreadable(path: Path) -> str:
    """Read a skipped file once more, and return in plain words why that fails."""
    try:
        read_picture(path)
    except Image.DecompressionBombError:
        return f"larger than Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels"
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:  # the system's reason, not Pillow's
            return error.strerror
        if not HAS_HEIF and path.suffix.lower() in (".heic", ".heif"):
            return "HEIC needs pip install pillow-heif"
        return "not an image, or damaged"
    return "readable on the second attempt: was it still being written?"


class Pictures(Dataset[tuple[int, Tensor | None]]):
    """A data set of image files, each read on access."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        """Return the index and its image uint8 [3, 32, 32], or None if it can't be read."""
        try:
            return index, read_picture(self.files[index])
        except Exception:  # Pillow's decoders raise anything; `why_unreadable` says why
            return index, None

    def batches(self) -> DataLoader[tuple[int, Tensor | None]]:
        """Return a loader of the readable images, in batches of at most 64."""
        workers = min(4, torch.get_num_threads()) if len(self) >= MANY else 0
        return DataLoader(self, batch_size=BATCH_SIZE, collate_fn=_collate, num_workers=workers)


def _collate(pictures: list[tuple[int, Tensor | None]]) -> Batch:
    good = {index: image for index, image in pictures if image is not None}
    images = torch.stack([*good.values()]) if good else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    indices = torch.tensor([*good], dtype=torch.int64)
    return Batch(images, torch.full_like(indices, -1), indices)


class Part(NamedTuple):
    """Images uint8 [N, 3, 32, 32], labels uint8 [N], and the images' names."""

    images: Tensor
    labels: Tensor
    names: list[str]


def read_by_class(folder: Path, classes: Sequence[str]) -> tuple[Part, int]:
    """Return the images in the sub-folders named after classes, and the number of unreadable files,
    each of which is reported.

    Raises:
        CIFAR10Error: There are no readable images.
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = files_in(folder / name)  # none if there is no such folder
        files += inside
        labels += [label] * len(inside)
    batches = Pictures(files).batches()
    parts = [*bar(batches, desc=str(folder), unit_scale=BATCH_SIZE, unit=" files")]
    indices = torch.cat([part.indices for part in parts]) if parts else torch.zeros(0)
    for index in sorted({*range(len(files))} - {*indices.tolist()}):
        print(f"skipped {files[index]}: {why_unreadable(files[index])}", file=sys.stderr)
    if not len(indices):
        raise CIFAR10Error(f"{folder}: no readable image in any class folder")
    images = torch.cat([part.images for part in parts])
    names = [str(files[index]) for index in indices.tolist()]
    part = Part(images, torch.tensor(labels, dtype=torch.uint8)[indices], names)
    return part, len(files) - len(indices)
