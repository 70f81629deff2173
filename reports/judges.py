"""Human judgements of CIFAR-10's test images, which `test` uses to assess mistakes.

    python -m reports.judges --root data      # fetches the files into data/judges (900 kB)

They say which images are also in the training set, which labels are wrong, and which class people
see. The files are not part of this project; `test` works without them. Offline, copy them there.
"""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from cifar10.batches import Predictions
from terminal import ShortParser, short_errors

JUDGES = "judges"
GITHUB = "https://raw.githubusercontent.com"
FEW = 0.1  # of the people who saw an image: fewer may be slips


class Source(NamedTuple):
    """The origin, checksum and licence of a file."""

    url: str
    sha256: str
    terms: str


DUPLICATES, JUDGED, SEEN = "duplicates_cifar10.csv", "cifar10_mturk.json", "cifar10h-counts.npy"
SOURCES = {
    DUPLICATES: Source(
        f"{GITHUB}/cvjena/cifair/4c2764277f5fda8fec6784a78c1818eab13236c5/meta/{DUPLICATES}",
        "4cb7e99a7dfff346082c9d8fa4c2989a196e4a37d1e58f75936046696f1ba6a4",
        "ciFAIR, Barz and Denzler (arXiv 1902.00423); no licence is given",
    ),
    JUDGED: Source(
        f"{GITHUB}/cleanlab/label-errors/6d5d6b31a13216290afc40e5c6319399c4d15c06/mturk/{JUDGED}",
        "81b2c16c9eee060d6cc2390f6bbce1e0e7be0a050574be5177c9428f3596b5b5",
        "label-errors, Northcutt et al. (arXiv 2103.14749); Apache License 2.0",
    ),
    SEEN: Source(
        f"{GITHUB}/jcpeterson/cifar-10h/48da312b193b82e6939ec20f23d1f09cbdd849c8/data/{SEEN}",
        "9b36b4550349af56c79083356312eb4af856cc5fd3caf1f669d40b9d0bbb69ff",
        "CIFAR-10H, Peterson et al. (arXiv 1908.07086); CC BY-NC-SA 4.0, not for commercial use",
    ),
}


class Judgements(NamedTuple):
    """For each test image: whether the training set has a duplicate, near-duplicate or very similar
    image, bool [N]; whether its label is wrong or in doubt, bool [N]; how many people chose each
    class, int64 [N, 10]."""

    is_duplicate: np.ndarray
    is_wrong: np.ndarray
    seen: np.ndarray


def read_judgements(folder: Path) -> Judgements | None:
    """Read the judgements from the files in a folder; return None if one is missing.

    Raises:
        MisconfigurationException: A file differs from the published one.
    """
    files = {name: folder / name for name in SOURCES}
    if not all(file.is_file() for file in files.values()):
        return None
    for name, file in files.items():
        if pooch.file_hash(str(file)) != SOURCES[name].sha256:
            raise MisconfigurationException(f"{file} is damaged, or another version: remove it")
    seen = np.load(files[SEEN])
    is_duplicate, is_wrong = np.zeros((2, len(seen)), dtype=bool)
    with files[DUPLICATES].open(encoding="utf-8") as rows:
        is_duplicate[[int(row["TestID"]) for row in csv.DictReader(rows)]] = True
    for image in json.loads(files[JUDGED].read_text(encoding="utf-8")):
        is_wrong[image["id"]] = image["mturk"]["given"] < 3  # of five people, for this label alone
    return Judgements(is_duplicate, is_wrong, seen)


def fair(test: Predictions, judgements: Judgements) -> dict[str, Any]:
    """Return the accuracy on CIFAR-10's test set without images that are also in the training set,
    without wrong or doubtful labels, and without both; how many mistakes at least a tenth, or most,
    of the people make too; and people's own accuracy."""
    predicted, labels = test.logits.argmax(dim=1).numpy(), test.labels.numpy()
    is_right = predicted == labels
    parts = {
        "without_duplicates": ~judgements.is_duplicate,
        "without_doubtful_labels": ~judgements.is_wrong,
        "without_both": ~(judgements.is_duplicate | judgements.is_wrong),
    }
    shares = judgements.seen / judgements.seen.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    mistaken = shares[rows, predicted][~is_right]
    return {
        **{
            name: {"accuracy": float(is_right[mask].mean()), "images": int(mask.sum())}
            for name, mask in parts.items()
        },
        "mistakes": int((~is_right).sum()),
        "mistakes_of_some_people": int((mistaken >= FEW).sum()),
        "mistakes_of_most_people": int((mistaken > 0.5).sum()),
        "people_accuracy": float((shares[rows, labels]).mean()),
    }


def summary_of(of: dict[str, Any]) -> str:
    """Return the result of `fair` on two lines."""
    parts = ("without_duplicates", "without_doubtful_labels", "without_both")
    accuracies = (f"{of[part]['accuracy']:.2%} {part.replace('_', ' ')}" for part in parts)
    return (
        f"test set     {', '.join(accuracies)} ({of['without_both']['images']:,} images are left)\n"
        f"people       of {of['mistakes']:,} mistakes {of['mistakes_of_some_people']:,} were made "
        f"by at least 10 % of the people who saw the image, {of['mistakes_of_most_people']:,} by "
        f"most of them; people are right in {of['people_accuracy']:.1%}"
    )


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user error prints one line and exits with a non-zero code."""
    parser = ShortParser(prog="reports.judges", description="Download human judgements.")
    parser.add_argument("--root", type=str, default="data", help="folder of the images")
    folder = Path(parser.parse_args(args).root, JUDGES)
    for name, source in SOURCES.items():
        try:
            pooch.retrieve(source.url, source.sha256, name, folder)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise MisconfigurationException(
                f"could not download {source.url} ({type(error).__name__}): put it into {folder}"
            ) from error
        print(f"{folder / name}: {source.terms}")


if __name__ == "__main__":
    main()
