"""Intervals: exact if they can be, of the right scale if they are sampled."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from think_compile.evals.statistics import mean_interval, paired_difference, ratio_difference, resolution

FEW = {"resamples": 200}
scores = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=1, max_size=30)


@given(scores, st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("error")
def test_equal_differences_have_no_spread(dense, shift):
    exact = paired_difference(dense, dense, **FEW)
    assert (exact.mean, exact.low, exact.high, exact.n, exact.visible) == (0, 0, 0, len(dense), False)
    constant = mean_interval([shift] * len(dense), **FEW)
    assert constant.low == constant.mean == constant.high == shift


@given(scores, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_interval_lies_within_the_samples(values, draw):
    ours = [value + draw.uniform(-1, 1) for value in values]
    result = paired_difference(ours, values, **FEW)
    differences = np.subtract(ours, values)
    assert differences.min() - 1e-9 <= result.low <= result.high <= differences.max() + 1e-9
    assert result.mean == pytest.approx(differences.mean(), abs=1e-9)


@given(scores)
@settings(max_examples=50, deadline=None)
def test_exchanging_the_methods_turns_the_interval_round(values):
    ours = [math.sin(value) for value in values]
    there, back = paired_difference(ours, values, **FEW), paired_difference(values, ours, **FEW)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-9)


@given(scores, st.integers(1, 1000))
@settings(max_examples=50, deadline=None)
def test_ratio_of_equal_sizes_is_a_mean(values, size):
    ours = [value + math.cos(value) for value in values]
    ratio = ratio_difference(ours, values, [size] * len(values), **FEW)
    mean = paired_difference(ours, values, **FEW)
    scaled = [number / size / math.log(2) for number in (mean.mean, mean.low, mean.high)]
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx(scaled, rel=1e-6, abs=1e-9)


def test_ratio_weighs_samples_by_their_bytes():
    result = ratio_difference([2 * math.log(2), 0.0], [0.0, 0.0], [1, 3], **FEW)
    assert result.mean == pytest.approx(0.5)  # 2 bits in 4 bytes; a mean of ratios would be 1


def test_interval_holds_the_truth_as_often_as_it_says():
    draw = np.random.default_rng(0)
    series = draw.exponential(size=(400, 60))
    intervals = [mean_interval(values, resamples=500, confidence=0.9) for values in series]
    held = np.mean([one.low <= 1 <= one.high for one in intervals])
    assert 0.84 < held < 0.94  # percentiles are a little narrow for skewed series


def test_a_seed_repeats_and_more_confidence_is_wider():
    values = [float(i % 7) for i in range(50)]
    first = mean_interval(values, seed=3)
    assert first == mean_interval(values, seed=3) != mean_interval(values, seed=4)
    wider = mean_interval(values, seed=3, confidence=0.99)
    assert wider.low < first.low and first.high < wider.high


@pytest.mark.parametrize("n", [100, 500, 1000])
def test_resolution_is_where_the_bootstrap_begins_to_see_losses(n):
    needed = math.ceil(resolution(n, 0) * n)
    for losses in (needed - 1, needed):
        ours = [0.0] * losses + [1.0] * (n - losses)
        assert paired_difference(ours, [1.0] * n).visible == (losses == needed)


def test_resolution_of_changes_in_both_directions():
    n, flips, gained = 2000, 200, 85  # a loss of 30 in 2000, where z sqrt(q/(n + z^2)) is 27.7
    change = [-1.0] * (flips - gained) + [1.0] * gained + [0.0] * (n - flips)
    assert resolution(n, flips / n) == pytest.approx(0.0138457, abs=1e-6)
    assert paired_difference(change, [0.0] * n).visible
    assert not paired_difference([-1.0] * 110 + [1.0] * 90 + [0.0] * 1800, [0.0] * n).visible
    assert resolution(500, 0.05) < 0.02  # the sizes of the tasks depend on this


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([1.0], [1.0, 2.0]), r"\[1, 2\]"),
        (lambda: mean_interval([]), "at least one"),
        (lambda: mean_interval([math.nan, 1.0]), "1 numbers are not finite"),
        (lambda: ratio_difference([1.0], [1.0], [0]), "0 bytes"),
        (lambda: mean_interval([1.0], confidence=1.0), "confidence 1.0"),
        (lambda: mean_interval([1.0], resamples=0), "0 resamples"),
        (lambda: resolution(0, 0.5), "0 samples"),
        (lambda: resolution(10, 1.5), "1.5"),
    ],
)
def test_bad_series_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
