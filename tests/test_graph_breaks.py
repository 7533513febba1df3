"""Graph breaks within a layer, between its projection, its cache and its attention, against the oracle."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import Rules, Trio, tokens
from models import PastDecoder, Projections, randomize

from think_compile import ThinkWarning, report
from think_compile.api import _backends
from think_compile.passes.refusal import Reason


class BrokenBehindTheProjection(Projections):
    """The first call's keys enter the attention's graph whole, and leave it with their axes moved."""

    def forward(self, x, pos, past, mask):
        q, k, v = self.project(x, pos)
        torch._dynamo.graph_break()
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.attended(q, k, v, mask), (k, v)

    def attended(self, q, k, v, mask):
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class StayBehind(BrokenBehindTheProjection):
    """The caller keeps the input tensors themselves; the attention's graph does not show that."""

    def forward(self, x, pos, past, mask):
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        torch._dynamo.graph_break()
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.attended(q, k, v, mask), (k, v)


class JoinedToNothing(BrokenBehindTheProjection):
    """They join an empty cache."""

    def forward(self, x, pos, past, mask):
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        torch._dynamo.graph_break()
        past = [torch.tensor([])] * 2 if past is None else past
        k, v = torch.cat([past[0], k], dim=-2), torch.cat([past[1], v], dim=-2)
        return self.attended(q, k, v, mask), (k, v)


class BrokenBehindTheJoin(BrokenBehindTheProjection):
    """The attention's graph does not show whether the caller keeps the keys."""

    def forward(self, x, pos, past, mask):
        q, k, v = (t.transpose(1, 2) for t in self.project(x, pos))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        torch._dynamo.graph_break()
        return self.attended(q, k, v, mask), (k, v)


@pytest.fixture
def decoder(monkeypatch):
    """A model made of these attentions."""

    def make(attention):
        monkeypatch.setitem(PastDecoder.sequence_dim, attention, 2)
        return randomize(PastDecoder(attention))

    return make


@pytest.mark.parametrize("ratio", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("attention", [BrokenBehindTheProjection, JoinedToNothing])
@torch.no_grad()
def test_a_first_call_in_two_graphs(decoder, attention, ratio):
    trio = Trio("tuple_cat", Rules(ratio), model=decoder(attention))
    trio.run(tokens(2, 24), [12, 1, 1, 6, 4])
    trio.check_handles(2)
    assert not report(trio.model).refused


@pytest.mark.versions
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@torch.no_grad()
def test_keys_that_stay_behind_as_they_came(decoder, ratio):
    """The later call that joins them packs them, with the channels chosen by the first call."""
    trio = Trio("tuple_cat", Rules(ratio), model=decoder(StayBehind))
    ids = tokens(2, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ThinkWarning)
        trio.step(ids[:, :12])
        trio.check_handles(0)
        assert {record.reason for record in report(trio.model).refused} == {Reason.NO_JOIN_SEEN}
        trio.run(ids[:, 12:], [1, 1, 6, 4])
        trio.check_handles(2)
        assert report(trio.model).rewritten and not report(trio.model).refused
        trio.begin().step(ids[:, :10])  # another conversation
        trio.run(ids[:, 10:12], [1, 1])
    assert not report(trio.model).refused and "densely" not in report(trio.model).rewritten[0].detail


@torch.no_grad()
def test_keys_that_are_written_to_before_they_are_joined(decoder):
    """Their channels are chosen again: the keys behind the first choice are gone."""
    trio = Trio("tuple_cat", Rules(), model=decoder(StayBehind))
    ids = tokens(2, 16)
    trio.step(ids[:, :12])
    notes = dict(_backends[trio.model].pending.notes.items())
    assert len(notes) == 4  # keys and values of two layers
    for keys, _ in trio.got.past:
        keys.mul_(torch.linspace(0, 2, keys.shape[-1]))
    before = [note.chosen["channels"] for note in notes.values() if note.chosen]
    trio.got.step(ids[:, 12:13])
    now = [keys.store.own["channels"] for keys, _ in trio.got.past]
    assert not any(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@pytest.mark.filterwarnings("ignore::think_compile.ThinkWarning")
@torch.no_grad()
def test_a_break_between_join_and_attention(decoder):
    """Every call gives the plain model's output."""
    trio = Trio("tuple_cat", Rules(0.5), model=decoder(BrokenBehindTheJoin))
    plain, past = trio.plain, None
    for ids in tokens(2, 17).split([12, 1, 4], dim=1):
        got = trio.got.step(ids)
        total = trio.got.length
        mask = (torch.arange(total) <= torch.arange(total - ids.shape[1], total)[:, None])[None, None]
        expected, past = plain(ids, past, mask)
        torch.testing.assert_close(got, expected)
    trio.check_handles(0)
    assert {record.reason for record in report(trio.model).refused} == {Reason.NO_JOIN_SEEN}
