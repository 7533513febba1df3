"""How sure a measured accuracy is, and a difference to the dense model on the same samples.

Samples are compared in pairs: what one sample costs under two methods varies far less than samples among each
other. Intervals are percentiles of the bootstrap (Efron and Tibshirani, 1993, chapter 13) over samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

BLOCK = 4_000_000  # numbers that are resampled at a time, which bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` samples, and the interval that its bootstrap gives."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of what ``n`` samples differ by: ours less dense."""

    @property
    def visible(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def mean_interval(
    values: Sequence[float], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Estimate:
    """The mean of one series.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    series = _columns(values)
    return Estimate(*_interval(series, np.ones_like(series), seed, resamples, confidence), len(series))


def paired_difference(
    ours: Sequence[float], dense: Sequence[float], *, seed: int = 0, resamples: int = 10_000, confidence: float = 0.95
) -> Difference:
    """The mean of ``ours[i] - dense[i]``: two scores of each sample.

    Raises:
        ValueError: the series differ in length, are empty or hold a number that is not finite.
    """
    differences = np.subtract(*_columns(ours, dense).T)
    ones = np.ones_like(differences)[:, None]
    return Difference(*_interval(differences[:, None], ones, seed, resamples, confidence), len(differences))


def ratio_difference(
    ours_nll: Sequence[float],
    dense_nll: Sequence[float],
    sizes: Sequence[int],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """The difference in bits per byte: sum(ours_nll - dense_nll) / (sum(sizes) ln 2), samples resampled whole.

    Args:
        ours_nll: negative log-likelihoods in nats.
        dense_nll: those of the dense model, of the same samples.
        sizes: bytes that were scored, of each sample.
        seed: of the resampling.
        resamples: how many times.
        confidence: share of the resamples that the interval holds.

    Raises:
        ValueError: the series differ in length, are empty or hold a number that is not finite, or a size below 1.
    """
    ours, dense, scored = _columns(ours_nll, dense_nll, sizes).T
    if scored.min() < 1:
        raise ValueError(f"A sample has {scored.min():g} bytes; bits per byte need at least one.")
    bits = (ours - dense)[:, None] / math.log(2)
    return Difference(*_interval(bits, scored[:, None], seed, resamples, confidence), len(bits))


def resolution(n: int, discordant: float, *, confidence: float = 0.95) -> float:
    """The smallest change of an accuracy that a paired comparison of ``n`` samples makes visible.

    A change of d, when the outcome of a share q of the samples differs in either direction, has the standard error
    sqrt((q - d^2) / n) (McNemar's test). It is visible from d = z times that, so d = z sqrt(q / (n + z^2)). No change
    is larger than q: where q is too small, the smallest is that of outcomes that all change in one direction,
    q = d, which is z^2 / (n + z^2).

    Args:
        n: samples.
        discordant: q, in [0, 1].
        confidence: two-sided; z is the normal quantile that belongs to it.

    Raises:
        ValueError: ``n`` is below 1 or ``discordant`` no share.
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
    numerators: np.ndarray, weights: np.ndarray, seed: int, resamples: int, confidence: float
) -> tuple[float, float, float]:
    """sum(numerators) / sum(weights), both [n, 1], and the percentiles of its resamples: mean, low, high."""
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"{resamples} resamples at confidence {confidence}: expected at least 1 and one in (0, 1).")
    # Around the first sample's ratio, so that rounding does not spread ratios that are all equal.
    centre = numerators[0, 0] / weights[0, 0]
    pairs = np.concatenate([numerators - centre * weights, weights], axis=1)
    sums = _resampled_sums(pairs, seed, resamples)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.5 - confidence / 2, 0.5 + confidence / 2])
    mean = pairs[:, 0].sum() / pairs[:, 1].sum()
    return float(centre + mean), float(centre + low), float(centre + high)


def _resampled_sums(pairs: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums [resamples, 2] over rows of ``pairs`` [n, 2] that are drawn with replacement."""
    generator, n = np.random.default_rng(seed), len(pairs)
    block = max(1, BLOCK // n)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([pairs[generator.integers(n, size=(size, n))].sum(1) for size in sizes])
