"""Buffers whose rows move up for new ones: which writes equal a cat of old and new rows, and which do not."""

import pytest
import torch

from think_compile.passes.normalize import normalize

ROWS = 6


def by_index(base, rows, shift=-1, index=(-1,)):
    moved = base.roll(shift, 2)
    moved[:, :, torch.tensor(list(index))] = rows
    return moved


def by_slice(base, rows, shift=-1, start=-1, end=None):
    moved = base.roll(shift, 2)
    moved[:, :, start:end] = rows
    return moved


def canonical(write, batch, n_new=1, **how):
    """(operations of the canonical graph, whether it computes the same as ``write``)."""
    base, rows = torch.randn(batch, 2, ROWS, 4), torch.randn(batch, 2, n_new, 4)
    graphs = []

    def keep(graph, inputs):
        graphs.append(normalize(graph, inputs).graph_module)
        return graph

    expected = torch.compile(lambda b, r: write(b, r, **how), backend=keep, dynamic=False)(base, rows)
    names = {node.target for node in graphs[0].graph.nodes}
    return names, torch.equal(graphs[0](base, rows)[0], expected)


MOVES = [
    (by_index, {}),
    (by_index, {"index": (ROWS - 1,)}),
    (by_index, {"shift": -2, "index": (-2, -1), "n_new": 2}),
    (by_slice, {}),
    (by_slice, {"start": ROWS - 1}),
    (by_slice, {"shift": -3, "start": -3, "n_new": 3}),
]
OTHERS = [
    (by_index, {"shift": 1}),  # down
    (by_index, {"shift": -2}),  # one row of two is written
    (by_index, {"index": (0,)}),
    (by_index, {"shift": -2, "index": (-1, -2), "n_new": 2}),  # in another order
    (by_slice, {"shift": -2}),
    (by_slice, {"start": -2, "end": -1}),
]


@pytest.mark.parametrize(("write", "how"), MOVES)
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_that_move_up(write, how, batch):
    names, is_the_same = canonical(write, batch, **how)
    assert is_the_same
    assert torch.ops.aten.cat.default in names and torch.ops.aten.roll.default not in names


@pytest.mark.parametrize(("write", "how"), OTHERS)
def test_other_writes_stay(write, how):
    names, is_the_same = canonical(write, 3, **how)
    assert is_the_same
    assert torch.ops.aten.cat.default not in names and torch.ops.aten.roll.default in names
