"""Layers compiled once: the repeated part of a graph, and equality of the parts with the whole."""

import pytest
import torch
from compare import Rules, Trio, padding, tokens
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from think_compile.runtime import regions
from think_compile.runtime.lower import Dims, Inductor


@pytest.fixture
def parts(monkeypatch):
    """Records every graph that Inductor would compile, and runs it op by op."""
    compiled = []

    def keep(graph_module, inputs, config_patches=None):
        compiled.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep)
    return compiled


# ---------------------------------------------------------------------------------------- the repeated part


@pytest.mark.parametrize("period", [8, 11])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 5), (0, 4), (6, 0)])
def test_the_longest_repetition_is_found(period, before, after):
    layer = list(range(period))
    numbers = [100 + i for i in range(before)] + layer * 4 + [200 + i for i in range(after)]
    assert regions._repetition(torch.tensor(numbers)) == (before, period, 4 * period)


def test_a_part_of_a_layer_may_be_left_over():
    layer = list(range(9))
    assert regions._repetition(torch.tensor([*layer[5:], *layer * 3, *layer[:2]])) == (0, 9, 4 + 27 + 2)


def test_a_repetition_is_found_whatever_the_default_device_is():
    numbers = torch.tensor([*range(9)] * 4)
    with torch.device("meta"):
        assert regions._repetition(numbers) == (0, 9, 36)


@pytest.mark.parametrize("numbers", [[], [1], list(range(40)), [1, 2, 3] * 2])
def test_no_repetition(numbers):
    assert regions._repetition(torch.tensor(numbers, dtype=torch.long)) is None


# ----------------------------------------------------------------------------------------- models, part by part

MODELS = ["llama", "buffer_index_put"]
MORE = [
    "gemma3_deep",
    "gpt2",
    "mixtral",
    "falcon",
    "gpt_neox",
    "tuple_cat",
    "bshd_cat",
]  # their layers repeat like those above: slow


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_in_parts_as_in_one_piece(name, parts):
    trio = Trio(name, Rules(0.5, recent=4, observe=8), lowering="inductor")
    trio.run(tokens(2, 23), [12, *[1] * 8, 3], padding("left", 2, 12))
    assert parts


class Layer(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x, shift):
        y = torch.relu(self.up(x)) * shift
        y = self.down(torch.sigmoid(y) + y.sin())
        return x + y.tanh() * y.cos(), shift.cos()


class Stack(nn.Module):
    """Layers that pass on two tensors; the second of each layer is an output."""

    def __init__(self, inner=(8, 8, 8, 8)):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Layer(6, n) for n in inner)

    def forward(self, x, shift):
        x, left = self.first(x), []
        for layer in self.layers:
            x, shift = layer(x, shift)
            left.append(shift)
        return (x * 2, *left)


def compiled_parts(model, *inputs):
    """(outputs in parts, the parts)"""
    traced, kept = make_fx(model)(*inputs), []
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in inputs]

    def keep(graph_module, given):
        kept.append(graph_module)
        return graph_module.forward

    return regions.compile_by_regions(traced, fakes, mode, keep)(*inputs), kept


def test_equal_layers_are_one_part():
    model, inputs = Stack(), (torch.randn(3, 4), torch.rand(()))
    outputs, kept = compiled_parts(model, *inputs)
    for got, want in zip(outputs, model(*inputs), strict=True):
        assert torch.equal(got, want)
    assert len(kept) == 3
    sizes = sorted(len(regions._body(part.graph)) for part in kept)
    assert sum(sizes) < len(regions._body(symbolic_trace(model).graph))


def test_unequal_layers_are_compiled_as_they_are():
    model, inputs = Stack((8, 9, 10, 11)), (torch.randn(3, 4), torch.rand(()))
    outputs, kept = compiled_parts(model, *inputs)
    assert len(kept) == 1 and torch.equal(outputs[0], model(*inputs)[0])


def test_of_two_kinds_of_layers_in_turn_a_pair_is_a_part():
    model, inputs = Stack((8, 9, 8, 9, 8, 9)), (torch.randn(3, 4), torch.rand(()))
    outputs, kept = compiled_parts(model, *inputs)
    for got, want in zip(outputs, model(*inputs), strict=True):
        assert torch.equal(got, want)
    assert len(kept) == 3


def test_values_are_let_go_of():
    model, inputs = Stack(), (torch.randn(3, 4), torch.rand(()))
    traced = make_fx(model)(*inputs)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    run = regions.compile_by_regions(traced, [mode.from_tensor(x) for x in inputs], mode, lambda gm, _: gm.forward)
    released = [place for step in run.steps for place in step.done]
    left = {place for step in run.steps for place in step.leaves} - run.returned
    assert len(released) == len(set(released)) and left <= set(released)


# ---------------------------------------------------------------------------------- writes to inputs


def written_at_the_end(x, a, b, c):
    """In-place changes after Dynamo and functionalization: they stand at the end of the graph."""
    new_a, view = a + 1, b.view(3, 2)
    y = (x * a).sin()
    new_b = b * 2
    y = y + view.sum()
    z = y.cos() + c
    a.copy_(new_a), b.copy_(new_b), c.copy_(z.sum())
    return y * 3, c


def test_writes_come_right_behind_the_last_readers():
    given = [torch.randn(4), torch.randn(4), torch.randn(2, 3), torch.randn(())]
    traced = symbolic_trace(written_at_the_end)
    for node in traced.graph.find_nodes(op="call_method", target="copy_"):
        node.op, node.target = "call_function", torch.ops.aten.copy_.default
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    kept = []
    run = regions.compile_by_regions(traced, [mode.from_tensor(x) for x in given], mode, lambda gm, _: kept.append(gm))
    assert run is None
    names = [node.name for node in kept[0].graph.nodes]
    order = ("mul", "copy_", "sin", "sum_1", "copy__1", "add_1", "sum_2", "copy__2", "mul_2")
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    kept[0].recompile()
    same = [x.clone() for x in given]
    assert all(map(torch.equal, kept[0](*same), written_at_the_end(*given)))
    assert all(map(torch.equal, same, given))


# -------------------------------------------------------------------------------- numbers shared by several layers


def test_numbers_of_one_kind_are_one_symbol_while_they_are_equal():
    def add(x, n, m):
        return (x[:n] + x[:m],)

    graph = torch.fx.symbolic_trace(add)
    lowered = Inductor(graph, [Dims(), *[Dims(number=True, named=("length",))] * 2], {})
    x = torch.randn(9)
    for n, m in ((4, 4), (5, 5), (7, 7)):
        assert torch.equal(lowered([x, n, m])[0], x[:n] * 2)
    assert len(lowered.variants) == 1
    with pytest.raises(Exception, match="size"):  # compiled again for different numbers, which cannot be added
        lowered([x, 4, 5])


def test_a_failure_of_the_search_compiles_the_whole(monkeypatch, caplog):
    def fail(*args):
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(regions, "_cut", fail)
    model, inputs = Stack(), (torch.randn(3, 4), torch.rand(()))
    with pytest.raises(ZeroDivisionError):
        compiled_parts(model, *inputs)
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")
    outputs, kept = compiled_parts(model, *inputs)
    assert len(kept) == 1 and torch.equal(outputs[0], model(*inputs)[0])
    assert "made up" in caplog.text
