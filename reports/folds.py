"""Merge the folds of a cross-validation, from the predictions that `validate` saved.

    python -m reports.folds runs/fold_*/version_0 --out out_of_fold.npz

Each argument is the folder of a run that was validated on its own fold (`--data.fold`). So every
image is predicted by a model that was not trained on it.
"""

from pathlib import Path

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException

from reports.evaluation import wilson
from reports.saved import Saved, read_saved
from runs import write_whole
from terminal import ShortParser, short_errors


def joined(parts: list[Saved]) -> Saved:
    """Merge the predictions of all folds, in the order of the images.

    Raises:
        MisconfigurationException: The image sets differ, or two folds share an image.
    """
    if len({part.images for part in parts}) > 1:
        raise MisconfigurationException("the folds come from different image sets")
    logits, labels, indices = (
        np.concatenate(arrays) for arrays in zip(*(p[:3] for p in parts), strict=True)
    )
    order = indices.argsort()
    if len(np.unique(indices)) < len(indices):
        raise MisconfigurationException("two folds share an image: are they from different splits?")
    models = "; ".join(part.model for part in parts)
    return Saved(logits[order], labels[order], indices[order], parts[0].images, models)


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user error prints one line and exits with a non-zero code."""
    parser = ShortParser(prog="reports.folds", description="Merge the folds of a cross-validation.")
    parser.add_argument("runs", nargs="+", type=str, help="folders of validated runs")
    parser.add_argument("--out", type=str, default="out_of_fold.npz", help="output file")
    given = parser.parse_args(args)
    parts = [read_saved(Path(path), "validation.npz") for path in given.runs]
    merged = joined(parts)
    for path, part in zip(given.runs, parts, strict=True):
        print(f"{path}: accuracy {part.is_right.mean():.2%} of {len(part.labels):,} images")
    right, count = int(merged.is_right.sum()), len(merged.labels)
    if missing := int(merged.indices.max()) + 1 - count:
        print(f"at least {missing:,} images are in none of these folds: pass all folds")
    low, high = wilson(right, count)
    print(
        f"together: accuracy {right / count:.2%} of {count:,} images of {merged.images}, 95 % "
        f"interval {100 * low:.2f} to {100 * high:.2f} (Wilson, of these models)"
    )
    write_whole(Path(given.out), merged.content())
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
