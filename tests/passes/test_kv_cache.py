"""Attentions with a cache, its join, and the refusals of others: hand-built modules, one per case."""

import dataclasses
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from think_compile.passes.find.attention import find_attention
from think_compile.passes.normalize import Normalized, normalize
from think_compile.passes.prove.kv_cache import find_caches
from think_compile.passes.prove.sequence import is_cross_attention, tokens_of
from think_compile.passes.prove.site import CachedAttention
from think_compile.passes.refusal import Reason
from think_compile.passes.rewrite.prompt_only import find_prompt_only

B, HQ, H, N, P, C, D = 2, 4, 2, 3, 7, 16, 8
BHSD, BSHD = (0, 1, 2, 3), (0, 2, 1, 3)


def normalized(f, *inputs) -> Normalized:
    def tupled(*args):
        out = f(*args)
        return out if isinstance(out, tuple) else (out,)

    graph = make_fx(tupled, pre_dispatch=True, tracing_mode="fake")(*inputs)
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.clear()
    return normalize(graph, inputs)


def findings_of(f, *inputs):
    found = normalized(f, *inputs)
    return find_caches(found, find_attention(found.graph_module))


def cached(f, *inputs) -> CachedAttention:
    findings = findings_of(f, *inputs)
    assert not findings.refused, [(r.reason, r.detail) for _, r in findings.refused]
    (site,) = findings.cached
    return site


def refused(f, *inputs) -> list[Reason]:
    findings = findings_of(f, *inputs)
    assert not findings.cached
    return [why.reason for _, why in findings.refused]


def groups(order):
    """A permutation of the canonical axes as a layout."""
    return tuple((axis,) for axis in order)


def qkv(layout=BHSD, heads=HQ, n=N):
    shapes = [(B, heads, n, D), (B, H, n, D), (B, H, n, D)]
    return [torch.randn([s[i] for i in layout]) for s in shapes]


def past(length=P, layout=BHSD, heads=H):
    shape = (B, heads, length, D)
    return [torch.randn([shape[i] for i in layout]) for _ in range(2)]


def repeat_kv(x, times=HQ // H):
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)


def attend(q, k, v, **kwargs):
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), **kwargs)


# ------------------------------------------------------------------ accepted: joins


def growing(q, k, v, pk, pv):
    k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
    return attend(q, k, v), k, v


def check(site, past_inputs, fixed, keys_layout=BHSD, start=None):
    assert site.fixed is fixed
    assert site.past == past_inputs
    assert site.keys.layout == site.values.layout == groups(keys_layout)
    assert site.keys.size(1) == H
    assert site.keys.size(3) == D
    assert site.keys.outputs
    assert all(layout == groups(keys_layout) for layout in site.keys.outputs.values())
    if past_inputs is not None:
        assert site.keys.join.past_layout == groups(keys_layout)
        assert site.keys.join.new.meta["val"].shape[keys_layout.index(2)] == N


def test_cat():
    site = cached(growing, *qkv(), *past())
    check(site, (3, 4), fixed=False)
    assert site.keys.extent == P + N


@pytest.mark.parametrize("dim", [2, -2])
def test_cat_at_either_end(dim):
    def f(q, k, v, pk, pv):
        k, v = torch.cat((pk, k), dim=dim), torch.cat((pv, v), dim=dim)
        return k, attend(q, k, v), v

    check(cached(f, *qkv(), *past()), (3, 4), fixed=False)


def test_symbolic_trace_of_a_module():
    class Attention(nn.Module):
        def forward(self, q, k, v, pk, pv):
            k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return out, k, v

    inputs = [*qkv(), *past()]
    found = normalize(symbolic_trace(Attention()), inputs)
    findings = find_caches(found, find_attention(found.graph_module))
    assert len(findings.cached) == 1, findings.refused


def test_first_call_with_fresh_keys():
    def f(q, k, v):
        k, v = k * 2, v * 2
        return attend(q, k, v), k, v

    site = cached(f, *qkv())
    assert site.past is None
    assert not site.fixed


def test_first_call_joined_to_an_empty_tensor():
    def f(q, k, v):
        k, v = torch.cat([torch.empty(0), k * 2], -2), torch.cat([torch.empty(0), v * 2], -2)
        return attend(q, k, v), k, v

    site = cached(f, *qkv())
    assert site.past is None


def test_a_graph_that_holds_a_constant():
    """A tensor attribute of the graph is not an input: the inputs keep their numbers."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("constant", torch.randn(D))

        def forward(self, q, k, v, pk, pv):
            k, v = torch.cat([pk, k + self.constant], 2), torch.cat([pv, v], 2)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v

    found = normalize(symbolic_trace(Attention()), [*qkv(), *past()])
    (site,) = find_caches(found, find_attention(found.graph_module)).cached
    check(site, (3, 4), fixed=False)


def index_copy(q, k, v, pk, pv, pos):
    k, v = pk.index_copy_(2, pos, k), pv.index_copy_(2, pos, v)
    return attend(q, k, v)


def index_put(q, k, v, pk, pv, pos):
    pk[:, :, pos] = k
    pv[:, :, pos] = v
    return attend(q, pk, pv)


def slice_write(q, k, v, pk, pv, pos):
    pk[:, :, 4 : 4 + N] = k
    pv[:, :, 4 : 4 + N] = v
    return attend(q, pk, pv)


def functional(q, k, v, pk, pv, pos):
    k, v = pk.index_copy(2, pos, k), pv.index_copy(2, pos, v)
    return attend(q, k, v), k, v


@pytest.mark.parametrize("f", [index_copy, index_put, slice_write, functional])
def test_fixed(f):
    site = cached(f, *qkv(), *past(C), torch.arange(N))
    check(site, (3, 4), fixed=True)
    assert site.keys.extent == C
    assert site.keys.join.start == 4 if f is slice_write else site.keys.join.start is not None


@pytest.mark.parametrize("f", [index_copy, index_put, slice_write])
def test_first_call_of_a_fixed_cache_made_in_the_graph(f):
    def g(q, k, v, pos):
        pk, pv = torch.zeros(B, H, C, D), torch.zeros(B, H, C, D)
        return f(q, k, v, pk, pv, pos), pk, pv

    site = cached(g, *qkv(), torch.arange(N))
    assert site.fixed
    assert site.past is None


def test_own_rows_suffice_for_all_readers_of_a_cache_or_none():
    def g(q, k, v, pos):
        k, v = (torch.zeros(B, H, C, D).index_copy(2, pos, new) for new in (k, v))
        return attend(q, k, v, is_causal=True), k, v

    found = normalized(g, *qkv(), torch.arange(N))
    (site,) = find_caches(found, find_attention(found.graph_module)).cached
    other = dataclasses.replace(site, attention=dataclasses.replace(site.attention, is_causal=False))
    assert find_prompt_only(found, [site]).roots == {site.keys.root}
    assert find_prompt_only(found, [site, other]) is None


def test_prefix_read():
    def f(q, k, v, pk, pv):
        pk[:, :, 4 : 4 + N] = k
        pv[:, :, 4 : 4 + N] = v
        return attend(q, pk[:, :, : 4 + N], pv[:, :, : 4 + N])

    site = cached(f, *qkv(), *past(C))
    check(site, (3, 4), fixed=True)
    assert site.keys.extent == 4 + N
    assert site.keys.size(2) == C


def test_prefix_read_without_repeating():
    def f(q, k, v, pk, pv):
        pk[:, :, 4 : 4 + N] = k
        pv[:, :, 4 : 4 + N] = v
        return F.scaled_dot_product_attention(q, pk[:, :, : 4 + N], pv[:, :, : 4 + N], enable_gqa=True)

    site = cached(f, *qkv(), *past(C))
    check(site, (3, 4), fixed=True)
    assert site.keys.extent == 4 + N


def sequence_major(q, k, v, pk, pv):
    k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), k, v


def test_sequence_major():
    site = cached(sequence_major, *qkv(BSHD), *past(P, BSHD))
    check(site, (3, 4), fixed=False, keys_layout=BSHD)
    assert site.keys.layout == groups(BSHD)


def test_sequence_first():
    layout = (2, 0, 1, 3)

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 0), torch.cat([pv, v], 0)
        return attend(*(t.permute(1, 2, 0, 3) for t in (q, k, v))), k, v

    check(cached(f, *qkv(layout), *past(P, layout)), (3, 4), fixed=False, keys_layout=layout)


def test_returned_in_another_layout_than_it_came():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk.transpose(1, 2), k], 2), torch.cat([pv.transpose(1, 2), v], 2)
        return attend(q, k, v), k.transpose(1, 2), v.transpose(1, 2)

    site = cached(f, *qkv(), *past(P, BSHD))
    assert site.keys.layout == groups(BHSD)
    assert site.keys.join.past_layout == groups(BSHD)
    assert set(site.keys.outputs.values()) == {groups(BSHD)}


REPEATS = {
    "expand": repeat_kv,
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    "none, enable_gqa": lambda x: x,
    "transposed twice": lambda x: x.mT.mT.repeat_interleave(2, 1),
    "stack": lambda x: repeat_kv(x.contiguous()),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads(name):
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(q, REPEATS[name](k), REPEATS[name](v), enable_gqa=True), k, v

    check(cached(f, *qkv(), *past()), (3, 4), fixed=False)


def test_rotary_embedding_uses_cat_too():
    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, rotate(k)], 2), torch.cat([pv, v], 2)
        return attend(rotate(q), k, v), k, v

    check(cached(f, *qkv(), *past()), (3, 4), fixed=False)

    def first(q, k, v):
        k, v = rotate(k), v * 1.5
        return attend(rotate(q), k, v), k, v

    assert cached(first, *qkv()).past is None


def test_one_token_and_one_sequence_and_one_head():
    q, k, v = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(q, k, v), k, v

    site = cached(f, q, k, v, torch.randn(1, 1, P, D), torch.randn(1, 1, P, D))
    assert site.keys.layout == groups(BHSD)
    assert site.past == (3, 4)


def test_two_layers():
    def f(q, k, v, pk, pv, pk2, pv2):
        out, k1, v1 = growing(q, k, v, pk, pv)
        out2, k2, v2 = growing(out, k * 2, v * 2, pk2, pv2)
        return out2, k1, v1, k2, v2

    findings = findings_of(f, *qkv(), *past(), *past())
    assert [site.past for site in findings.cached] == [(3, 4), (5, 6)]


# ------------------------------------------------------------------ refused, and why


def test_not_cached():
    assert refused(lambda q, k, v: attend(q, k * 2, v * 2), *qkv()) == [Reason.NOT_CACHED]


def test_values_not_cached():
    def f(q, k, v, pk):
        k = torch.cat([pk, k], 2)
        v = torch.cat([v, v, v], 2)[:, :, : P + N] * 2
        return attend(q, k, v), k

    assert refused(f, *qkv(), past()[0]) == [Reason.VALUES_NOT_CACHED]


def test_keys_read_by_a_second_product():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k, v, q[:, :H] @ k.mT

    assert refused(f, *qkv(), *past()) == [Reason.KEY_ESCAPES]


def test_values_read_by_something_else():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k, v, v.sum()

    site = cached(f, *qkv(), *past())
    assert site.values.read_elsewhere and not site.keys.read_elsewhere


def test_values_that_are_changed():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, torch.cat(v.chunk(2, 1)[::-1], 1)), k, v

    assert refused(f, *qkv(), *past()) == [Reason.VALUES_TRANSFORMED]


def test_shared_by_two_layers():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), attend(q * 2, k, v), k, v

    one, two = findings_of(f, *qkv(), *past()).cached
    assert one.keys.root is two.keys.root


def test_shared_with_another_mask():
    def f(q, k, v, pk, pv, mask):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        masked = F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask)
        return attend(q, k, v), masked, k, v

    mask = torch.ones(N, N + P, dtype=torch.bool)
    assert refused(f, *qkv(), *past(), mask) == [Reason.SHARED, Reason.SHARED]


def test_shared_with_an_attention_that_is_refused():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        keys, values = (t.repeat_interleave(HQ // H, 1) for t in (k, v))
        return attend(q, k, v), F.scaled_dot_product_attention(q, keys, values, dropout_p=0.5), k, v

    assert sorted(r.value for r in refused(f, *qkv(), *past())) == sorted(
        r.value for r in (Reason.DROPOUT, Reason.SHARED)
    )


def test_keys_are_the_values():
    def f(q, k, pk):
        k = torch.cat([pk, k], 2)
        return attend(q, k, k), k

    assert refused(f, *qkv()[:2], past()[0]) == [Reason.SHARED]


def test_keys_also_read_as_queries_or_mask():
    def f(k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(k, k, v), k, v

    assert not findings_of(f, *qkv()[1:], *past()).cached


def test_latent_cache_behind_a_linear():
    def f(q, c, pc, w):
        c = torch.cat([pc, c], 1)
        k = F.linear(c, w).view(B, -1, HQ, D).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k * 2), c

    inputs = (torch.randn(B, HQ, N, D), torch.randn(B, N, 12), torch.randn(B, P, 12), torch.randn(HQ * D, 12))
    assert refused(f, *inputs)[0] is Reason.LATENT


def test_heads_and_channels_merged_in_the_cache():
    """The cache holds [B, S, H * D]."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
        heads = [t.view(B, P + N, HQ, D).transpose(1, 2) for t in (k, v)]
        return F.scaled_dot_product_attention(q, *heads), k, v

    inputs = [torch.randn(B, HQ, N, D), *(torch.randn(B, n, HQ * D) for n in (N, N, P, P))]
    site = cached(f, *inputs)
    assert site.keys.layout == site.keys.join.past_layout == ((0,), (2,), (1, 3))
    assert site.keys.shape == (B, HQ, P + N, D)


def test_heads_and_channels_regrouped():
    """[12 heads of 64] read as [16 heads of 48]: neither layout refines the other."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
        heads = [t.reshape(B, P + N, 16, 48).transpose(1, 2) for t in (k, v)]
        return F.scaled_dot_product_attention(q, *heads), k, v

    inputs = [torch.randn(B, 16, N, 48), *(torch.randn(B, n, 12, 64) for n in (N, N, P, P))]
    with_alarm(lambda: refused(f, *inputs))


def with_alarm(f):
    def stop(*_):
        raise TimeoutError("does not come to an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        return f()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_sliding_slice_is_returned():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[:, :, -P:], v[:, :, -P:]

    assert refused(f, *qkv(), *past()) == [Reason.SLIDING]


def windowed(f, *inputs, larger_than=1):
    """The window of the only attention, or the reason for its refusal, with `sliding` on."""
    found = normalized(f, *inputs)
    findings = find_caches(found, find_attention(found.graph_module), larger_than)
    if findings.refused:
        return findings.refused[0][1].reason
    (site,) = findings.cached
    return site.window


W = 5  # less than P


def test_a_window_of_what_is_kept():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[:, :, -W:], v[:, :, -W:]

    window = windowed(f, *qkv(), *past())
    assert (window.sizes, window.bound) == ((None, None, W), W)
    filling = windowed(f, *qkv(n=1), *past(length=2))
    assert (filling.sizes, filling.bound) == ((None, None, None), W)
    assert windowed(f, *qkv(), *past(), larger_than=W) is Reason.WINDOW_TOO_SMALL
    assert windowed(f, *qkv(), *past(), larger_than=None) is Reason.SLIDING


def test_a_window_of_what_is_read():
    def f(q, k, v, pk, pv):
        k, v = (torch.cat(pair, 2)[:, :, -W:] for pair in ((pk, k), (pv, v)))
        return attend(q, k, v), k, v

    assert windowed(f, *qkv(), *past()).sizes == (None, W, W)


def test_a_window_of_which_all_is_kept():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k[:, :, -W:], v[:, :, -W:]), k, v

    assert windowed(f, *qkv(), *past()).sizes == (None, W, None)


def test_a_window_of_the_past():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk[:, -W:], k], 1), torch.cat([pv[:, -W:], v], 1)
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), k, v

    assert windowed(f, *qkv(BSHD), *past(layout=BSHD)).sizes == (W, None, None)


def test_windows_that_are_not_the_last_tokens():
    def prefix(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[:, :, :W], v[:, :, :W]

    def strided(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[:, :, -W::2], v[:, :, -W::2]

    def channels(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[..., -W:], v[..., -W:]

    def two_lengths(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k, v, k[:, :, -W:]

    for f in (prefix, strided, channels, two_lengths):
        assert windowed(f, *qkv(), *past()) is Reason.UNKNOWN_WINDOW, f.__name__


def test_a_window_with_other_tokens_before_it():
    """The first tokens stay forever, like attention sinks: the window is not simply the last tokens."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), *(torch.cat([t[:, :, :2], t[:, :, -W:]], 2) for t in (k, v))

    assert isinstance(windowed(f, *qkv(), *past()), Reason)


def test_keys_and_values_of_different_windows():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v), k[:, :, -W:], v[:, :, -W - 1 :]

    assert windowed(f, *qkv(), *past()) is Reason.VALUES_NOT_CACHED


def test_a_window_written_back_in_place():
    """A sliding window in a fixed buffer, written by a copy of the whole window."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        pk.copy_(k[:, :, -P:])
        pv.copy_(v[:, :, -P:])
        return attend(q, k, v)

    window = windowed(f, *qkv(), *past())
    assert (window.joined, window.read, window.kept) == (None, None, P)


def test_a_window_written_to_other_buffers():
    """The other buffers are not known to be the next call's past, or the window does not fill them."""

    def f(q, k, v, pk, pv, elsewhere_k, elsewhere_v):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        elsewhere_k.copy_(k[:, :, -P:])
        elsewhere_v.copy_(v[:, :, -P:])
        return attend(q, k, v)

    assert windowed(f, *qkv(), *past(), *past()) is Reason.SLIDING_BUFFER

    def g(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        pk[:, :, :W].copy_(k[:, :, -W:])
        pv[:, :, :W].copy_(v[:, :, -W:])
        return attend(q, k, v)

    assert isinstance(windowed(g, *qkv(), *past()), Reason)


def test_a_part_of_the_past_that_grows():
    """Only the past's first rows are joined: the next call's past does not show how many."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk[:, :, :W], k], 2), torch.cat([pv[:, :, :W], v], 2)
        return attend(q, k, v), k, v

    assert windowed(f, *qkv(), *past()) is Reason.UNKNOWN_WINDOW


def test_a_first_call_that_a_graph_break_cuts():
    """Queries, keys and values come from another graph, equally many of each; keys and values leave as outputs."""

    def f(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v), k, v.contiguous()

    found = normalized(f, *qkv(BSHD))
    (site,) = find_caches(found, find_attention(found.graph_module)).cached
    assert site.past is None and site.keys.join.new is None and site.keys.root in found.placeholders
    assert site.keys.outputs == {1: groups(BHSD)} and site.values.outputs == {2: groups(BHSD)}


def test_cross_attention_over_whole_inputs():
    """The queries are projected here, or their number differs from that of the keys."""
    weight = torch.randn(HQ * D, HQ * D)

    def projected(x, k, v, weight):
        q = F.linear(x, weight).view(B, N, HQ, D).transpose(1, 2)
        return attend(q, k, v), k, v

    def others(q, k, v):
        return attend(q, k, v), k, v

    assert refused(projected, torch.randn(B, N, HQ * D), *qkv()[1:], weight) == [Reason.NO_JOIN_SEEN]
    assert refused(others, torch.randn(B, HQ, N + 1, D), *qkv()[1:]) == [Reason.CROSS_ATTENTION]


def test_whole_keys_that_do_not_stay():
    def f(q, k, v):
        return attend(q, k, v), v.clone()

    assert refused(f, *qkv()) == [Reason.NO_JOIN_SEEN]


def test_cross_attention_over_projected_keys():
    def f(q, k, v):
        k, v = k * 2, v * 2
        return attend(q, k, v), k, v

    q = torch.randn(B, HQ, 5, D)
    assert refused(f, q, *qkv()[1:]) == [Reason.CROSS_ATTENTION]


@pytest.mark.parametrize("embedding", ["operation", "call as written"])
def test_cross_attention_over_as_many_tokens(embedding):
    """Weights of a tensor subclass: the trace has the model's own call."""
    graph = Graph()
    ours, theirs, weight = (graph.placeholder(name) for name in ("ours", "theirs", "weight"))
    for node in (ours, theirs, weight):
        node.meta["val"] = torch.empty(2, 3)
    if embedding == "operation":
        q, k = (graph.call_function(torch.ops.aten.embedding.default, (weight, ids)) for ids in (ours, theirs))
    else:
        q, k = (graph.call_function(F.embedding, (ids, weight)) for ids in (ours, theirs))
    assert is_cross_attention(q, k, tokens_of(graph)) and not is_cross_attention(q, q, tokens_of(graph))


def test_heads_repeated_in_turn():
    """`repeat` along the heads pairs query head h with key head h % H, not h // group."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), k, v

    site = cached(f, *qkv(), *past())
    assert site.keys.interleaved
    assert site.values.interleaved


def test_keys_rotated_after_they_are_cached():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        half = D // 2
        turned = torch.cat([-k[..., half:], k[..., :half]], -1)
        return attend(q, k * 0.3 + turned * 0.7, v), k, v

    assert refused(f, *qkv(), *past()) == [Reason.TRANSFORMED]


def test_cross_attention_of_equal_lengths():
    """The first call over an encoder's tokens, as many as the decoder's."""

    def f(ids, other, table, v):
        q, k = (F.embedding(i, table).unflatten(-1, (H, D)).transpose(1, 2) for i in (ids, other))
        v = v + 1
        return F.scaled_dot_product_attention(q, k, v), k, v

    ids = torch.zeros(B, N, dtype=torch.long)
    inputs = [torch.randn(9, H * D), qkv(heads=H)[2]]
    assert refused(f, ids, ids.clone(), *inputs) == [Reason.CROSS_ATTENTION]
    assert cached(lambda ids, table, v: f(ids, ids, table, v), ids, *inputs).past is None


def test_attention_without_a_heads_axis():
    """[X, N, D] throughout: each of the X rows is a sequence with one head."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
        return F.scaled_dot_product_attention(q, k, v), k, v

    site = cached(f, *(torch.randn(6, n, D) for n in (N, N, N, P, P)))
    assert site.keys.layout == site.keys.join.past_layout == ((0,), (2,), (3,))
    assert site.keys.shape == (6, 1, P + N, D)


def test_one_sequence_without_a_batch_axis():
    """[H, S, D] in the cache; the attention adds a batch axis of one."""

    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 1), torch.cat([pv, v], 1)
        return F.scaled_dot_product_attention(q[None], k[None], v[None]), k, v

    site = cached(f, *(torch.randn(H, n, D) for n in (N, N, N, P, P)))
    assert site.keys.layout == ((1,), (2,), (3,))
    assert site.keys.shape == (1, H, P + N, D)


def test_repeated_keys_are_what_is_kept():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        k, v = repeat_kv(k), repeat_kv(v)
        return F.scaled_dot_product_attention(q, k, v), k, v

    assert not findings_of(f, *qkv(), *past()).cached


@pytest.mark.parametrize("order", ["behind", "three", "of a product"])
def test_unknown_join(order):
    def f(q, k, v, pk, pv):
        parts = {
            "behind": lambda a, b: [b * 1, a],
            "three": lambda a, b: [a, b, b],
            "of a product": lambda a, b: [a * 2, b],
        }[order]
        k, v = torch.cat(parts(pk, k), 2), torch.cat(parts(pv, v), 2)
        return attend(q, k, v), k, v

    assert not findings_of(f, *qkv(), *past()).cached
    if order != "three":
        assert refused(f, *qkv(), *past()) == [Reason.UNKNOWN_ROOT]


def test_rolled_ring():
    def f(q, k, v, pk, pv):
        pk.copy_(pk.roll(-N, 2))
        pv.copy_(pv.roll(-N, 2))
        pk[:, :, C - N :] = k
        pv[:, :, C - N :] = v
        return attend(q, pk, pv)

    assert not findings_of(f, *qkv(), *past(C)).cached


def test_write_by_rows_of_a_mask_or_two_indices():
    def two(q, k, v, pk, pv, pos):
        rows = torch.arange(B)[:, None]
        pk[rows, :, pos[None]] = k.transpose(1, 2)
        pv[rows, :, pos[None]] = v.transpose(1, 2)
        return attend(q, pk, pv)

    assert refused(two, *qkv(), *past(C), torch.arange(N)) == [Reason.UNKNOWN_ROOT]

    def added(q, k, v, pk, pv, pos):
        pk.index_add_(2, pos, k)
        pv.index_add_(2, pos, v)
        return attend(q, pk, pv)

    assert not findings_of(added, *qkv(), *past(C), torch.arange(N)).cached


def test_past_is_read_elsewhere():
    def f(q, k, v, pk, pv):
        out, k, v = growing(q, k, v, pk, pv)
        return out, k, v, pk.sum()

    assert refused(f, *qkv(), *past()) == [Reason.PAST_ESCAPES]


def test_past_is_returned_too():
    def f(q, k, v, pk, pv):
        out, k, v = growing(q, k, v, pk, pv)
        return out, k, v, pk.transpose(1, 2)

    assert refused(f, *qkv(), *past()) == [Reason.PAST_ESCAPES]


def test_past_feeds_the_new_keys():
    def f(q, k, v, pk, pv):
        return growing(q, k + pk[:, :, :1], v, pk, pv)

    assert refused(f, *qkv(), *past()) == [Reason.PAST_ESCAPES]


def test_heads_differ():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return F.scaled_dot_product_attention(q, repeat_kv(k), v), k, v

    q, k, _ = qkv()
    v, pv = torch.randn(B, HQ, N, D), torch.randn(B, HQ, P, D)
    assert refused(f, q, k, v, past()[0], pv) == [Reason.HEADS_DIFFER]


def test_dropout():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
        return attend(q, k, v, dropout_p=0.1), k, v

    assert refused(f, *qkv(), *past()) == [Reason.DROPOUT]


# ------------------------------------------------------------------ traps: may be refused, must not be wrong


def test_keys_and_values_written_at_different_positions():
    def f(q, k, v, pk, pv, pos, other):
        return index_copy_at(q, k, v, pk, pv, pos, other)

    def index_copy_at(q, k, v, pk, pv, pos, other):
        k, v = pk.index_copy_(2, pos, k), pv.index_copy_(2, other, v)
        return attend(q, k, v)

    assert not findings_of(f, *qkv(), *past(C), torch.arange(N), torch.arange(N) + 4).cached


def test_slices_written_at_different_positions():
    def f(q, k, v, pk, pv):
        pk[:, :, 4 : 4 + N] = k
        pv[:, :, 5 : 5 + N] = v
        return attend(q, pk, pv)

    assert not findings_of(f, *qkv(), *past(C)).cached


@pytest.mark.parametrize("begin", [-N, -N - 2])
def test_slice_written_from_behind(begin):
    """`cache[:, :, -n:] = k`: the start counts from the end."""

    def f(q, k, v, pk, pv):
        end = None if begin == -N else begin + N
        pk[:, :, begin:end] = k
        pv[:, :, begin:end] = v
        return attend(q, pk, pv)

    findings = findings_of(f, *qkv(), *past(C))
    if findings.cached:
        assert findings.cached[0].keys.join.start == C + begin


@pytest.mark.parametrize("end", [-2, C + 5])
def test_prefix_with_an_odd_end(end):
    def f(q, k, v, pk, pv):
        pk[:, :, 4 : 4 + N] = k
        pv[:, :, 4 : 4 + N] = v
        return attend(q, pk[:, :, :end], pv[:, :, :end])

    findings = findings_of(f, *qkv(), *past(C))
    if findings.cached:
        assert findings.cached[0].keys.extent == len(range(C)[:end])


def test_written_rows_that_broadcast():
    def f(q, k, v, pk, pv, pos):
        pk[:, :, pos] = k[:1]
        pv[:, :, pos] = v[:1]
        return attend(q, pk, pv)

    findings = findings_of(f, *qkv(), *past(C), torch.arange(N))
    for site in findings.cached:
        assert site.keys.join.new.meta["val"].shape[0] == B


POSITIONS = {
    "arange": (lambda p: torch.arange(N), True),
    "moved": (lambda p: torch.arange(N) + p[0], True),
    "moved by a number": (lambda p: torch.arange(N) + 3, True),
    "from a start": (lambda p: torch.arange(3, 3 + N), True),
    "given": (lambda p: p, False),
    "steps": (lambda p: torch.arange(0, 2 * N, 2), False),
    "twice": (lambda p: torch.add(p[:1], torch.arange(N), alpha=2), False),
    "doubled": (lambda p: torch.arange(N) * 2, False),
    "sum of two": (lambda p: torch.arange(N) + torch.arange(N), False),
    "repeated": (lambda p: torch.arange(1).repeat(N), False),
    "interleaved": (lambda p: torch.arange(N).repeat_interleave(2)[:N], False),
    "tiled": (lambda p: torch.arange(N).repeat(2), False),
    "turned": (lambda p: torch.arange(2 * N).view(2, N).t().reshape(-1), False),
    "expanded": (lambda p: (torch.arange(2)[:1]).expand(N), False),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_whether_positions_are_consecutive(name):
    make, expected = POSITIONS[name]

    def f(q, k, v, pk, pv, given):
        pos = make(given)
        pk.index_copy_(2, pos, k)
        pv.index_copy_(2, pos, v)
        return attend(q, pk, pv)

    n = make(torch.arange(N)).shape[0]
    findings = findings_of(f, *qkv(n=n), *past(C), torch.arange(N))
    for site in findings.cached:
        assert site.keys.join.consecutive <= expected
    if name in ("arange", "moved", "moved by a number", "from a start"):
        assert findings.cached[0].keys.join.consecutive


def test_kept_in_another_dtype():
    """The cache is a cast copy of the attention's operand: its handle must have the cache's dtype."""

    def f(q, k, v):
        k, v = k * 2, v * 2
        return attend(q, k, v), k.bfloat16(), v.bfloat16()

    findings = findings_of(f, *qkv())
    for site in findings.cached:
        assert site.keys.root.meta["val"].dtype == torch.bfloat16


def test_kept_in_lower_precision_read_in_higher():
    def f(q, k, v, pk, pv):
        k, v = torch.cat([pk, k.bfloat16()], 2), torch.cat([pv, v.bfloat16()], 2)
        return attend(q, k.float(), v.float()), k, v

    site = cached(f, *qkv(), *(t.bfloat16() for t in past()))
    assert site.keys.root.meta["val"].dtype == torch.bfloat16


def test_causal_and_scale_are_seen():
    def f(q, k, v):
        k, v = k * 2, v * 2
        return attend(q, k, v, is_causal=True, scale=0.3), k, v

    site = cached(f, *qkv()).attention
    assert site.is_causal is True
    assert site.scale == 0.3
    assert site.mask is None
