"""Convert image files or a torchvision data set to a folder of arrays for `--data.root`.

    python convert.py photos --out data/pets                   # photos/cat/1.jpg, photos/dog/2.png
    python convert.py torchvision:CIFAR100 --out data/cifar100
    python train.py fit --config configs/base.yaml --data.root data/pets --data.val_size 500

A folder has a sub-folder for each class, or `train` and `test` with such sub-folders. Without
`test`, a part of each class is held out for testing. Image files are read as in `predict`.
"""

import inspect
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torchvision
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from cifar10.arrays import MOST, NAMES, Arrays, save_arrays
from cifar10.pictures import Part, bar, files_in, folders_in, read_by_class, to_pixels
from terminal import ShortParser, short_errors

# The minimum correlation of two images that count as alike. On CIFAR-10 it finds 100 of the 286
# test images that ciFAIR lists as such, and 48 others.
NEAR = 0.95
SHOWN = 10  # near-duplicates, and classes
FEW = 2000  # training images
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def read_folders(source: Path, test_share: float, seed: int) -> tuple[list[str], list[Part], int]:
    """Return the classes of a folder of image files, its training and test parts, and the number of
    skipped files."""
    folders = {*folders_in(source)}
    is_split = folders == {"train", "test"}
    parts = [name for name in sorted(folders) if name.lower() in PARTS]
    if len(parts) > 1 and not is_split:  # a lone `train` may be a class
        raise MisconfigurationException(
            f"{source} has {', '.join(sorted(folders))}, and {parts[0]} is not a class: name "
            "the parts train and test, without other folders next to them (`fit` holds out the "
            "validation set)"
        )
    parent = source / "train" if is_split else source
    classes = folders_in(parent)
    if not 2 <= len(classes) <= MOST:
        names = ", ".join(classes[:3]) or "none"
        raise MisconfigurationException(
            f"{parent}: expected a folder for each of 2 to {MOST} classes, found {names}"
        )
    least = 1 if is_split else 2
    for name in classes:  # before the slow reading
        if len(files_in(parent / name)) < least:
            raise MisconfigurationException(
                f"{parent / name} has fewer than {least} files: add images, or remove the folder"
            )
    if is_split and (others := {*folders_in(source / "test")} - {*classes}):
        raise MisconfigurationException(
            f"{source}/test has {', '.join(sorted(others))}, which train lacks"
        )
    train, skipped = read_by_class(parent, classes)
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < least:
            raise MisconfigurationException(
                f"{parent / name}: {count} readable images, expected at least {least}"
            )
    if is_split:
        test, more = read_by_class(source / "test", classes)
        return classes, [train, test], skipped + more
    is_test, generator = torch.zeros(len(train.labels), dtype=torch.bool), torch.Generator()
    generator.manual_seed(seed)
    for label, count in enumerate(counts):
        places = (train.labels == label).nonzero()[:, 0]
        held_out = min(count - 1, max(1, round(test_share * count)))
        is_test[places[torch.randperm(count, generator=generator)[:held_out]]] = True
    halves = [
        Part(train.images[mask], train.labels[mask], [train.names[i] for i in mask.nonzero()[:, 0]])
        for mask in (~is_test, is_test)
    ]
    return classes, halves, skipped


def read_torchvision(name: str, root: Path) -> tuple[list[str], list[Part], int]:
    """Return the classes, the training and test parts of a labelled torchvision data set in `root`,
    downloaded if necessary, and 0 skipped files."""
    make: Callable[..., Iterator[tuple[object, int]]] | None = getattr(
        torchvision.datasets, name, None
    )
    params = inspect.signature(make).parameters if make else {}
    if make is None or not {"train", "split"} & {*params}:
        raise MisconfigurationException(
            f"torchvision has no data set {name} with training and test images: try MNIST, "
            "FashionMNIST, SVHN, STL10 or CIFAR100"
        )
    parts, classes, labelled = [], [], None
    for part in ("train", "test"):
        given: dict[str, Any] = {"train": part == "train"} if "train" in params else {"split": part}
        if "download" in params:
            given["download"] = True
        try:
            labelled = make(str(root), **given)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                f"torchvision's {name}: can't load its training and test sets: {error}"
            ) from error
        pairs = [(to_pixels(image), label) for image, label in bar(labelled, desc=f"{name} {part}")]
        images, labels = zip(*pairs, strict=True)
        if not all(isinstance(label, Integral) and 0 <= int(label) < MOST for label in labels):
            raise MisconfigurationException(
                f"torchvision's {name} has labels outside 0 to {MOST - 1}"
            )
        names = [f"{part} {i}" for i in range(len(labels))]
        parts.append(Part(torch.stack(images), torch.tensor(labels, dtype=torch.uint8), names))
        count = 1 + max(int(part.labels.max()) for part in parts)
        classes = [*map(str, getattr(labelled, "classes", range(count)))]
    return classes, parts, 0


def near_duplicates(train: Tensor, test: Tensor) -> list[tuple[int, int]]:
    """Return index pairs (training image, test image) that look alike: each test image and the
    training image most similar to it, if their 16 x 16 thumbnails correlate by `NEAR` or more."""

    def features(images: Tensor) -> Tensor:
        small = F.avg_pool2d(images.float(), 2).flatten(1)
        return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)

    known, pairs = torch.cat([features(part) for part in torch.split(train, 5000)]), []
    for start, part in enumerate(bar(torch.split(test, 250), desc="near-duplicates")):
        similarity, places = (features(part) @ known.T).max(dim=1)
        alike = (similarity >= NEAR).nonzero()[:, 0].tolist()
        pairs += [(int(places[i]), 250 * start + i) for i in alike]
    return pairs


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images [N, 3, H, W] / 255."""
    values, results = torch.arange(256).double() / 255, []
    for channel in range(3):  # from a histogram: a float copy would take memory
        shares = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float(shares @ values)
        results.append((round(mean, 4), round(float(shares @ (values - mean) ** 2) ** 0.5, 4)))
    means, stds = zip(*results, strict=True)
    return [*means], [*stds]


def write(out: Path, classes: list[str], train: Part, test: Part) -> None:
    """Write the folder atomically."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            save_arrays(new, Arrays(train.images, train.labels, test.images, test.labels))
            names = json.dumps(classes, ensure_ascii=False, indent=1)
            (new / NAMES).write_text(names + "\n", encoding="utf-8")
            new.replace(out)
    except OSError as error:
        raise MisconfigurationException(f"--out {out}: {error.strerror}") from error


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user's mistake prints one line and exits with a non-zero code."""
    parser = ShortParser(prog="convert.py", description="Convert images to a folder of arrays.")
    parser.add_argument("source", type=str, help="a folder, or torchvision:NAME")
    parser.add_argument(
        "--out", type=str, required=True, help="the folder to create, for --data.root"
    )
    text = "share of each class to hold out for testing, if there is no test folder"
    parser.add_argument("--test_share", type=OpenUnitInterval, default=0.2, help=text)
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="picks the held-out images")
    text = "folder of torchvision's data sets, downloaded if missing"
    parser.add_argument("--root", type=str, default="data/torchvision", help=text)
    options = parser.parse_args(args)
    out, source = Path(options.out), Path(options.source)
    if out.exists():
        raise MisconfigurationException(f"--out {out} exists: name a new folder")
    if options.source.startswith("torchvision:"):
        name = options.source.removeprefix("torchvision:")
        classes, (train, test), skipped = read_torchvision(name, Path(options.root))
    elif source.is_dir():
        classes, (train, test), skipped = read_folders(source, options.test_share, options.seed)
    else:
        raise MisconfigurationException(f"{source} is neither a folder nor torchvision:NAME")
    pairs = near_duplicates(train.images, test.images)
    write(out, classes, train, test)
    sizes = [len(part.names) for part in (train, test)]
    named = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    print(
        f"written to {out}: {len(classes)} classes ({named}), {sizes[0]:,} training and "
        f"{sizes[1]:,} test images"
    )
    if untested := [name for i, name in enumerate(classes) if not (test.labels == i).any()]:
        print(f"no test image of {', '.join(untested)}")
    if pairs:
        print(
            f"{len(pairs):,} test images look very much like a training image: photos may be "
            "copies, drawings need not be"
        )
        for known, new in pairs[:SHOWN]:
            print(f"  {test.names[new]}  {train.names[known]}")
        if (more := len(pairs) - SHOWN) > 0:
            print(f"  and {more:,} more")
    mean, std = mean_and_std(train.images)
    print(f"colours  --model.normalize '{{mean: {mean}, std: {std}}}'")
    words = ["python", "train.py", "fit", "--config", "configs/base.yaml", "--data.root", str(out)]
    words += ["--name", out.name]
    words += ["--data.val_size", str(max(len(classes), sizes[0] // 5)), "--data.stratify", "true"]
    if sizes[0] < FEW:  # with few steps an epoch, batch norm's statistics lag behind
        words += ["--data.batch_size", "16"]
    print(f"train    {shlex.join(words)}")
    if skipped:
        sys.exit(f"error: {skipped} files could not be read and were skipped")


if __name__ == "__main__":
    main()
