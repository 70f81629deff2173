"""Other images to test on, for `--data.test_set`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar10.arrays import CIFAR10Error, check_form, classes_in, read_arrays
from cifar10.pictures import read_by_class


class TestSet(NamedTuple):
    """Images uint8 [N, 3, 32, 32] and labels uint8 [N]."""

    images: Tensor
    labels: Tensor


def read_test_sets(path: Path, classes: Sequence[str]) -> dict[str, TestSet]:
    """Return the test images in a path, by the names of the sets.

    Args:
        path: A folder of arrays with their classes; one of pictures, with a folder for each class;
            one with labels.npy and a file for each of several corruptions, as CIFAR-10-C; or what
            the names of two files begin with that end in _data.npy and _labels.npy, as those of
            CIFAR-10.1.
        classes: Of the model, by label.

    Raises:
        CIFAR10Error: There is nothing of this kind, or it has other classes.

    """
    pair = [Path(f"{path}_{part}.npy") for part in ("data", "labels")]
    if all(file.is_file() for file in pair):
        return {path.name: _read(pair[0], pair[1], len(classes))}
    if not path.is_dir():
        raise CIFAR10Error(f"data.test_set {path}: no such folder, or pair of files")
    name = path.resolve().name
    if names := classes_in(path):
        if names != tuple(classes):
            raise CIFAR10Error(f"data.test_set {path}: its classes are not those of the model")
        data = read_arrays(path)
        check_form(data, len(classes), path)
        return {name: TestSet(data.test_images, data.test_labels)}
    if (labels := path / "labels.npy").is_file():
        files = sorted({*path.glob("*.npy")} - {labels})
        if not files:
            raise CIFAR10Error(f"data.test_set {path}: labels.npy, but no images")
        return {file.stem: _read(file, labels, len(classes)) for file in files}
    folders = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    if unknown := [folder for folder in folders if folder not in classes]:
        raise CIFAR10Error(f"data.test_set {path}: {unknown[0]} is none of the model's classes")
    part, _ = read_by_class(path, classes)
    return {name: TestSet(part.images, part.labels)}


def _read(images: Path, labels: Path, classes: int) -> TestSet:
    """Return images uint8 [N, 32, 32, 3] in one file, mapped into memory, and labels [N] of any
    integer type in another."""
    try:
        pixels, values = (np.load(f, mmap_mode="c", allow_pickle=False) for f in (images, labels))
    except (OSError, ValueError, EOFError) as error:
        raise CIFAR10Error(f"{images} or its labels are damaged: {error}") from error
    is_right = pixels.dtype == np.uint8 and pixels.shape == (len(values), 32, 32, 3)
    if not (is_right and values.ndim == 1 and values.dtype.kind in "iu" and len(values)):
        raise CIFAR10Error(
            f"{images}: {pixels.dtype} {list(pixels.shape)} with labels {values.dtype} "
            f"{list(values.shape)}, expected uint8 [N, 32, 32, 3] and integers [N]"
        )
    if values.min() < 0 or values.max() >= classes:
        raise CIFAR10Error(f"{labels}: labels from {values.min()} to {values.max()}")
    found = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return TestSet(found, torch.from_numpy(values.astype(np.uint8)))
