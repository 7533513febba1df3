"""The report's current state: live caches, their layers, and their rank."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from compare import tokens
from models import build, own, session
from oracle import CACHE
from torch import nn
from transformers import StaticCache

from think_compile import report, think_compile
from think_compile.cache.handle import Handle

SMALL = {"recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}


def wrapped(name="tuple_cat", **options):
    return think_compile(build(name), **{**SMALL, **options})


def talk(name, model, ids, calls):
    conversation = session(name, model)
    with torch.no_grad():
        for part in ids.split(calls, dim=1):
            conversation.step(part)
    return conversation


def bytes_of(*caches):
    """Bytes of the distinct tensors in handles."""
    tensors = {t.data_ptr(): t.nbytes for cache in caches for t in cache.store.tensors()}
    return sum(tensors.values())


def test_caches_in_buffers_are_counted():
    model = wrapped("buffer_index_put")
    talk("buffer_index_put", model, tokens(3, 11), [9, 1, 1])
    layers = [layer.attention for layer in model.layers]
    assert report(model).stored_key_bytes == bytes_of(*(layer.cache_k for layer in layers)) > 0
    assert report(model).stored_value_bytes == bytes_of(*(layer.cache_v for layer in layers)) > 0


@torch.no_grad()
def test_caches_that_are_made_before_the_first_call_are_counted():
    model = wrapped("llama")
    cache = StaticCache(config=model.config, max_cache_len=32)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    cache.early_initialization(2, heads, dim, torch.float32, model.device)
    model(tokens(2, 9), **{CACHE: cache})
    assert report(model).stored_key_bytes == bytes_of(*(layer.keys for layer in cache.layers)) > 0


@torch.no_grad()
def test_reordered_caches_are_counted_and_those_they_replace_are_not():
    model = wrapped("llama")
    cache = model(tokens(2, 9), use_cache=True)[CACHE]
    before = report(model)
    cache.reorder_cache(torch.tensor([1, 0]))
    for _ in range(2):
        gc.collect()
        now = report(model)
        assert now.stored_bytes == bytes_of(*(t for layer in cache.layers for t in (layer.keys, layer.values)))
        assert now.dense_key_bytes >= before.dense_key_bytes
        model(tokens(2, 1), **{CACHE: cache})


def test_a_cache_that_became_dense_counts_as_it_is():
    model = wrapped()
    conversation = talk("tuple_cat", model, tokens(2, 9), [9])
    (first, _), (second, _) = conversation.past
    first.mul_(1.0)
    assert first.is_dense and not second.is_dense
    found = report(model)
    assert found.stored_key_bytes == 2 * 2 * 9 * 32 * 4 + bytes_of(second)
    assert found.dense_key_bytes == 2 * (2 * 2 * 9 * 32 * 4)


def test_copies_are_counted_and_loaded_ones_once_they_are_used():
    model = wrapped()
    conversation = talk("tuple_cat", model, tokens(2, 9), [9])
    alone = report(model).stored_bytes
    twin = copy.deepcopy(conversation.past)
    assert report(model).stored_bytes == 2 * alone
    del twin
    gc.collect()
    assert report(model).stored_bytes == alone


class TwoLayouts(nn.Module):
    """Returns its keys in two layouts: two views of one cache."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x, past=None):
        q, k, v = torch.unflatten(self.project(x), -1, (6, 8)).transpose(1, 2).split(2, 1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v), (k, v), k.transpose(1, 2)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@torch.no_grad()
def test_a_cache_that_leaves_in_two_layouts_is_one(ratio):
    plain = TwoLayouts()
    model = think_compile(copy.deepcopy(plain), ratio, **SMALL)
    x = torch.randn(1, 9, 16)
    (_, past, view), (_, plain_past, plain_view) = model(x), plain(x)
    for keys, other in ((past[0], view), (plain_past[0], plain_view)):
        keys[:, :, 3] = 7
        assert (other[:, 3] == 7).all()
        other[:, 4] = 8
        assert (keys[:, :, 4] == 8).all()
    if not ratio:
        torch.testing.assert_close(view.dense(), plain_view)
    assert report(model).stored_key_bytes == 9 * 16 * 4


class Twins(nn.Module):
    """Two attentions of one module; a second call also reads one of their caches elsewhere."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x, pasts=None):
        q, k, v = torch.unflatten(self.project(x), -1, (6, 8)).transpose(1, 2).split(2, 1)
        first, second = (k, v), (2 * k, 3 * v)
        extra = 0
        if pasts is not None:
            extra = pasts[1][0].mean()
            first, second = (
                tuple(torch.cat(pair, 2) for pair in zip(*two, strict=True))
                for two in zip(pasts, (first, second), strict=True)
            )
        mask = torch.ones(x.shape[1], first[0].shape[2], dtype=torch.bool).tril(first[0].shape[2] - x.shape[1])
        out = sum(F.scaled_dot_product_attention(q, *kv, attn_mask=mask) for kv in (first, second))
        return out + extra, (first, second)


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
@torch.no_grad()
def test_two_attentions_of_one_module_are_told_apart():
    model = think_compile(Twins(), 0.5, **SMALL)
    _, pasts = model(torch.randn(1, 9, 16))
    assert len({record.layer for record in report(model).rewritten}) == 2
    for _ in range(2):
        _, pasts = model(torch.randn(1, 1, 16), pasts)
    found = report(model)
    assert (len(found.rewritten), len(found.refused)) == (1, 1)
    _, pasts = model(torch.randn(1, 9, 16))
    assert [isinstance(keys, Handle) for keys, _ in pasts] == [True, False]


def test_layers_behind_accelerates_hooks_are_told_apart():
    model = own("tuple_cat")
    for layer in model.layers:
        for module in (layer.attention, *layer.attention.children()):
            add_hook_to_module(module, AlignDevicesHook(execution_device=torch.get_default_device()))
    think_compile(model, **SMALL)
    talk("tuple_cat", model, tokens(1, 11), [9, 1, 1])
    assert {record.layer for record in report(model).rewritten} == {"layers.0.attention", "layers.1.attention"}


def test_one_rank_of_several_says_so(monkeypatch):
    model = wrapped()
    assert report(model).rank is None and "rank" not in str(report(model))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert report(model).rank == (1, 2) and "this rank, 1 of 2" in str(report(model))


# ------------------------------------------------------------------ windows of one length and several histories


@torch.no_grad()
def test_layers_of_one_length_whose_windows_differ_each_read_their_own():
    """The second layer's cache was two tokens longer and then cropped: it has two fewer whole keys than the first."""
    ids, plain, model = tokens(1, 16), own("tuple_cat"), wrapped()
    grown = talk("tuple_cat", model, ids[:, :12], [9, 1, 1, 1])
    longer = talk("tuple_cat", model, ids[:, :14], [9, 1, 1, 1, 1, 1])
    mixed = grown.past[0], tuple(t[:, :, :12] for t in longer.past[1])
    dense = tuple(tuple(t.dense() for t in layer) for layer in mixed)
    assert mixed[0][0].store.counters.window_start < mixed[1][0].store.counters.window_start
    conversation, reference = session("tuple_cat", model), session("tuple_cat", plain)
    conversation.past, reference.past = mixed, dense
    for talking in (conversation, reference):
        talking.length = 12
    torch.testing.assert_close(conversation.step(ids[:, 12:13]), reference.step(ids[:, 12:13]), rtol=1e-4, atol=1e-4)
