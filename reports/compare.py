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
        resampled = bootstrap(
            (gains,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        low, high = map(float, resampled.confidence_interval)
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
    parser.add_argument("first", type=str, help="folder of a tested run, or its test.npz")
    parser.add_argument("second", type=str, help="another tested run")
    given = parser.parse_args(args)
    first, second = (read_saved(Path(path)) for path in (given.first, given.second))
    if first.images != second.images or not np.array_equal(first.indices, second.indices):
        raise MisconfigurationException(
            f"different test images: {given.first} has {first.images}, "
            f"{given.second} has {second.images}"
        )
    result = comparison(first.is_right, second.is_right)
    p = "< 0.0001" if result["p"] < 0.0001 else f"= {result['p']:.4f}"
    print(
        f"first       {result['first']:.2%} of {len(first.labels):,} images of {first.images}; "
        f"only this one is right: {result['only_first']:,} ({first.model})\n"
        f"second      {result['second']:.2%}; only this one is right: {result['only_second']:,} "
        f"({second.model})\n"
        f"difference  {100 * result['difference']:+.2f} points, 95 % interval "
        f"{100 * result['low']:+.2f} to {100 * result['high']:+.2f} (paired bootstrap), "
        f"p {p} (McNemar, exact)\n"
        "this compares two trained models, not two recipes: other seeds give another difference; "
        "to compare recipes, use study.py"
    )


if __name__ == "__main__":
    main()
