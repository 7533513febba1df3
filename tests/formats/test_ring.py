"""The ring against loops in plain Python."""

import itertools

import pytest
import torch

from think_compile.formats import ring as rings


def positions_by_loops(length, rows):
    """The latest position in each row, or None."""
    held = [None] * rows
    for position in range(length):
        held[position % rows] = position
    return held


def test_ring_positions():
    for length, rows in itertools.product(range(0, 40), range(1, 12)):
        for given in (length, torch.tensor(length)):
            got = rings.ring_positions(given, rows, torch.get_default_device()).tolist()
            expected = positions_by_loops(length, rows)
            assert [None if p < 0 else p for p in got] == expected, (length, rows)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_advanced(rows):
    k = torch.randn(1, 1, 60, 2)
    ring, length = rings.ring_of(k, 3, rows), 3
    for n_new in [1, 1, 4, 1, 9, 8, 7, 1, 16, 1]:
        for start in (length, torch.tensor(length)):
            after = rings.advanced(ring, k[:, :, length : length + n_new], start)
        ring, length = after, length + n_new
        for row, position in enumerate(positions_by_loops(length, rows)):
            if position is not None and position >= length - rows:
                assert torch.equal(ring[:, :, row], k[:, :, position])


def test_advanced_makes_a_new_tensor():
    ring = torch.randn(1, 1, 3, 2)
    before = ring.clone()
    after = rings.advanced(ring, torch.randn(1, 1, 1, 2), 7)
    assert torch.equal(ring, before)
    assert after.data_ptr() != ring.data_ptr()
