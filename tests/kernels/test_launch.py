"""Launches of the decode kernel: as in the table for measured shapes, and within the device's limits for all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from think_compile.kernels.launch import (
    FILLED,
    H100,
    SMALLEST_SHARE,
    Device,
    device_of,
    launch_for,
    launch_for_codes,
    query_tile,
    table,
)

PAIR = "channels+whole"


@pytest.mark.parametrize("row", table(PAIR), ids=str)
def test_a_shape_of_the_table_is_launched_as_measured(row):
    launch = launch_for(PAIR, (row["rows"], row["bytes"], 512, row["blocks"] // -(-row["rows"] // 64)), row["tokens"])
    assert launch == (query_tile(row["rows"]), *row["launch"], 0)


@given(
    rows=st.integers(1, 512),
    kept=st.integers(1, 16).map(lambda n: 16 * n),
    d=st.sampled_from([16, 64, 96, 128, 256]),
    itemsize=st.sampled_from([2, 4]),
    heads=st.integers(1, 4096),
    extent=st.integers(1, 2**20),
    device=st.sampled_from([H100, Device(101_376, 128), Device(166_912, 108), Device(65_536, 304), Device(101_376, 1)]),
)
def test_any_shape_gets_a_launch_that_fits(rows, kept, d, itemsize, heads, extent, device):
    narrow, whole = (min(kept, d) + d) * itemsize, 2 * d * itemsize
    launch = launch_for(PAIR, (rows, narrow, whole, heads), extent, device)
    for size in (launch.block_m, launch.block_n, launch.warps):
        assert size & (size - 1) == 0
    assert 16 <= launch.block_m <= query_tile(rows) and launch.block_n >= 16 and launch.stages >= 2
    assert 1 <= launch.splits <= max(1, extent // SMALLEST_SHARE)
    smallest = (launch.block_m, launch.block_n, launch.stages) == (16, 16, 2)
    held = (launch.block_n * (launch.stages - 1) + launch.block_m) * whole
    assert held <= FILLED * device.shared_bytes or smallest


def test_as_many_programs_for_each_multiprocessor():
    shape = PAIR, (4, 384, 512, 64), 32768
    half = launch_for(*shape, H100._replace(processors=H100.processors // 2))
    assert half.splits == launch_for(*shape).splits / 2


def test_what_interprets_passes_for_the_device_of_the_table():
    assert device_of(torch.device("cpu")) == H100


def test_programs_for_codes_end_at_the_same_time():
    """As measured for 8 heads and groups of 4: a program of 128 tokens more than another costs as much as all have."""

    def shares(batch, tokens):
        launch = launch_for_codes(4, 8 * batch, (tokens + 64, 193, 128), 13_824)
        return launch.splits, launch.whole

    assert shares(8, 32768) == (15, 1)  # 17 of 255 records for each, and every processor is full
    assert shares(1, 32768) == (128, 4)  # 2 for each; whole rows take the room that is left, so that all start at once
    assert shares(32, 32768) == (4, 1)  # more than fit at once: the programs for whole rows are short
    assert shares(256, 512) == (1, 1)  # the heads alone fill the processors twice


@given(
    rows=st.integers(1, 64),
    heads=st.integers(1, 4096),
    extent=st.integers(1, 2**20),
    ring=st.integers(1, 400),
    group=st.sampled_from([64, 128]),
    n_bytes=st.integers(2**10, 2**18),
)
def test_any_shape_of_codes_gets_a_launch(rows, heads, extent, ring, group, n_bytes):
    launch = launch_for_codes(rows, heads, (extent, ring, group), n_bytes)
    assert 1 <= launch.splits <= -(-extent // group) and launch.block_n == group
    assert 1 <= launch.whole <= ring
