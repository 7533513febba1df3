"""The holders of a tensor."""

from types import SimpleNamespace

import torch
from torch import nn

from think_compile.cache.holders import holders

TENSOR = torch.zeros(2)


class Attributed(dict):
    """A container with attributes besides its items."""


def test_every_place_in_the_order_of_the_arguments():
    both = Attributed(item=TENSOR)
    both.attribute = TENSOR
    shared = [TENSOR]
    arguments = (
        (1, TENSOR, {"a": TENSOR, "b": (SimpleNamespace(c=TENSOR), [None, TENSOR])}),
        {"d": both},
        shared,
        shared,
    )
    names = [name for _, name in holders(TENSOR, None, arguments)]
    assert names == ["a", "c", 1, "item", "attribute", 0]


def test_places_of_a_module_come_first():
    model = nn.Module()
    model.register_buffer("kept", TENSOR)
    model.plain = [TENSOR]
    model.inner = nn.Module()
    model.inner.held = nn.Module()
    model.inner.held.register_buffer("kept", TENSOR)
    found = holders(TENSOR, model, [TENSOR])
    assert [name for _, name in found] == ["kept", "kept", 0]
    assert found[0][0] is model._buffers and found[1][0] is model.inner.held._buffers


def test_a_cycle_and_others_tensors():
    ring = []
    ring += [ring, torch.zeros(2)]
    assert not holders(TENSOR, None, ring)


def test_arguments_linked_deeper_than_python_calls():
    chain = [TENSOR]
    for _ in range(1_500):
        chain = SimpleNamespace(next=chain)
    assert [name for _, name in holders(TENSOR, None, chain)] == [0]
