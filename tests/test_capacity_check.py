"""Full caches: a call that would write past the end, or runs out of memory, changes nothing."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import CACHE
from tiny import tiny_llama
from torch import nn
from transformers import DynamicCache, StaticCache

from think_compile import CacheFull, ThinkWarning, report, think_compile
from think_compile.cache.packed import Packed
from think_compile.cache.rows import Rows
from think_compile.cache.state import capacity_for

ROOM = 12
RULES = {"recent": 2, "observe": 4, "channel_multiple": 1, "lowering": "eager"}


def contents(cache):
    return [layer.keys.dense().clone() for layer in cache.layers], [
        int(layer.cumulative_length) for layer in cache.layers
    ]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(8, 1, 1, 1, 1, 1), (8, 3, 2)])
def test_a_static_cache_that_is_full(lengths):
    model = think_compile(tiny_llama(), 0.5, **RULES)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    *fitting, too_many = lengths
    for length in fitting:
        model(torch.randint(0, 60, (2, length)), **{CACHE: cache})
    keys, counted = contents(cache)
    with pytest.raises(CacheFull, match=f"{ROOM} tokens was to take {too_many} more after {sum(fitting)}"):
        model(torch.randint(0, 60, (2, too_many)), **{CACHE: cache})
    after, still = contents(cache)
    assert all(map(torch.equal, keys, after)) and counted == still
    cache.reset()
    model(torch.randint(0, 60, (2, 9)), **{CACHE: cache})
    assert {layer.keys.store.written for layer in cache.layers} == {9}


class Buffered(nn.Module):
    """Writes at given positions, and starts over at the beginning of a full buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.register_buffer("k", torch.zeros(2, 2, ROOM, 16))
        self.register_buffer("v", torch.zeros(2, 2, ROOM, 16))

    def forward(self, x, positions):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.k[:, :, positions] = k
        self.v[:, :, positions] = v
        seen = torch.arange(ROOM) <= positions[:, None]
        return F.scaled_dot_product_attention(q, self.k, self.v, seen)


@torch.no_grad()
def test_a_buffer_that_is_written_from_its_beginning_again():
    plain = Buffered()
    ours = Buffered()
    ours.load_state_dict(plain.state_dict())
    think_compile(ours, 0, **RULES)
    for start, length in ((0, 8), (8, 2), (10, 1), (11, 1), (0, 9), (9, 1), (10, 2), (4, 3), (7, 1)):
        x, positions = torch.randn(2, length, 32), torch.arange(start, start + length)
        torch.testing.assert_close(ours(x, positions), plain(x, positions))
    assert len(report(ours).rewritten) == 1 and isinstance(ours.k.store, Packed)
    with pytest.raises(CacheFull, match="was to take 5 more after 8"):
        ours(torch.randn(2, 5, 32), torch.arange(8, 13))


class CostlyMask(Buffered):
    """Makes its mask from its projections, which are too expensive to compute twice."""

    def forward(self, x, positions):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.k[:, :, positions] = k
        self.v[:, :, positions] = v
        hidden = torch.where(torch.arange(ROOM) <= positions[:, None], 0.0, float("-inf"))
        return F.scaled_dot_product_attention(q, self.k, self.v, hidden + 0 * self.qkv(x).mean())


@torch.no_grad()
def test_a_full_buffer_is_found_whatever_its_mask_costs():
    ours = think_compile(CostlyMask(), 0, **RULES)
    for start, length in ((0, 8), (8, 4)):
        ours(torch.randn(2, length, 32), torch.arange(start, start + length))
    assert isinstance(ours.k.store, Packed)
    with pytest.raises(CacheFull, match="was to take 1 more after 12"):
        ours(torch.randn(2, 1, 32), torch.arange(12, 13))


class Ring(Buffered):
    """The caller chooses each token's row. All written rows are visible, in any order."""

    def forward(self, x, rows, written):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.k.index_copy_(2, rows, k)
        self.v.index_copy_(2, rows, v)
        seen = torch.arange(ROOM) < written
        return F.scaled_dot_product_attention(q, self.k, self.v, seen[None].expand(x.shape[1], ROOM))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_ring_whose_rows_are_told_from_outside(ratio):
    """The caller computes the remainder. Once that shows, pruned rows are read as they are, and none through the
    channels of others."""
    plain, ours = Ring(), Ring()
    ours.load_state_dict(plain.state_dict())
    think_compile(ours, ratio, **RULES)
    told = warnings.catch_warnings(record=True)
    with told as seen:
        warnings.simplefilter("always")
        for start in (0, *range(8, 30)):
            n = 8 if start == 0 else 1
            x, rows = torch.randn(2, n, 32), torch.arange(start, start + n) % ROOM
            got, expected = (model(x, rows, torch.tensor(start + n)) for model in (ours, plain))
            if ratio == 0 or start == 0:
                torch.testing.assert_close(got, expected)
            kept = ours.k.dense()[:, :, : start + n]
            true = plain.k[:, :, : start + n]
            assert ((kept == 0) | torch.isclose(kept, true, atol=1e-5)).all(), start
            if start < ROOM:
                assert isinstance(ours.k.store, Packed)
    assert [w for w in seen if "its rows are written again while those behind are read" in str(w.message)]
    assert not report(ours).rewritten and len(report(ours).refused) == 1
    assert (ours.k == plain.k).all() if ratio == 0 else (ours.k[:, :, :6] == plain.k[:, :, :6]).all()


class Unmasked(Buffered):
    """Reads all rows, with no mask."""

    def forward(self, x, rows, written):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.k.index_copy_(2, rows, k)
        self.v.index_copy_(2, rows, v)
        return F.scaled_dot_product_attention(q, self.k, self.v)


SINKS, WINDOW = 4, 5


def row_behind_sinks(token):
    """The first tokens stay; the other rows are a ring of the latest tokens."""
    return token if token < ROOM else SINKS + (token - ROOM) % (ROOM - SINKS)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Ring, Unmasked])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_a_ring_behind_attention_sinks_keeps_its_window(kind, ratio):
    """The first row is never overwritten. When another row is, the window's keys stay whole."""
    plain, ours = kind(), kind()
    ours.load_state_dict(plain.state_dict())
    think_compile(ours, ratio, **(RULES | {"recent": WINDOW}))
    told = pytest.warns(ThinkWarning, match="its rows are written again")
    for start in (0, *range(8, ROOM)):
        n = 8 if start == 0 else 1
        x, rows = torch.randn(2, n, 32), torch.arange(start, start + n)
        ours(x, rows, torch.tensor(start + n)), plain(x, rows, torch.tensor(start + n))
    assert isinstance(ours.k.store, Packed)
    whole = slice(ROOM - WINDOW, ROOM)
    torch.testing.assert_close(ours.k.dense()[:, :, whole], plain.k[:, :, whole])
    plain.k.copy_(ours.k.dense())  # with dropped channels zero, as the rule says
    with told:
        for token in range(ROOM, ROOM + 2 * (ROOM - SINKS) + 3):
            x, rows = torch.randn(2, 1, 32), torch.tensor([row_behind_sinks(token)])
            torch.testing.assert_close(*(model(x, rows, torch.tensor(ROOM)) for model in (ours, plain)))
    torch.testing.assert_close(ours.k, plain.k)


@torch.no_grad()
def test_memory_that_is_missing_while_a_cache_grows(monkeypatch):
    model, prompt = think_compile(tiny_llama(), 0.5, **RULES), 20
    ids = torch.randint(0, 60, (2, capacity_for(prompt) + 4))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    outputs = []
    for cache in caches:
        model(ids[:, :prompt], **{CACHE: cache})
    for at in range(prompt, ids.shape[1]):
        outputs = [model(ids[:, at : at + 1], **{CACHE: caches[0]}).logits]
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "copy", _out_of_memory)
            try:
                outputs.append(model(ids[:, at : at + 1], **{CACHE: caches[1]}).logits)
            except torch.OutOfMemoryError:
                failed = at
        if len(outputs) == 1:  # again, with memory
            outputs.append(model(ids[:, at : at + 1], **{CACHE: caches[1]}).logits)
        assert torch.equal(*outputs)
    assert failed == capacity_for(prompt) - 1


def _out_of_memory(*args):
    raise torch.OutOfMemoryError("made up")
