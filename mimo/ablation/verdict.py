"""Whether a difference between two variants holds, at the number of seeds and clips that were measured.

Two variants were trained on the same clips and measured on the same held-out ones from the same noise, so differences
are taken cell by cell: d[s, c] of seed s and clip c, positive where the claim is right.

    mean        over all seeds and clips
    error^2     v_s + v_c: the variance of the mean when seeds are drawn anew, and when clips are. Either is a
                bootstrap over one of the two, the other as it is, of one draw less than there are (which makes it
                unbiased: Rao and Wu 1988)
    interval    mean +- t error, t the quantile of Student's distribution at `level` with the degrees of freedom of
                such a sum (Satterthwaite): (v_s + v_c)^2 / (v_s^2 / (S - 1) + v_c^2 / (C - 1))

    holds       the interval lies above zero
    does not    it lies below zero: the other variant is better
    undecided   it has zero in it, or there is one seed only, which says nothing of others

Few seeds are why this is no plain percentile interval: of three of them it reaches from the smallest to the largest,
which covers the truth three times in four and not nineteen times in twenty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Outcome = Literal["holds", "does not", "undecided"]
DRAWS = 10_000


@dataclass(frozen=True)
class Verdict:
    """A claim's outcome: mean and interval of the differences, in the metric's unit, positive for the claim.

    level: of the interval. seeds, clips: how many there were. seeds_for: of how many seeds the mean is positive.
    """

    outcome: Outcome
    mean: float
    low: float
    high: float
    level: float
    seeds: int
    clips: int
    seeds_for: int

    def __str__(self) -> str:
        n = f"n = {self.seeds} seeds x {self.clips} clips, {self.seeds_for} of {self.seeds} seeds for it"
        interval = (
            "no interval" if math.isinf(self.low) else f"{100 * self.level:g}% [{self.low:+.4g}, {self.high:+.4g}]"
        )
        return f"{self.outcome}: {self.mean:+.4g}, {interval}, {n}"


def verdict(differences: np.ndarray, *, level: float = 0.95, seed: int = 0) -> Verdict:
    """The outcome of paired differences.

    Args:
        differences: [seeds, clips], finite, positive where the claim is right; [seeds, 1] of a metric that is one
            number for all clips.
        level: of the interval, in (0, 1).
        seed: of the bootstrap; the same seed gives the same interval.

    Raises ValueError for no values, values that are not finite, or a level that is no probability.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 2 or d.size == 0 or not np.isfinite(d).all():
        raise ValueError(f"differences of shape {list(d.shape)}: expected finite numbers [seeds, clips], at least one")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1")
    seeds, clips = d.shape
    mean, positive = float(d.mean()), int((d.mean(1) > 0).sum())
    if seeds == 1:
        return Verdict("undecided", mean, -math.inf, math.inf, level, seeds, clips, positive)
    rng = np.random.default_rng(seed)
    of_seeds, of_clips = _variance(d.mean(1), rng), _variance(d.mean(0), rng)
    error = math.sqrt(of_seeds + of_clips)
    half = 0.0
    if error > 0:
        freedom = (of_seeds + of_clips) ** 2 / (of_seeds**2 / (seeds - 1) + of_clips**2 / max(1, clips - 1))
        half = student_quantile(0.5 + level / 2, min(freedom, 1e4)) * error  # beyond, it is normal to 1e-4
    low, high = mean - half, mean + half
    outcome: Outcome = "holds" if low > 0 else "does not" if high < 0 else "undecided"
    return Verdict(outcome, mean, low, high, level, seeds, clips, positive)


def _variance(values: np.ndarray, rng: np.random.Generator) -> float:
    """Of the mean of values that are drawn anew, by DRAWS draws of one less than there are; of one value 0."""
    if len(values) == 1:
        return 0.0
    chosen = rng.integers(len(values), size=(DRAWS, len(values) - 1))
    return float(np.square(values[chosen].mean(1) - values.mean()).mean())


def student_quantile(probability: float, freedom: float) -> float:
    """x with P(t <= x) = probability > 1/2, by bisection of the distribution function, whose density is integrated
    (Gauss-Legendre, 64 points, over the angle atan(t / sqrt(freedom)), where it is smooth and its range finite)."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    # t = sqrt(freedom) tan(a): the density becomes proportional to cos(a)^(freedom - 1) on (-pi/2, pi/2)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def above_half(angle: float) -> float:
        middle = (nodes + 1) * angle / 2
        return constant * float((weights * np.cos(middle) ** (freedom - 1)).sum()) * angle / 2

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        angle = (low + high) / 2
        low, high = (angle, high) if above_half(angle) < probability - 0.5 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)
