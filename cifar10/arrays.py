"""An image set: a folder of four arrays and, unless it is CIFAR-10, its class names.

    data/digits/classes.json        ["zero", "one", ...], by label
    data/digits/train_images.npy    uint8 [N, 3, 32, 32]
    data/digits/train_labels.npy    uint8 [N]
    data/digits/test_images.npy, test_labels.npy

The arrays are memory-mapped, so they load quickly, and cannot run code.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

NAMES = "classes.json"
MOST = 256  # classes: labels have 8 bits


class CIFAR10Error(MisconfigurationException):
    """Images can't be found or fetched, or are invalid. The message is one line, for the user."""


class Arrays(NamedTuple):
    """The data set: images uint8 [N, 3, 32, 32] in 0..255, labels uint8 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def classes_in(folder: str | Path) -> tuple[str, ...] | None:
    """Return the class names of the arrays in a folder, by label; None if there are none, as for
    CIFAR-10.

    Raises:
        CIFAR10Error: There are arrays without names, or the file is not a list of names.
    """
    file = Path(folder, NAMES)
    if not file.is_file():
        if Path(folder, "train_images.npy").is_file():
            raise CIFAR10Error(
                f"{folder} has arrays but no {NAMES}: add one that lists the classes by label, "
                'e.g. ["cat", "dog"]'
            )
        return None
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CIFAR10Error(f"{file} is not JSON: {error}") from error
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not (is_list and len({*names}) == len(names) and 2 <= len(names) <= MOST):
        raise CIFAR10Error(f"{file}: expected a list of 2 to {MOST} different names")
    return tuple(names)


def read_arrays(folder: Path, mend: str = "") -> Arrays:
    """Return the arrays in a folder, memory-mapped: copy-on-write, since PyTorch has no read-only
    tensors. `mend` says how to fix a damaged array.

    Raises:
        CIFAR10Error: One is missing or damaged.
    """
    tensors = []
    for name in Arrays._fields:
        file = folder / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="c", allow_pickle=False)
            tensors.append(torch.from_numpy(array))
        except (OSError, ValueError, EOFError, TypeError) as error:
            reason = getattr(error, "strerror", None) or "truncated, or not an array of numbers"
            raise CIFAR10Error(f"{folder} is damaged ({file.name}: {reason}){mend}") from error
    return Arrays(*tensors)


def check_form(data: Arrays, classes: int, origin: Path) -> None:
    """Raise CIFAR10Error for other shapes or dtypes, empty sets, and labels >= `classes`."""
    for part in ("train", "test"):
        images, labels = f"{part}_images", f"{part}_labels"
        count = list(getattr(data, images).shape[:1])
        for name, shape in ((images, [*count, 3, 32, 32]), (labels, count)):
            tensor = getattr(data, name)
            if tensor.dtype != torch.uint8 or list(tensor.shape) != shape:
                raise CIFAR10Error(
                    f"{origin}: {name} are {tensor.dtype} {list(tensor.shape)}, "
                    f"expected torch.uint8 {shape}"
                )
        if count == [0]:
            raise CIFAR10Error(f"{origin}: {images} are empty")
        if (largest := getattr(data, labels).max()) >= classes:
            raise CIFAR10Error(f"{origin}: {labels} reach {largest}, expected 0 to {classes - 1}")


def read_folder(folder: Path, classes: Sequence[str]) -> Arrays:
    """Return the arrays of a set with these classes. Raise if one lacks training images."""
    data = read_arrays(folder)
    check_form(data, len(classes), folder)
    counts = torch.bincount(data.train_labels, minlength=len(classes))
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise CIFAR10Error(f"{folder}: no training image of {', '.join(missing)}")
    return data


def save_arrays(folder: Path, data: Arrays) -> None:
    """Write the arrays into an existing folder."""
    for name, tensor in data._asdict().items():
        np.save(folder / f"{name}.npy", tensor.numpy())


def sha256(array: Tensor | np.ndarray) -> str:
    """Return the SHA-256 of an array's values in C order, whatever its shape. Tensors must be on
    the CPU."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
