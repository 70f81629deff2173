"""Exact tests for few seeds: sign flips of paired differences, corrected for many comparisons."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA = 0.05  # a difference is significant if its corrected p is below
POWER = 0.8  # how often a difference of the size that is named would be found
EXACT = 16  # seeds; of more, so many flips are drawn as these have


def smallest_p(seeds: int) -> float:
    """Return the smallest p that sign flips over so many seeds can reach."""
    return 2.0 ** (1 - seeds)


def corrected_p(differences: Floats) -> Floats:
    """Return the p of each of k comparisons, corrected for all k.

    If a setting changes nothing, the difference of a seed's two runs is as likely as its negative.
    So the mean is compared with those of all ways to flip the signs of seeds, the same in all
    comparisons, and there with the largest of them: step-down max-T, after Westfall and Young,
    "Resampling-based multiple testing", 1993, section 2.8. Each mean is a sum in units
    of the root of the sum of its squares, which no flip changes.

    Args:
        differences: Float64 [seeds, k], two-sided; NaN where a comparison lacks a seed.

    """
    seeds = len(differences)
    if seeds <= EXACT:  # of a way and its negative only one: the last seed is never flipped
        flipped = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds) & 1
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2 ** (EXACT - 1), seeds - 1))
        flipped = np.pad(drawn, ((1, 0), (1, 0)))
    known = ~np.isnan(differences)
    values = np.where(known, differences, 0.0)
    scale = np.sqrt((values**2).sum(axis=0))
    found = np.abs((1.0 - 2.0 * flipped) @ values) / np.where(scale > 0, scale, 1.0)
    order = np.argsort(-found[0], kind="stable")  # the first way flips nothing
    others = np.maximum.accumulate(found[:, order[::-1]], axis=1)[:, ::-1]  # of it and all below
    p = np.maximum.accumulate((others >= found[0, order] - 1e-9).mean(axis=0))
    return p[np.argsort(order)]


def detectable(seeds: int, pairs: list[tuple[int, int]]) -> float:
    """Return the true difference that is found significant in four studies of five where one level
    differs from all others, in standard deviations of a paired difference; NaN if the seeds are too
    few for any. By simulation of normally distributed values.

    Args:
        seeds: How many each level has.
        pairs: The comparisons, as pairs of numbers of levels; the level that differs is the second
            of the first pair.

    """
    if smallest_p(seeds) >= ALPHA:
        return math.nan
    one, other = np.array(pairs).T
    simulated = min(seeds, 12)
    noise = np.random.default_rng(0).normal(size=(400, simulated, np.max(pairs) + 1))
    noise = (noise[..., other] - noise[..., one]) / math.sqrt(2)
    sign = (other == other[0]).astype(float) - (one == other[0])
    low, high = 0.0, 8.0
    for _ in range(9):
        middle = (low + high) / 2
        found = [corrected_p(sample + middle * sign)[0] < ALPHA for sample in noise]
        low, high = (low, middle) if np.mean(found) >= POWER else (middle, high)
    return high * math.sqrt(simulated / seeds)
