"""Other test sets, for `--data.test_set`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cifar10.arrays import CIFAR10Error, check_form, classes_in, read_arrays
from cifar10.pictures import folders_in, read_by_class


class TestSet(NamedTuple):
    """Images uint8 [N, 3, 32, 32], labels uint8 [N], and the number of unreadable files."""

    images: Tensor
    labels: Tensor
    skipped: int = 0


SEVERITIES = 5  # per corruption: consecutive, equal parts of its file


def read_test_sets(path: Path, classes: Sequence[str]) -> dict[str, TestSet]:
    """Return the test sets at a path, by name: one per corruption for a folder of corruptions,
    otherwise one with an empty name.

    Args:
        path: A folder of arrays with class names; a folder of image files, with a sub-folder per
            class; a folder with labels.npy and either one file of images or one per corruption, as
            in CIFAR-10-C; or the common prefix of two files that end in _data.npy and _labels.npy,
            as in CIFAR-10.1.
        classes: The model's classes, by label.

    Raises:
        CIFAR10Error: The path has nothing of this kind, or other classes.

    """

    def refused(why: str) -> CIFAR10Error:
        return CIFAR10Error(f"data.test_set {path}: {why}")

    pair = [Path(f"{path}_{part}.npy") for part in ("data", "labels")]
    if any(file.is_file() for file in pair):
        if missing := [file for file in pair if not file.is_file()]:
            raise refused(f"there is no {missing[0]}")
        return {"": _read(pair[0], pair[1], len(classes))}
    if path.is_file():
        raise refused("expected a folder, or the common prefix of a pair *_data.npy, *_labels.npy")
    if not path.is_dir():
        raise refused(f"no such folder, and no {pair[0].name}")
    if names := classes_in(path):
        if difference := other_classes(classes, names):
            raise refused(difference)
        data = read_arrays(path)
        check_form(data, len(classes), path)
        return {"": TestSet(data.test_images, data.test_labels)}
    arrays, labels = sorted(path.glob("*.npy")), path / "labels.npy"
    if labels in arrays:
        test_sets = {f.stem: _read(f, labels, len(classes)) for f in arrays if f != labels}
        if not test_sets:
            raise refused("found labels.npy, but no images")
        if len(test_sets) == 1:
            return {"": next(iter(test_sets.values()))}
        if (count := len(next(iter(test_sets.values())).labels)) % SEVERITIES:
            raise refused(
                f"{count} images per file, expected {SEVERITIES} severities of equal size"
            )
        return test_sets
    if arrays:
        raise refused(
            "no labels.npy next to the arrays; for a pair *_data.npy, *_labels.npy, give the "
            f"common prefix, e.g. {path / 'cifar10.1_v6'}"
        )
    if unknown := [folder for folder in folders_in(path) if folder not in classes]:
        raise refused(f"{', '.join(unknown)}: not among the classes {', '.join(classes)}")
    part, skipped = read_by_class(path, classes)
    return {"": TestSet(part.images, part.labels, skipped)}


def other_classes(expected: Sequence[str], found: Sequence[str]) -> str:
    """Say how the images' classes differ from the model's; nothing if they are the same."""
    if len(expected) != len(found):
        sizes = (
            f"{len(names)} classes ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for names in (expected, found)
        )
        return "the model has {}, the images have {}".format(*sizes)
    differing = (i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    first = next(differing, None)
    if first is None:
        return ""
    return f"label {first} is {expected[first]} for the model, {found[first]} for the images"


def _read(images: Path, labels: Path, classes: int) -> TestSet:
    """Read images uint8 [N, 32, 32, 3] from one file, memory-mapped, and labels [N] of any integer
    type from another."""
    try:
        pixels, values = (np.load(f, mmap_mode="c", allow_pickle=False) for f in (images, labels))
    except (OSError, ValueError, EOFError) as error:
        raise CIFAR10Error(f"{images} or its labels are damaged: {error}") from error
    if values.ndim != 1 or values.dtype.kind not in "iu" or not len(values):
        raise CIFAR10Error(f"{labels}: {values.dtype} {list(values.shape)}, expected integers [N]")
    if pixels.dtype != np.uint8 or pixels.shape != (len(values), 32, 32, 3):
        raise CIFAR10Error(
            f"{images}: {pixels.dtype} {list(pixels.shape)}, expected uint8 "
            f"{[len(values), 32, 32, 3]}, as there are {len(values)} labels"
        )
    if values.min() < 0 or values.max() >= classes:
        raise CIFAR10Error(
            f"{labels}: labels from {values.min()} to {values.max()}, expected 0 to {classes - 1}"
        )
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return TestSet(tensor, torch.from_numpy(values.astype(np.uint8)))
