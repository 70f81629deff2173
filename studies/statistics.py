"""Exact tests for few seeds: sign flips of paired differences, with multiplicity correction."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ALPHA = 0.05  # a difference is significant if its corrected p is below this
POWER = 0.8  # how often a true difference of the reported size is found
EXACT = 16  # most seeds to try all flips of; with more, as many are drawn


def smallest_p(seeds: int) -> float:
    """Return the smallest p that sign flips over this many seeds can reach."""
    return 2.0 ** (1 - seeds)


def corrected_p(differences: Floats) -> Floats:
    """Return the two-sided p of each of k comparisons, corrected for all k.

    If a setting changes nothing, the difference of a seed's two runs is as likely as its negative.
    So each mean is compared with the means under all flips of the seeds' signs. A flip applies to
    all comparisons, and the largest of their means counts: step-down max-T, after Westfall and
    Young, "Resampling-based multiple testing", 1993, section 2.8. Each mean is a sum divided by the
    root of its sum of squares, which no flip changes.

    Args:
        differences: Float64 [seeds, k]; NaN where a comparison lacks a seed.

    """
    seeds = len(differences)
    if seeds <= EXACT:  # a flip and its negative are equivalent: never flip the last seed
        flipped = np.arange(2 ** (seeds - 1))[:, None] >> np.arange(seeds) & 1
    else:
        drawn = np.random.default_rng(0).integers(0, 2, (2 ** (EXACT - 1), seeds - 1))
        flipped = np.pad(drawn, ((1, 0), (1, 0)))
    known = ~np.isnan(differences)
    values = np.where(known, differences, 0.0)
    scale = np.sqrt((values**2).sum(axis=0))
    scores = np.abs((1.0 - 2.0 * flipped) @ values) / np.where(scale > 0, scale, 1.0)
    order = np.argsort(-scores[0], kind="stable")  # row 0 flips nothing
    maxima = np.maximum.accumulate(scores[:, order[::-1]], axis=1)[:, ::-1]  # of it and all below
    p = np.maximum.accumulate((maxima >= scores[0, order] - 1e-9).mean(axis=0))
    return p[np.argsort(order)]


def detectable(seeds: int, pairs: list[tuple[int, int]]) -> float:
    """Return the true difference that four studies out of five find significant, in standard
    deviations of a paired difference; NaN if there are too few seeds for any. It is simulated with
    normally distributed values, where one level differs from all others.

    Args:
        seeds: Number of seeds per level.
        pairs: The comparisons, as pairs of level indices; the level that differs is the second of
            the first pair.

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
        is_found = [corrected_p(sample + middle * sign)[0] < ALPHA for sample in noise]
        low, high = (low, middle) if np.mean(is_found) >= POWER else (middle, high)
    return high * math.sqrt(simulated / seeds)
