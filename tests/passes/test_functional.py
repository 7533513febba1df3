"""The trace of a graph into functional ATen operations: its results and refusals."""

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Tracer
from torch.fx.node import map_arg

from think_compile.passes.functional import NotFunctional, functional_graph


class LikeDynamo(Tracer):
    proxy_buffer_attributes = True


def graph_of(function):
    root = function if isinstance(function, nn.Module) else nn.Module()
    return GraphModule(root, LikeDynamo().trace(function))


def traced(function, *inputs):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        return functional_graph(graph_of(function), [mode.from_tensor(x) for x in inputs], mode)


def step(cache, rows, positions, counter):
    cache.index_copy_(1, positions, rows)
    counter.add_(rows.shape[1])
    past = cache[:, :4]
    past.mul_(2)
    return torch.nn.functional.scaled_dot_product_attention(rows, cache, cache), past


def step_inputs():
    return torch.randn(2, 8, 4), torch.randn(2, 2, 4), torch.tensor([1, 2]), torch.zeros((), dtype=torch.int64)


def test_written_inputs_come_out_first_and_attention_stays_whole():
    graph_module, written = traced(step, *step_inputs())
    assert written == [0, 3]
    mine = step_inputs()
    plain = [x.clone() for x in mine]
    cache, counter, attended, past = graph_module(*mine)
    expected = step(*plain)
    for got, want in zip((cache, counter, attended, past), (plain[0], plain[3], *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert any(n.target is torch.ops.aten.scaled_dot_product_attention.default for n in graph_module.graph.nodes)


def test_inputs_are_not_written_to_by_the_graph():
    graph_module, _ = traced(step, *step_inputs())
    inputs = step_inputs()
    before = [x.clone() for x in inputs]
    graph_module(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def said(graph_module):
    """Each node's operation and arguments, without names."""
    number = {node: f"%{i}" for i, node in enumerate(graph_module.graph.nodes)}
    return [
        (str(node.target) if node.op == "call_function" else node.op, map_arg((node.args, node.kwargs), number.get))
        for node in number
    ]


def test_the_graph_is_the_one_that_torch_exports():
    inputs = step_inputs()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad():
        theirs, _ = aot_export_module(
            graph_of(step), [mode.from_tensor(x) for x in inputs], trace_joint=False, pre_dispatch=True
        )
    ours, _ = traced(step, *inputs)

    assert said(ours) == said(theirs)


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("table", torch.randn(3))

    def forward(self, x):
        return (x * self.weight + self.table,)


def test_tensors_of_the_graph_itself_stay_its_own():
    module = Holding()
    graph_module, written = traced(module, torch.randn(3))
    assert written == [] and len(graph_module.graph.find_nodes(op="placeholder")) == 1
    x = torch.randn(3)
    torch.testing.assert_close(graph_module(x), module(x))
    assert (
        graph_module.held_weight is module.weight and dict(graph_module.named_buffers())["held_table"] is module.table
    )


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return (x + self.calls,)


def test_a_graph_that_writes_to_tensors_of_its_own_is_refused():
    with pytest.raises(NotFunctional, match="calls"):
        traced(Counting(), torch.randn(3))


def write_first(x, y):
    x.add_(1)
    return (x + y,)


def test_written_inputs_that_share_memory_are_refused():
    base = torch.randn(6)
    with pytest.raises(NotFunctional, match="share its memory: inputs \\[0, 1\\]"):
        traced(write_first, base[:4], base[2:])
    with pytest.raises(NotFunctional, match="share its memory"):
        traced(write_first, base, base)


def test_parts_of_one_tensor_may_be_written_to_where_they_do_not_overlap():
    base = torch.randn(4, 2, 3)  # keys and values side by side
    _, written = traced(write_first, base[:, 0], base[:, 1])
    assert written == [0]


def test_inputs_that_share_memory_may_be_read():
    base = torch.randn(6)
    _, written = traced(lambda x, y: (x + y,), base[:4], base[2:])
    assert written == []


def test_an_input_that_comes_twice_is_read_as_two():
    """Later the graph may be called with two tensors."""
    x = torch.randn(3)
    graph_module, _ = traced(lambda x, y: (x - y,), x, x)
    assert graph_module(torch.full((3,), 5.0), torch.full((3,), 2.0))[0].tolist() == [3, 3, 3]


@pytest.mark.parametrize("change", [lambda x: x.t_(), lambda x: x.resize_(2), lambda x: x.unsqueeze_(0)])
def test_an_input_whose_shape_is_changed_is_refused(change):
    def reshape(x):
        change(x)
        return (x + 1,)

    with pytest.raises(NotFunctional, match="input 0"):
        traced(reshape, torch.randn(2, 3))
