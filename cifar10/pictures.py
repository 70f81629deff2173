"""Pictures of one's own, made into what the network has learned from."""

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cifar10.archive import CIFAR10Error
from cifar10.batches import Batch

BATCH_SIZE = 64
MANY = 200  # files from which on it pays to read them in other processes


def find_pictures(images: str | Sequence[str]) -> list[Path]:
    """Return the files that are meant: files, all files in and below folders, what patterns match;
    in the order of their names, each once.

    Raises:
        CIFAR10Error: There are none.
    """
    found: dict[Path, None] = {}
    for word in [images] if isinstance(images, str) else images:
        path = Path(word)
        if path.is_dir():
            # Names that begin with a point are the system's.
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
        elif path.is_file():
            inside = [path]
        else:
            matches = glob.glob(word, recursive=True)  # noqa: PTH207  # Path refuses absolute ones
            inside = sorted(path for path in map(Path, matches) if path.is_file())
        if not inside:
            raise CIFAR10Error(f"data.images {word}: no such file, and no files in such a folder")
        found |= dict.fromkeys(inside)
    return list(found)


def read_picture(path: Path) -> Tensor:
    """Return a picture of any size and mode as uint8 [3, 32, 32].

    It is turned upright, as its EXIF data say; what is transparent becomes white; the
    largest square in its middle is made smaller. A picture of 32 x 32 stays as it is.

    Raises:
        Exception: Of any kind, from Pillow, for a file that is no picture, or a damaged one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large files and of odd metadata
        with Image.open(path) as file:
            file.draft("RGB", (128, 128))  # a JPEG can be read smaller, which is much faster
            picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would cut off
            picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = ImageOps.fit(picture.convert("RGB"), (32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class Pictures(Dataset[tuple[int, Tensor | None]]):
    """Files, each read when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        """Return a picture uint8 [3, 32, 32], or None for a file that is none, with its index."""
        try:
            return index, read_picture(self.files[index])
        except Exception:  # a file that is no picture can fail in any way
            return index, None

    def batches(self) -> DataLoader[tuple[int, Tensor | None]]:
        """Return all pictures in batches of at most 64, those left out that are none."""
        workers = min(4, torch.get_num_threads()) if len(self) >= MANY else 0
        return DataLoader(self, batch_size=BATCH_SIZE, collate_fn=_collate, num_workers=workers)


def _collate(pictures: list[tuple[int, Tensor | None]]) -> Batch:
    good = [(index, image) for index, image in pictures if image is not None]
    indices = torch.tensor([index for index, _ in good], dtype=torch.int64)
    images = [image for _, image in good]
    stacked = torch.stack(images) if images else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    return Batch(stacked, torch.full_like(indices, -1), indices)
