"""First calls on a fixed-size cache made by the graph: they read only their own rows, if the mask hides all others."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import Rules, Trio, padding, tokens
from models import hugging_face, randomize
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from think_compile import report, think_compile
from think_compile.passes.refusal import Reason
from think_compile.runtime import lower

HEADS, KV_HEADS, DIM, ROWS, NEW = 4, 2, 8, 24, 9


class Fixed(nn.Module):
    """One layer; ``see`` makes the mask from the positions of queries [N, 1] and rows [S]."""

    def __init__(self, see=None, *, causal=False, grouped=False, make=torch.Tensor.new_zeros):
        super().__init__()
        self.project = nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM)
        self.see, self.causal, self.grouped, self.make = see, causal, grouped, make

    def forward(self, x, pos, past=None):
        heads = torch.unflatten(self.project(x), -1, (-1, DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        if past is None:
            past = [self.make(x, (x.shape[0], KV_HEADS, ROWS, DIM)) for _ in range(2)]
        k, v = (before.index_copy(2, pos, new) for before, new in zip(past, (k, v), strict=True))
        mask = self.see(pos[:, None], torch.arange(ROWS, device=x.device)) if self.see else None
        repeated = (k, v) if self.grouped else (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, *repeated, mask, is_causal=self.causal, enable_gqa=self.grouped)
        return out, (k, v)


def added(allowed):
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)


SEE = {
    "bool": lambda query, row: row <= query,
    "float": lambda query, row: added(row <= query),
    "bool hiding a query's all": lambda query, row: (row <= query) & (row > 0),
}
SEE_MORE = {
    "all": lambda query, row: row < ROWS + query,
    "one row more": lambda query, row: row <= query + 1,
    "float, all": lambda query, row: added(row < ROWS + query),
    "float hiding a query's all": lambda query, row: added((row <= query) & (row > 0)),
    "float, small": lambda query, row: torch.where(row <= query, 0.0, -1e4),
    "NaN": lambda query, row: torch.where(row <= query, 0.0, float("nan")),
}


class Shapes(TorchDispatchMode):
    """The shapes of all new tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(t.shape) for t in (out if isinstance(out, (tuple, list)) else [out]) if hasattr(t, "shape")]
        return out


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of the rewritten graphs' tensors, op by op."""
    watch, run = Shapes(), lower.Eager.__call__

    def watched(self, args):
        with watch:
            return run(self, args)

    monkeypatch.setattr(lower.Eager, "__call__", watched)
    return watch.seen


def whole(shapes):
    """The number of tensors with the cache's rows in full width."""
    return sum(shape[-2:] == (ROWS, DIM) for shape in shapes)


def check(model, shapes, start=0):
    """Compares a first and a later call with the plain model; returns the number of full-width buffers of the first."""
    randomize(model)
    ours = think_compile(copy.deepcopy(model), ratio=0.0, channel_multiple=1, lowering="eager")
    x, pos = torch.randn(2, NEW, 16), torch.arange(start, start + NEW)
    got, past = ours(x, pos)
    expected, plain_past = model(x, pos)
    torch.testing.assert_close(got, expected, equal_nan=True)
    buffers = whole(shapes)
    for ours_now, plain_now in zip(past, plain_past, strict=True):
        torch.testing.assert_close(ours_now.dense(), plain_now)
    x, pos = torch.randn(2, 1, 16), torch.tensor([start + NEW])
    torch.testing.assert_close(ours(x, pos, past)[0], model(x, pos, plain_past)[0], equal_nan=True)
    assert len(report(ours).rewritten) == 1
    return buffers


KEYS_AND_VALUES = 2  # at ratio 0 keys are stored as wide as values


@pytest.mark.parametrize("grouped", [False, True], ids=["repeated", "grouped"])
@pytest.mark.parametrize("see", SEE)
@torch.no_grad()
def test_hidden_rows_are_not_read(see, grouped, shapes):
    assert check(Fixed(SEE[see], grouped=grouped), shapes) == KEYS_AND_VALUES


class Dealt(nn.Module):
    """``copies`` expands a cache of two heads for eight query heads, with or without ``enable_gqa``."""

    def __init__(self, copies, grouped):
        super().__init__()
        self.project = nn.Linear(16, (8 + 2 * KV_HEADS) * DIM)
        self.copies, self.grouped = copies, grouped

    def forward(self, x, pos, past=None):
        heads = torch.unflatten(self.project(x), -1, (-1, DIM)).transpose(1, 2)
        q, k, v = heads.split([8, KV_HEADS, KV_HEADS], 1)
        past = past or [x.new_zeros((x.shape[0], KV_HEADS, ROWS, DIM)) for _ in range(2)]
        k, v = (before.index_copy(2, pos, new) for before, new in zip(past, (k, v), strict=True))
        mask = SEE["bool"](pos[:, None], torch.arange(ROWS, device=x.device))
        out = F.scaled_dot_product_attention(q, self.copies(k), self.copies(v), mask, enable_gqa=self.grouped)
        return out, (k, v)


DEALT = {
    "grouped": (lambda x: x, True, True),
    "repeated": (lambda x: x.repeat_interleave(4, 1), False, True),
    "repeated, and said to be grouped": (lambda x: x.repeat_interleave(4, 1), True, True),
    "repeated in part": (lambda x: x.repeat_interleave(2, 1), True, True),
    "in turn": (lambda x: x.repeat(1, 4, 1, 1), False, False),
}
DEALT_BOTH_WAYS = {
    "in turn, then grouped": (lambda x: x.repeat(1, 2, 1, 1), True),
    "in turn, then side by side": (lambda x: x.repeat(1, 2, 1, 1).repeat_interleave(2, 1), False),
}


@pytest.mark.parametrize(("copies", "grouped", "own_rows"), DEALT.values(), ids=DEALT)
@torch.no_grad()
def test_heads_are_dealt_as_the_model_deals_them(copies, grouped, own_rows, shapes):
    assert (check(Dealt(copies, grouped), shapes) == KEYS_AND_VALUES) is own_rows


@pytest.mark.parametrize(("copies", "grouped"), DEALT_BOTH_WAYS.values(), ids=DEALT_BOTH_WAYS)
@torch.no_grad()
def test_heads_that_are_dealt_both_ways_are_refused(copies, grouped):
    model = randomize(Dealt(copies, grouped))
    ours, past, plain_past = think_compile(copy.deepcopy(model), ratio=0.0, lowering="eager"), None, None
    for pos in (torch.arange(NEW), torch.tensor([NEW])):
        x = torch.randn(2, len(pos), 16)
        (got, past), (expected, plain_past) = ours(x, pos, past), model(x, pos, plain_past)
        torch.testing.assert_close(got, expected)
    (record,) = report(ours).refused
    assert record.reason is Reason.UNKNOWN_LAYOUT and "repeated in turn and" in record.detail


@torch.no_grad()
def test_causal_calls_see_their_own_rows_only(shapes):
    assert check(Fixed(causal=True), shapes) == KEYS_AND_VALUES


@pytest.mark.parametrize("see", SEE_MORE)
@torch.no_grad()
def test_seen_rows_are_read(see, shapes):
    assert check(Fixed(SEE_MORE[see]), shapes) > KEYS_AND_VALUES


@torch.no_grad()
def test_without_a_mask_all_rows_are_read(shapes):
    assert check(Fixed(), shapes) > KEYS_AND_VALUES


@torch.no_grad()
def test_rows_before_the_call_are_read(shapes):
    assert check(Fixed(SEE["bool"]), shapes, start=3) > KEYS_AND_VALUES


@torch.no_grad()
def test_rows_that_hold_something_are_read(shapes):
    assert check(Fixed(SEE["bool"], make=lambda x, shape: torch.full(shape, 0.5)), shapes) > KEYS_AND_VALUES


@torch.no_grad()
def test_one_model_asks_anew_at_every_first_call(shapes):
    """The mask is an input: one call hides the other rows, the next does not."""
    model = think_compile(
        randomize(Fixed(lambda query, row: row < model.limit + 0 * query)), ratio=0.0, lowering="eager"
    )
    plain, x, pos = copy.deepcopy(model.project), torch.randn(2, NEW, 16), torch.arange(NEW)
    reference = Fixed(lambda query, row: row < model.limit + 0 * query)
    reference.project = plain
    for limit, few in [(NEW, True), (ROWS, False), (NEW, True)]:
        model.limit = torch.tensor(limit)
        shapes.clear()
        torch.testing.assert_close(model(x, pos)[0], reference(x, pos)[0])
        assert (whole(shapes) == KEYS_AND_VALUES) is few


@pytest.mark.parametrize("side", ["none", "left"])
@torch.no_grad()
def test_static_caches_of_transformers(side, shapes):
    """With a static cache twice as long as the prompt, only the values have a buffer of full length and width."""
    rules, prompt = Rules(0.5), 12
    plain = hugging_face("llama")
    trio = Trio("llama", rules, model=plain, cache=lambda: StaticCache(config=plain.config, max_cache_len=ROWS))
    real = padding(side, 2, prompt)
    trio.run(tokens(2, prompt), [prompt], real)
    assert sum(shape[-2:] == (ROWS, plain.config.head_dim) for shape in shapes) == plain.config.num_hidden_layers
    trio.run(tokens(2, 4), [1, 1, 2], None if real is None else torch.ones(2, 4, dtype=torch.long))
    trio.check_caches()
