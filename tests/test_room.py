"""Caches of fixed size that are full: a call that would write behind the end does not run."""

import pytest
import torch
import torch.nn.functional as F
from oracle import CACHE
from tiny import tiny_llama
from torch import nn
from transformers import StaticCache

from think_compile import CacheFull, report, think_compile
from think_compile.store import FixedKeys

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
    with pytest.raises(CacheFull, match=f"{ROOM} tokens was to take {too_many} more behind {sum(fitting)}"):
        model(torch.randint(0, 60, (2, too_many)), **{CACHE: cache})
    after, still = contents(cache)
    assert all(map(torch.equal, keys, after)) and counted == still
    cache.reset()
    model(torch.randint(0, 60, (2, 9)), **{CACHE: cache})
    assert {layer.keys.store.written for layer in cache.layers} == {9}


class Buffered(nn.Module):
    """Writes where it is told, also into a buffer that is full, from its beginning again."""

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
    assert len(report(ours).rewritten) == 1 and isinstance(ours.k.store, FixedKeys)
    with pytest.raises(CacheFull, match="was to take 5 more behind 8"):
        ours(torch.randn(2, 5, 32), torch.arange(8, 13))
