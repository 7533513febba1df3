"""Written-out attention: graphs recognised as such, and similar ones that are not."""

import pytest
import torch
from test_kv_cache import HQ, D, H, N, P, cached, findings_of, normalized, past, qkv, refused, repeat_kv

from think_compile.passes.find.attention import find_attention
from think_compile.passes.find.product import product_of
from think_compile.passes.find.region import find_regions
from think_compile.passes.refusal import Reason


def joined(k, v, pk, pv):
    return torch.cat([pk, k], 2), torch.cat([pv, v], 2)


def written_out(q, k, v):
    return (q @ repeat_kv(k).mT / D**0.5).softmax(-1) @ repeat_kv(v)


def regions_of(f, *inputs):
    return find_regions(normalized(f, *inputs).graph_module.graph)


# ------------------------------------------------------------------ attention


def test_products_around_a_softmax():
    def f(q, k, v, pk, pv):
        k, v = joined(k, v, pk, pv)
        return written_out(q, k, v), k, v

    site = cached(f, *qkv(), *past())
    assert site.past == (3, 4)
    assert (site.query_heads, site.query_tokens) == (HQ, N)
    assert site.keys.size(1) == H
    assert site.attention.region.token_axis == 3


def test_masks_between_are_seen_in_order():
    def f(q, k, v, pk, pv, bias, hidden):
        k, v = joined(k, v, pk, pv)
        logits = (q @ repeat_kv(k).mT + bias).masked_fill(hidden, -1e9)
        return torch.where(~hidden, logits, -1e9).softmax(-1) @ repeat_kv(v), k, v

    hidden = torch.zeros(N, N + P, dtype=torch.bool)
    site = cached(f, *qkv(), *past(), torch.zeros(N, N + P), hidden)
    assert [m.kind for m in site.attention.region.masks] == ["add", "block", "allow"]


def test_a_fill_that_hides_nothing_is_no_mask():
    def f(q, k, v, hidden):
        return (q @ repeat_kv(k).mT).masked_fill(hidden, 0.0).softmax(-1) @ repeat_kv(v)

    (region,) = regions_of(f, *qkv(), torch.zeros(N, N, dtype=torch.bool))
    assert not region.masks


def test_a_bias_from_another_product_is_no_second_reading():
    """Relative positions: two products meet in one softmax, one of them with cached keys."""

    def f(q, k, v, pk, pv, table):
        k, v = joined(k, v, pk, pv)
        return (q @ repeat_kv(k).mT + q @ table.mT).softmax(-1) @ repeat_kv(v), k, v

    findings = findings_of(f, *qkv(), *past(), torch.randn(N + P, D))
    assert len(findings.cached) == 1
    assert not findings.refused


def test_two_cached_readings_are_ambiguous():
    def f(q, k, v, pk, pv, k2, pk2):
        k, v = joined(k, v, pk, pv)
        k2 = torch.cat([pk2, k2], 2)
        return (q @ repeat_kv(k).mT + q @ repeat_kv(k2).mT).softmax(-1) @ repeat_kv(v), k, v, k2

    assert refused(f, *qkv(), *past(), torch.randn_like(qkv()[1]), past()[0]) == [Reason.AMBIGUOUS]


def test_keys_multiplied_by_a_number():
    def f(q, k, v, pk, pv):
        k, v = joined(k, v, pk, pv)
        return (q @ repeat_kv(k * 0.5).mT).softmax(-1) @ repeat_kv(v), k, v

    assert len(cached(f, *qkv(), *past()).keys.scales) == 1


@pytest.mark.parametrize(
    "equation",
    ["bhnd,bhsd->bhns", "bhnd,bhsd->nsbh", "bhnd, bhsd -> bhsn"],
)
def test_einsum_is_a_product(equation):
    graph = normalized(lambda q, k: torch.einsum(equation, q, k), *qkv(heads=H)[:2]).graph_module.graph
    (product,) = [p for node in graph.nodes if (p := product_of(node)) is not None]
    value = product.node.meta["val"]
    for axis, (left, right) in enumerate(product.out):
        operand, at = (product.left, left) if left is not None else (product.right, right)
        assert operand.meta["val"].shape[at] == value.shape[axis]
    assert product.contracted == (3, 3)


# ------------------------------------------------------------------ not attention


def nothing_found(f, *inputs):
    assert not find_attention(normalized(f, *inputs).graph_module)


def test_linear_attention():
    nothing_found(lambda q, k, v: q.softmax(-1) @ (k.mT.softmax(-1) @ v), *qkv(heads=H))


def test_experts():
    """A router's softmax picks experts; no later product sums over the softmax's axis."""

    def f(x, router, experts):
        weights = (x @ router).softmax(-1)
        return torch.einsum("te,tef->tf", weights, torch.einsum("td,edf->tef", x, experts))

    nothing_found(f, torch.randn(5, D), torch.randn(D, 4), torch.randn(4, D, 6))


def test_softmax_along_the_queries():
    nothing_found(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, *qkv(heads=H))


def test_no_softmax():
    nothing_found(lambda q, k, v: (q @ k.mT).relu() @ v, *qkv(heads=H))


def test_repeated_heads_alone():
    nothing_found(lambda k: repeat_kv(k), torch.randn(2, H, N, D))


def test_without_a_cache():
    assert refused(lambda q, k, v: written_out(q, k.sin(), v), *qkv()) == [Reason.NOT_CACHED]


def test_a_key_that_escapes():
    def f(q, k, v, pk, pv):
        k, v = joined(k, v, pk, pv)
        return written_out(q, k, v), k.norm(dim=-1), k, v

    assert refused(f, *qkv(), *past()) == [Reason.KEY_ESCAPES]


def test_a_cached_key_that_is_rotated_later():
    def f(q, k, v, pk, pv, cos, sin):
        k, v = joined(k, v, pk, pv)
        half = torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1)
        return written_out(q, k * cos + half * sin, v), k, v

    cos, sin = torch.randn(N + P, D), torch.randn(N + P, D)
    assert len(refused(f, *qkv(), *past(), cos, sin)) == 1


def test_dropout():
    def f(q, k, v, pk, pv):
        k, v = joined(k, v, pk, pv)
        p = torch.nn.functional.dropout((q @ repeat_kv(k).mT).softmax(-1), 0.1, training=True)
        return p @ repeat_kv(v), k, v

    assert refused(f, *qkv(), *past()) == [Reason.DROPOUT]


def test_keys_normalized_along_another_axis_of_the_product():
    """Softmax and values both run along the batch: no axis here is tokens."""

    def f(q, k, v):
        return torch.einsum("bhns,bhsd->hnsd", torch.einsum("bhnd,bhsd->bhns", q, k).softmax(0), v)

    nothing_found(f, *qkv(heads=H))
