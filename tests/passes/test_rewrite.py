"""Graphs before and after the rewriting, on hand-built modules; other tests check their results."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from think_compile.cache.canonical import CANONICAL
from think_compile.cache.state import Call, Prompt, capacity_for
from think_compile.config import ThinkConfig
from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.think import Channels
from think_compile.formats.whole import Whole
from think_compile.kernels import arrange
from think_compile.passes.find.attention import find_attention
from think_compile.passes.normalize import normalize
from think_compile.passes.prove.kv_cache import find_caches
from think_compile.passes.rewrite import plan
from think_compile.passes.rewrite import rewrite as rw

B, HQ, H, N, P, C, D = 2, 4, 2, 3, 7, 16, 8
SDPA = torch.ops.aten.scaled_dot_product_attention.default
FIRST = {CacheFormat.first_call}
LATER = {CacheFormat.step, CacheFormat.attend}
CONFIG = ThinkConfig(0.5, recent=2, channel_multiple=1, lowering="eager")


def prepared(f, *inputs):
    graph = make_fx(f, pre_dispatch=True, tracing_mode="fake")(*inputs)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.clear()
    normalized = normalize(graph, inputs)
    findings = find_caches(normalized, find_attention(normalized.graph_module))
    assert not findings.refused, [(why.reason, why.detail) for _, why in findings.refused]
    return normalized, findings.cached


def rewritten(f, *inputs, packed=(), config=CONFIG):
    normalized, sites = prepared(f, *inputs)
    return normalized, rw.rewrite(normalized, sites, frozenset(packed), config.format_for)


def targets(graph_module):
    """The called targets; for a format's methods, their functions."""
    called = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    return [getattr(target, "__func__", target) for target in called]


def count(graph_module, wanted):
    return sum(target in wanted for target in targets(graph_module))


def first(q, k, v):
    k, v = k * 2, v * 2
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v


def growing(q, k, v, pk, pv):
    k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v


def two_layers(q, k, v, pk, pv, pk2, pv2):
    out, k1, v1 = growing(q, k, v, pk, pv)
    out, k2, v2 = growing(out, k * 2, v, pk2, pv2)
    return out, k1, v1, k2, v2


def fixed(q, k, v, pk, pv, pos, mask):
    pk.index_copy_(2, pos, k)
    pv.index_copy_(2, pos, v)
    return (F.scaled_dot_product_attention(q, pk, pv, mask, enable_gqa=True),)


def fixed_first(q, k, v, pos):
    pk, pv = torch.zeros(B, H, C, D), torch.zeros(B, H, C, D)
    pk.index_copy_(2, pos, k)
    pv.index_copy_(2, pos, v)
    return F.scaled_dot_product_attention(q, pk, pv, enable_gqa=True), pk, pv


def qkv():
    return torch.randn(B, HQ, N, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)


def past(length=P):
    return torch.randn(B, H, length, D), torch.randn(B, H, length, D)


def fixed_inputs():
    return (*qkv(), *past(C), torch.arange(N), torch.ones(N, C, dtype=torch.bool))


# ------------------------------------------------------------------ first calls


@pytest.mark.parametrize("f", [first, fixed_first])
def test_first_call_leaves_the_attention_untouched(f):
    inputs = (*qkv(), torch.arange(N)) if f is fixed_first else qkv()
    normalized, result = rewritten(f, *inputs)
    before, after = normalized.graph_module, result.graph_module
    assert count(after, {SDPA}) == count(before, {SDPA}) == 1
    (old,) = before.graph.find_nodes(op="call_function", target=SDPA)
    (new,) = after.graph.find_nodes(op="call_function", target=SDPA)
    assert [getattr(a, "name", a) for a in old.args] == [getattr(a, "name", a) for a in new.args]
    assert old.kwargs == new.kwargs
    assert count(after, FIRST) == 1
    assert count(after, LATER) == 0


def test_first_call_keeps_its_result_and_stores_the_rest():
    inputs = qkv()
    _, result = rewritten(first, *inputs)
    values = result.graph_module(*inputs)
    out, keys, vals = result.outputs
    assert isinstance(out, plan.Returned)
    assert torch.equal(values[out.position], first(*inputs)[0])
    assert isinstance(keys, plan.NewStore) and isinstance(vals, plan.NewStore)
    assert (keys.of, vals.of) == ("keys", "values")
    assert (keys.length, keys.fixed, keys.layout) == (N, False, CANONICAL)
    parts = {name: values[position] for name, position in keys.positions}
    assert parts["rows"].shape == (B, H, capacity_for(N), D // 2)
    assert parts["channels"].shape == (B, H, D // 2)
    assert parts["ring"].shape == (B, H, 3, D)
    assert torch.equal(values[dict(vals.positions)["rows"]][:, :, :N], inputs[2] * 2)
    assert result.appended == [] and result.replaced == []


def test_a_dense_past_makes_a_first_call():
    inputs = (*qkv(), *past())
    _, result = rewritten(growing, *inputs)
    assert count(result.graph_module, FIRST) == 1
    assert count(result.graph_module, {SDPA}) == 1
    assert result.inputs == [plan.Passed(i) for i in range(5)]
    values = result.graph_module(*inputs)
    assert torch.equal(values[result.outputs[0].position], growing(*inputs)[0])
    assert result.outputs[1].length == P + N


def test_a_dense_buffer_is_replaced_not_written():
    normalized, result = rewritten(fixed, *fixed_inputs())
    assert [index for index, _ in result.replaced] == normalized.written == [3, 4]
    assert isinstance(result.replaced[0][1], plan.NewStore)
    assert count(result.graph_module, {torch.ops.aten.copy_.default}) == 0
    inputs = fixed_inputs()
    before = inputs[3].clone()
    result.graph_module(*inputs)
    assert torch.equal(inputs[3], before)


# ------------------------------------------------------------------ later calls


def test_later_call_drops_the_past_and_the_attention():
    _, result = rewritten(growing, *qkv(), *past(), packed=(3, 4))
    after = result.graph_module
    assert count(after, {SDPA, torch.ops.aten.cat.default}) == 0
    assert count(after, LATER) == 1
    assert count(after, FIRST) == 0
    assert not {3, 4} & {what.index for what in result.inputs if isinstance(what, plan.Passed)}
    stored = {(what.index, what.part.name) for what in result.inputs if isinstance(what, plan.FromStore)}
    assert stored == {(3, "rows"), (3, "channels"), (3, "ring"), (4, "rows")}
    assert all(isinstance(what, plan.GrownStore) for what in result.outputs[1:3])
    assert [index for index, _ in result.appended] == [3, 4]
    assert len(after.graph.find_nodes(op="placeholder")) == len(result.inputs)
    after.graph.lint()


def test_only_one_of_a_pair_packed_makes_a_first_call():
    _, result = rewritten(growing, *qkv(), *past(), packed=(3,))
    assert count(result.graph_module, FIRST) == 1
    assert plan.Passed(3) in result.inputs


def test_later_call_on_a_fixed_cache():
    _, result = rewritten(fixed, *fixed_inputs(), packed=(3, 4))
    after = result.graph_module
    assert count(after, {SDPA, torch.ops.aten.index_copy.default, torch.ops.aten.copy_.default}) == 0
    assert count(after, LATER) == count(after, {CacheFormat.step}) == 1
    assert count(after, {CacheFormat.append}) == 0
    stored = {(what.index, what.part.name) for what in result.inputs if isinstance(what, plan.FromStore)}
    assert stored == {(3, "rows"), (3, "channels"), (3, "ring"), (3, "counters"), (4, "rows")}
    assert result.replaced == []
    assert not any(isinstance(what, plan.Counter) for what in result.inputs)


def read_twice(q, k, v, pk, pv, pos, mask):
    """Two attentions to one fixed cache."""
    (once,) = fixed(q, k, v, pk, pv, pos, mask)
    return once, F.scaled_dot_product_attention(2 * q, pk, pv, mask, enable_gqa=True)


def test_a_cache_that_two_attentions_read_is_appended_to_behind_both():
    _, result = rewritten(read_twice, *fixed_inputs(), packed=(3, 4))
    order = [target for target in targets(result.graph_module) if target in LATER | {CacheFormat.append}]
    assert order == [CacheFormat.attend, CacheFormat.attend, CacheFormat.append]


def test_layers_of_one_length_share_its_numbers():
    _, result = rewritten(two_layers, *qkv(), *past(), *past(), packed=(3, 4, 5, 6))
    counters = [what for what in result.inputs if isinstance(what, plan.Counter)]
    assert counters == [plan.Counter((3, 5), "window_start")]
    assert count(result.graph_module, LATER) == 2


def test_layers_that_are_packed_in_part():
    _, result = rewritten(two_layers, *qkv(), *past(), *past(), packed=(3, 4))
    assert count(result.graph_module, LATER) == 1
    assert count(result.graph_module, FIRST) == 1
    assert count(result.graph_module, {SDPA}) == 1
    kinds = [type(what) for what in result.outputs]
    assert kinds == [plan.Returned, plan.GrownStore, plan.GrownStore, plan.NewStore, plan.NewStore]


def test_the_later_call_computes_what_the_model_would_on_pruned_keys():
    q, k, v = qkv()
    pk, pv = past()
    form = CONFIG.format_for(D, D)
    keys, values = form.first_call(Call(torch.randn(B, HQ, P, D), pk, pv), Prompt())
    _, result = rewritten(growing, q, k, v, pk, pv, packed=(3, 4))
    stored = {3: keys, 4: values}
    given = []
    for what in result.inputs:
        if isinstance(what, plan.FromStore):
            given.append(stored[what.index][what.part.name])
        else:
            given.append((q, k, v)[what.index] if isinstance(what, plan.Passed) else P - 2)
    out = result.graph_module(*given)[result.outputs[0].position]
    kept = torch.zeros(B, H, D, dtype=torch.bool).scatter_(-1, keys["channels"].long(), True)
    old = torch.arange(P) < P - 2
    zeroed = pk.masked_fill(old[:, None] & ~kept[:, :, None], 0)
    torch.testing.assert_close(out, growing(q, k, v, zeroed, pv)[0])


def test_output_lies_in_memory_as_the_stock_attention_would():
    _, result = rewritten(growing, *qkv(), *past(), packed=(3, 4))
    assert arrange.laid_out in targets(result.graph_module)


def test_the_normalized_graph_is_not_changed():
    normalized, sites = prepared(growing, *qkv(), *past())
    before = str(normalized.graph_module.graph)
    rw.rewrite(normalized, sites, frozenset((3, 4)), CONFIG.format_for)
    rw.rewrite(normalized, sites, frozenset(), CONFIG.format_for)
    assert str(normalized.graph_module.graph) == before


def test_other_written_inputs_are_still_written():
    def f(q, k, v, pk, pv, counter):
        counter.add_(1)
        return growing(q, k, v, pk, pv)

    counter = torch.tensor(5)
    normalized, result = rewritten(f, *qkv(), *past(), counter, packed=(3, 4))
    assert normalized.written == [5]
    assert count(result.graph_module, {torch.ops.aten.copy_.default}) == 1
    assert plan.Passed(5) in result.inputs


def test_what_is_returned_twice_is_stored_once():
    def f(q, k, v):
        out, k, v = first(q, k, v)
        return out, k, v, k, k.transpose(1, 2)

    _, result = rewritten(f, *qkv())
    assert count(result.graph_module, FIRST) == 1
    one, two, moved = result.outputs[1], result.outputs[3], result.outputs[4]
    assert one == two
    assert moved.layout == ((0,), (2,), (1,), (3,))
    assert moved.positions == one.positions


# ------------------------------------------------------------------ settings and logging


@pytest.mark.parametrize("ratio,multiple,kept", [(0.0, 1, 8), (0.3, 1, 6), (0.5, 16, 8), (0.9, 1, 1), (0.75, 4, 4)])
def test_format_of_a_layer(ratio, multiple, kept):
    config = ThinkConfig(ratio, recent=5, observe=9, channel_multiple=multiple, prune_generated=False)
    form = config.format_for(D, 6)
    assert form.keys == Side(Channels(kept, 9), D, 5, encodes_later=False)
    assert form.values == Side(Whole(), 6, 5, encodes_later=False)


def test_each_pass_logs_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="think_compile.passes"):
        rewritten(growing, *qkv(), *past(), packed=(3, 4))
    lines = [record.getMessage() for record in caplog.records if record.name == "think_compile.passes"]
    assert [line.split(":")[0] for line in lines] == ["normalize", "attention", "kv_cache", "rewrite"]
    assert all("1 matches" in line and "ms" in line for line in lines[1:])


def test_passes_dump_their_graphs(caplog):
    with caplog.at_level(logging.DEBUG, logger="think_compile.passes"):
        rewritten(growing, *qkv(), *past(), packed=(3, 4))
    dumps = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    before = next(text for text in dumps if text.startswith("rewrite, before"))
    after = next(text for text in dumps if text.startswith("rewrite, after"))
    assert "scaled_dot_product_attention" in before
    assert "scaled_dot_product_attention" not in after
    assert "step" in after
