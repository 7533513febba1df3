"""Confidence intervals of a measured accuracy, and of a difference to the dense model on the same samples.

Samples are compared in pairs: one sample's scores under two methods differ far less than the scores of two samples.
Intervals are percentiles of the bootstrap (Efron and Tibshirani, 1993, chapter 13) over samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

BLOCK = 4_000_000  # numbers resampled at a time: a bound of the memory


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` samples, and its bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean difference of ``n`` pairs of samples: ours less dense."""

    @property
    def visible(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], **bootstrap: Any) -> Estimate:
    """The mean of one series; ``bootstrap`` as of :func:`_interval`.

    Raises:
        ValueError: no values, or a value that is not finite.
    """
    series = _columns(values)
    return Estimate(*_interval(series, np.ones_like(series), **bootstrap))


def paired_difference(ours: Sequence[float], dense: Sequence[float], **bootstrap: Any) -> Difference:
    """The mean of ``ours[i] - dense[i]``: two scores of each sample; ``bootstrap`` as of :func:`_interval`.

    Raises:
        ValueError: the series differ in length, are empty or contain infinities or NaN.
    """
    differences = np.subtract(*_columns(ours, dense).T)[:, None]
    return Difference(*_interval(differences, np.ones_like(differences), **bootstrap))


def ratio_difference(
    ours_nll: Sequence[float], dense_nll: Sequence[float], sizes: Sequence[int], **bootstrap: Any
) -> Difference:
    """The difference in bits per byte: sum(ours_nll - dense_nll) / (sum(sizes) ln 2), samples resampled whole.

    Args:
        ours_nll: negative log-likelihoods in nats.
        dense_nll: those of the dense model, of the same samples.
        sizes: scored bytes of each sample.
        bootstrap: as of :func:`_interval`.

    Raises:
        ValueError: the series differ in length, are empty or contain infinities or NaN, or a size is below 1.
    """
    ours, dense, scored = _columns(ours_nll, dense_nll, sizes).T
    if scored.min() < 1:
        raise ValueError(f"A sample has {scored.min():g} bytes; bits per byte need at least one.")
    bits = (ours - dense)[:, None] / math.log(2)
    return Difference(*_interval(bits, scored[:, None], **bootstrap))


def resolution(n: int, discordant: float, *, confidence: float = 0.95) -> float:
    """The smallest visible change of an accuracy in a paired comparison of ``n`` samples.

    If the outcomes of a share q of the samples differ in either direction, a change of d has the standard error
    sqrt((q - d^2) / n) (McNemar's test). The change is visible from z standard errors on: d = z sqrt(q / (n + z^2)). No
    change exceeds q. For too small a q, the smallest visible change has all differences in one direction: q = d, which
    is z^2 / (n + z^2).

    Args:
        n: samples.
        discordant: q, in [0, 1].
        confidence: two-sided; z is its normal quantile.

    Raises:
        ValueError: ``n`` is below 1 or ``discordant`` is outside [0, 1].
    """
    if n < 1 or not 0 <= discordant <= 1:
        raise ValueError(
            f"{n} samples, of which a share of {discordant} differs: expected n >= 1 and a share in [0, 1]."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    return max(z * math.sqrt(discordant / (n + z * z)), z * z / (n + z * z))


def _columns(*series: Sequence[float]) -> np.ndarray:
    """The series as columns [n, k] in fp64, checked."""
    lengths = {len(one) for one in series}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"Samples pair up one to one, at least one: the series have {sorted(lengths)}.")
    columns = np.stack([np.asarray(one, dtype=np.float64) for one in series], axis=1)
    if not np.isfinite(columns).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(columns))} numbers are not finite.")
    return columns


def _interval(
    numerators: np.ndarray, weights: np.ndarray, *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float, float, int]:
    """sum(numerators) / sum(weights), both [n, 1], and the percentiles of its resamples: mean, low, high, n.

    ``seed`` is of the resampling, ``confidence`` the share of the ``resamples`` within the interval.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"{resamples} resamples at confidence {confidence}: expected at least 1 and one in (0, 1).")
    # Around the first sample's ratio: rounding then leaves equal ratios equal.
    centre = numerators[0, 0] / weights[0, 0]
    pairs = np.concatenate([numerators - centre * weights, weights], axis=1)
    sums = _resampled_sums(pairs, seed, resamples)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.5 - confidence / 2, 0.5 + confidence / 2])
    mean = pairs[:, 0].sum() / pairs[:, 1].sum()
    return float(centre + mean), float(centre + low), float(centre + high), len(pairs)


def _resampled_sums(pairs: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums [resamples, 2] over rows of ``pairs`` [n, 2], drawn with replacement."""
    generator, n = np.random.default_rng(seed), len(pairs)
    block = max(1, BLOCK // n)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([pairs[generator.integers(n, size=(size, n))].sum(1) for size in sizes])
