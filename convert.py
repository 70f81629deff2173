"""Make a folder of arrays for `--data.root` of pictures, or of a data set of torchvision.

    python convert.py photos --out data/pets                   # photos/cat/1.jpg, photos/dog/2.png
    python convert.py torchvision:CIFAR100 --out data/cifar100
    python train.py fit --config configs/base.yaml --data.root data/pets --data.val_size 500

A folder has a sub-folder for each class; or `train` and `test`, which have these. Without `test` a
part of each class is held out for it. Pictures are read as `predict` reads them.
"""

import inspect
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from cifar10.arrays import MOST, NAMES, Arrays, save_arrays
from cifar10.batches import split
from cifar10.pictures import Part, bar, read_by_class, to_pixels
from terminal import ShortParser, quieten, short_errors

# The correlation from which on two pictures are said to look alike: of the 286 test images of
# CIFAR-10 that ciFAIR lists as such it finds 100, and 48 others.
NEAR = 0.95
SHOWN = 10  # of them


def read_folders(source: Path, test_share: float, seed: int) -> tuple[list[str], list[Part], int]:
    """Return the classes of a folder of pictures, its training and its test part, and how many
    files were skipped."""
    whole = {p.name for p in source.iterdir() if p.is_dir() and p.name[0] != "."}
    is_split = whole == {"train", "test"}
    parent = source / "train" if is_split else source
    classes = sorted(p.name for p in parent.iterdir() if p.is_dir() and p.name[0] != ".")
    if not 2 <= len(classes) <= MOST:
        raise MisconfigurationException(
            f"{parent} has {len(classes)} folders: expected one for each of 2 to {MOST} classes"
        )
    if is_split:
        others = {p.name for p in (source / "test").iterdir() if p.is_dir()} - {*classes}
        if others:
            raise MisconfigurationException(f"{source}/test has {', '.join(others)}, train has not")
    train, skipped = read_by_class(parent, classes)
    counts = torch.bincount(train.labels, minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < (least := 1 if is_split else 2):
            raise MisconfigurationException(
                f"{parent / name}: {count} readable pictures, expected at least {least}"
            )
    if is_split:
        test, more = read_by_class(source / "test", classes)
        return classes, [train, test], skipped + more
    labels, size = train.labels.long(), max(1, round(test_share * len(train.labels)))
    rest, test_places = split(labels, size, seed, stratify=True)
    parts = [
        Part(train.images[of], train.labels[of], [train.names[i] for i in of.tolist()])
        for of in (rest, test_places)
    ]
    return classes, parts, skipped


def read_torchvision(name: str, root: Path) -> tuple[list[str], list[Part], int]:
    """Return the classes, the training and the test part of a labelled data set of torchvision,
    which lies in `root` or is downloaded there."""
    make: Callable[..., Iterator[tuple[object, int]]] | None = getattr(
        torchvision.datasets, name, None
    )
    takes = inspect.signature(make).parameters if make else {}
    if make is None or not {"train", "split"} & {*takes}:
        raise MisconfigurationException(
            f"torchvision has no data set {name} with training and test images: try MNIST, "
            "FashionMNIST, SVHN, STL10 or CIFAR100"
        )
    parts, classes, labelled = [], [], None
    for part in ("train", "test"):
        given: dict[str, Any] = {"train": part == "train"} if "train" in takes else {"split": part}
        given |= {"download": True} if "download" in takes else {}
        try:
            labelled = make(str(root), **given)
        except (OSError, RuntimeError) as error:
            raise MisconfigurationException(f"torchvision's {name}: {error}") from error
        pairs = [(to_pixels(of), label) for of, label in bar(labelled, desc=f"{name} {part}")]
        images, labels = zip(*pairs, strict=True)
        names = [f"{part} {i}" for i in range(len(labels))]
        parts.append(Part(torch.stack(images), torch.tensor(labels, dtype=torch.uint8), names))
        count = 1 + max(int(part.labels.max()) for part in parts)
        classes = [*map(str, getattr(labelled, "classes", range(count)))]
    return classes, parts, 0


def near_duplicates(train: Tensor, test: Tensor) -> list[tuple[int, int]]:
    """Return pairs (training image, test image) that look very much alike, for each test image the
    most similar: 16 x 16 thumbnails, less their mean, have a correlation of `NEAR` or more."""

    def features(images: Tensor) -> Tensor:
        small = F.avg_pool2d(images.float(), 2).flatten(1)
        return F.normalize(small - small.mean(dim=1, keepdim=True), dim=1)

    known, pairs = torch.cat([features(part) for part in torch.split(train, 5000)]), []
    for start, part in enumerate(bar(torch.split(test, 250), desc="near-duplicates")):
        most, places = (features(part) @ known.T).max(dim=1)
        found = (most >= NEAR).nonzero()[:, 0].tolist()
        pairs += [(int(places[i]), 250 * start + i) for i in found]
    return pairs


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of images uint8 [N, 3, H, W], of 1."""
    values, found = torch.arange(256).double() / 255, []
    for channel in range(3):  # by how often each value is there, as floats would take memory
        shares = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = float(shares @ values)
        found.append((round(mean, 4), round(float(shares @ (values - mean) ** 2) ** 0.5, 4)))
    means, stds = zip(*found, strict=True)
    return [*means], [*stds]


def write(out: Path, classes: list[str], train: Part, test: Part) -> None:
    """Write the folder, which is never seen half-written."""
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


def convert(args: list[str]) -> None:
    """Convert as the command line says."""
    parser = ShortParser(prog="convert.py", description="Make arrays of pictures.")
    parser.add_argument("source", type=str, help="a folder, or torchvision:NAME")
    parser.add_argument("--out", type=str, required=True, help="a new folder, for --data.root")
    text = "the share of each class for testing, without a folder test"
    parser.add_argument("--test_share", type=OpenUnitInterval, default=0.2, help=text)
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="which images these are")
    text = "where torchvision's data sets lie, or are downloaded to"
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
        raise MisconfigurationException(f"no folder {source}, and not torchvision:NAME")
    pairs = near_duplicates(train.images, test.images)
    write(out, classes, train, test)
    sizes = [len(part.names) for part in (train, test)]
    print(f"{len(classes)} classes, {sizes[0]:,} training and {sizes[1]:,} test images")
    if pairs:
        print(
            f"{len(pairs):,} test images look very much like a training image: of photos these may "
            "be copies, of drawings\nthey need not"
        )
        for known, new in pairs[:SHOWN]:
            print(f"  {test.names[new]}  {train.names[known]}")
        if (more := len(pairs) - SHOWN) > 0:
            print(f"  and {more:,} more")
    mean, std = mean_and_std(train.images)
    print(f"colours  --model.normalize '{{mean: {mean}, std: {std}}}'")
    words = ["python", "train.py", "fit", "--config", "configs/base.yaml", "--data.root", str(out)]
    print(f"train    {shlex.join([*words, '--data.val_size', str(sizes[0] // 5)])}")
    if skipped:
        sys.exit(f"error: {skipped} files skipped")


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and an exit code that is not 0."""
    quieten()
    with short_errors():
        convert(sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    main()
