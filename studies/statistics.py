"""Exact tests for few seeds: sign flips of paired differences, corrected for many comparisons."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05  # a difference is significant if its corrected p is below
POWER = 0.8  # how often a difference of the size that is named would be found
EXACT = 16  # seeds; of more, so many flips are drawn as these have


def smallest_p(seeds: int) -> float:
    """Return the smallest p that sign flips over so many seeds can reach."""
    return 2.0 ** (1 - seeds)


def seeds_needed() -> int:
    """Return how many seeds it takes before a difference can be significant."""
    return next(n for n in itertools.count(1) if smallest_p(n) < ALPHA)


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = np.mean(values), stats.sem(values)
    half = error * stats.t.ppf(0.975, len(values) - 1)
    return float(mean - half), float(mean + half)


def corrected_p(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the p of each of k comparisons, corrected for all k.

    If a setting changes nothing, the difference of a seed's two runs is as likely as its negative.
    So the mean is compared with those of all ways to flip the signs of seeds, the same in all
    comparisons, and there with the largest of them: step-down max-T, after Westfall and Young,
    "Resampling-based multiple testing", 1993, section 2.8. Each mean is in units of the root mean
    square of its differences, which no flip changes.

    Args:
        differences: Float64 [seeds, k], two-sided; NaN where a comparison lacks a seed.

    """
    known = ~np.isnan(differences)
    values = np.where(known, differences, 0.0)
    scale = np.sqrt(known.sum(axis=0) * (values**2).sum(axis=0))
    found = np.abs(_flips(len(values)) @ values) / np.where(scale > 0, scale, 1.0)
    order = np.argsort(-found[0], kind="stable")  # the first flip changes no sign
    others = np.maximum.accumulate(found[:, order[::-1]], axis=1)[:, ::-1]  # of it and all below
    p = np.maximum.accumulate((others >= found[0, order] - 1e-9).mean(axis=0))
    return p[np.argsort(order)]


def _flips(seeds: int) -> NDArray[np.float64]:
    """Return all ways to flip signs as rows of ±1, of a way and its negative only one."""
    rest = max(seeds - 1, 0)
    if seeds <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=rest)))
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2 ** (EXACT - 1), rest))
        signs = np.concatenate([np.zeros((1, rest)), drawn]) * -2.0 + 1.0
    return np.concatenate([np.ones((len(signs), 1)), signs], axis=1)


def detectable(seeds: int, pairs: list[tuple[int, int]]) -> float:
    """Return the true difference, in standard deviations of a paired difference, that is found
    significant in four studies of five, where one level differs from all others; NaN if the seeds
    are too few for any. By simulation of normally distributed values.

    Args:
        seeds: How many each level has.
        pairs: The comparisons, as pairs of numbers of levels.

    """
    if smallest_p(seeds) >= ALPHA:
        return math.nan
    one, other = (np.array(side) for side in zip(*pairs, strict=True))
    shifted = other[0]
    noise = np.random.default_rng(0).normal(size=(400, min(seeds, 12), other.max() + 1))
    noise = (noise[..., other] - noise[..., one]) / math.sqrt(2)
    sign = (other == shifted).astype(float) - (one == shifted)

    def power(shift: float) -> float:
        return float(np.mean([corrected_p(d + shift * sign)[0] < ALPHA for d in noise]))

    low, high = 0.0, 8.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high * math.sqrt(min(seeds, 12) / seeds)
