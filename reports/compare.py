"""Compare two models on the same test images, from the predictions that `test` saved.

    python -m reports.compare runs/base/version_0 runs/improved/version_0

Each argument is the folder of a tested run, or a file such as its test.npz.
"""

from pathlib import Path

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import binomtest, bootstrap

from reports.saved import read_saved
from terminal import ShortParser, short_errors

RESAMPLES = 9999


def comparison(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Compare two models, given whether each is right on each image, bool [N]. Return their
    accuracies, the second's minus the first's with its 95 % interval (paired bootstrap over
    images), how many images only one gets right, and p of McNemar's exact test."""
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    gains = second.astype(float) - first
    # If all gains are equal, there is nothing to resample.
    low = high = float(gains.mean())
    if gains.min() < gains.max():
        found = bootstrap(
            (gains,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        low, high = map(float, found.confidence_interval)
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {
        "first": float(first.mean()),
        "second": float(second.mean()),
        "difference": float(gains.mean()),
        "low": low,
        "high": high,
        "only_first": lost,
        "only_second": gained,
        "p": p,
    }


@short_errors()
def main(args: list[str] | None = None) -> None:
    """Run the command line. A user error prints one line and exits with a non-zero code."""
    parser = ShortParser(prog="reports.compare", description="Compare two models.")
    parser.add_argument("first", type=str, help="a run that was tested, or its test.npz")
    parser.add_argument("second", type=str, help="another one")
    given = parser.parse_args(args)
    one, other = (read_saved(Path(path)) for path in (given.first, given.second))
    if one.images != other.images or not np.array_equal(one.indices, other.indices):
        raise MisconfigurationException(
            f"not of the same images: {given.first} has {one.images}, {given.second} {other.images}"
        )
    of = comparison(one.is_right, other.is_right)
    p = "< 0.0001" if of["p"] < 0.0001 else f"= {of['p']:.4f}"
    print(
        f"first       {of['first']:.2%} of {len(one.labels):,} images of {one.images}; "
        f"only this one is right: {of['only_first']:,} ({one.model})\n"
        f"second      {of['second']:.2%}; only this one is right: {of['only_second']:,} "
        f"({other.model})\n"
        f"difference  {100 * of['difference']:+.2f} points, 95 % interval {100 * of['low']:+.2f} "
        f"to {100 * of['high']:+.2f} (paired bootstrap), p {p} (McNemar, exact)\n"
        "two trained models, not two recipes: with other seeds the difference is another one, and "
        "study.py compares recipes"
    )


if __name__ == "__main__":
    main()
