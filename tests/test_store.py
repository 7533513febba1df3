"""Packed stores alone: capacity, growth, growing rings, owners of rows, bytes."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import DIM, HEADS, drawn, first_call, format_of

from think_compile.cache.packed import Packed
from think_compile.cache.state import Span, capacity_for
from think_compile.cache.store import Dense
from think_compile.report import _stored

RECENT = 3


def keys(length=7, batch=2, recent=RECENT, prune_generated=True) -> Packed:
    return first_call(format_of(recent, prune_generated), *drawn(batch, length))[0]


def values(length=7, batch=2) -> Packed:
    return first_call(format_of(RECENT), *drawn(batch, length))[1]


def fixed(size=12, length=7, recent=RECENT) -> tuple[Packed, Packed]:
    q, k, _ = drawn(2, length)
    return first_call(format_of(recent), q, k, k, size)


BOTH = pytest.mark.parametrize("make", [keys, values])


def address(store):
    return store.rows.parts["rows"].data_ptr()


def new(n, batch=2):
    return torch.randn(batch, HEADS, n, DIM)


@BOTH
@pytest.mark.parametrize("n", [0, 1, 5, 40, 1000])
def test_reserve_makes_room_and_keeps_the_tokens(make, n):
    store = make()
    before = store.dense()
    room = store.reserve(n)
    assert room.rows.capacity >= store.length + n
    assert room.length == store.length
    assert torch.equal(room.dense(), before)
    assert room.reserve(n) is room


@BOTH
def test_reserve_within_capacity_is_the_store_itself(make):
    store = make()
    assert store.reserve(store.rows.capacity - store.length - 1) is store  # one row stays free
    assert store.reserve(store.rows.capacity - store.length) is not store


@BOTH
def test_growth_is_amortised(make):
    """Few copies over many one-token appends, and little spare memory."""
    store, copies, moved = make(length=1000), 0, 0
    for _ in range(400):
        before = address(store)
        store = store.append(new(1))
        if address(store) != before:
            copies, moved = copies + 1, moved + store.length
        assert store.rows.capacity <= store.length * 1.05 + 32
    assert store.length == 1400
    assert copies <= 400 / 16 + 1


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 1000, 4096, 100_000])
def test_capacity_for(length):
    capacity = capacity_for(length)
    assert capacity > length
    assert capacity % 16 == 0
    assert capacity <= length + length // 64 + 32
    assert capacity_for(length + 1) >= capacity


@BOTH
def test_append_leaves_the_older_store_alone(make):
    old = make()
    before = old.dense()
    newer = old.append(new(2))
    assert newer.rows is old.rows
    branch = old.append(new(3))
    assert branch.rows is not old.rows
    again = branch.crop(8).append(new(1))
    kept = [newer.dense(), branch.dense(), again.dense()]
    grown = [newer.append(new(30)), branch.append(new(1)), again.append(new(1))]
    assert torch.equal(old.dense(), before)
    assert all(torch.equal(s.dense(), d) for s, d in zip([newer, branch, again], kept, strict=True))
    assert [s.length for s in grown] == [39, 11, 10]


@BOTH
def test_free_above(make):
    store = make()
    rows = store.rows
    assert rows.free_above(7, store)
    newer = store.append(new(1))
    assert newer.rows is rows
    assert not rows.free_above(7, store)
    assert rows.free_above(8, newer)
    assert rows.free_above(8, store)
    del newer
    gc.collect()
    assert rows.free_above(7, store)
    shorter = store.crop(3)
    assert not rows.free_above(3, shorter)
    assert rows.free_above(7, store)


@BOTH
def test_a_failed_append_changes_nothing(make):
    store = make()
    before = store.dense()
    for wrong in (torch.randn(2, HEADS + 1, 1, DIM), torch.randn(3, HEADS, 1, DIM)):
        with pytest.raises((RuntimeError, IndexError)):
            store.append(wrong)
    assert torch.equal(store.dense(), before)


@BOTH
def test_map_batch_owns_its_rows(make):
    store = make()
    picked = store.map_batch(lambda t: t.index_select(0, torch.tensor([1, 1, 0])))
    before = store.dense()
    assert torch.equal(picked.dense(), before[[1, 1, 0]])
    picked = picked.append(new(1, 3))
    assert torch.equal(store.dense(), before)
    assert picked.logical_shape == (3, HEADS, 8, DIM)


@pytest.mark.parametrize("recent", [0, 1, 3, 30])
@pytest.mark.parametrize("call", [1, 2, 7, 40])
def test_ring_grows_without_prune_generated(recent, call):
    """Every token after the first call stays whole, for calls of any size."""
    store = keys(length=12, recent=recent, prune_generated=False)
    expected, floor = store.dense(), store.counters.window_start
    for _ in range(max(3, 100 // call)):
        rows = new(call)
        store = store.append(rows)
        expected = torch.cat([expected, rows], 2)
        assert store.counters.window_start == floor, f"at {store.length}"
        assert torch.equal(store.dense(), expected), f"at {store.length}"


@pytest.mark.parametrize("recent", [0, 1, 3, 30])
@pytest.mark.parametrize("call", [1, 2, 7, 40])
def test_window_moves_with_prune_generated(recent, call):
    store = keys(length=12, recent=recent)
    whole = torch.full((2, HEADS, 12, DIM), torch.nan)
    whole[:, :, store.counters.window_start :] = store.dense()[:, :, store.counters.window_start :]
    stays = torch.zeros(2, HEADS, DIM, dtype=torch.bool).scatter_(-1, store.own["channels"].long(), True)
    old = store.dense()[:, :, : store.counters.window_start]
    for _ in range(max(3, 60 // call)):
        rows = new(call)
        before, store, whole = store, store.append(rows), torch.cat([whole, rows], 2)
        assert torch.equal(store.dense()[:, :, :-call], before.settled().dense())  # the next reader sees the window
        assert torch.equal(store.dense()[:, :, -call:], rows)
        settled = store.settled()
        got = settled.dense()
        floor = max(0, store.length - recent, 12 - recent)
        assert settled.counters.window_start == floor
        assert torch.equal(got[:, :, floor:], whole[:, :, floor:])
        assert torch.equal(got[:, :, : old.shape[2]], old)
        gone = got[:, :, max(0, 12 - recent) : floor]
        expected = whole[:, :, max(0, 12 - recent) : floor].masked_fill(~stays[:, :, None], 0)
        assert torch.equal(gone, expected)
        assert settled.own["ring"].shape[2] == recent + 1


def test_crop_keeps_the_window_where_it_was():
    store = keys(length=12, recent=4)
    cropped = [store.crop(length).counters.window_start for length in (12, 10, 5)]
    assert cropped == [8, 8, 5]
    assert torch.equal(store.crop(10).dense(), store.dense()[:, :, :10])


def test_bytes_are_those_of_the_tensors():
    store, other = keys(), values()
    rows, ring, channels = 2 * HEADS * 32 * 4 * 4, 2 * HEADS * 4 * DIM * 4, 2 * HEADS * 4 * 2
    assert sum(t.nbytes for t in store.tensors()) == rows + ring + channels
    assert sum(t.nbytes for t in other.tensors()) == 2 * HEADS * 32 * DIM * 4
    key, value = fixed()
    assert sum(t.nbytes for t in key.tensors()) == 2 * HEADS * 12 * 4 * 4 + ring + channels + 3 * 8
    assert sum(t.nbytes for t in value.tensors()) == 2 * HEADS * 12 * DIM * 4


def test_shared_rows_count_once():
    store = values()
    newer = store.append(new(1))
    assert sum(_stored([store, newer]).values()) == store.rows.parts["rows"].untyped_storage().nbytes()


def test_fixed_clear():
    key, value = fixed()
    addresses = [t.data_ptr() for t in (*key.tensors(), *value.tensors())]
    key.clear()
    value.clear()
    assert addresses == [t.data_ptr() for t in (*key.tensors(), *value.tensors())]
    assert not key.dense().any()
    assert not value.dense().any()
    assert key.own["counters"].tolist() == [0, 0, 0]


def test_fixed_dense():
    key, value = fixed()
    got = key.dense()
    assert got.shape == (2, HEADS, 12, DIM) == key.logical_shape
    stays = torch.zeros(2, HEADS, DIM, dtype=torch.bool).scatter_(-1, key.own["channels"].long(), True)
    whole = value.dense()  # made of the same numbers
    assert torch.equal(got[:, :, 4:7], whole[:, :, 4:7])
    assert torch.equal(got[:, :, :4], whole[:, :, :4].masked_fill(~stays[:, :, None], 0))
    assert not got[:, :, 7:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_keeps_indices(dtype):
    for store in (keys(), values(), *fixed()):
        moved = store.to(store.device, dtype)
        assert moved.dtype == dtype
        assert torch.equal(moved.dense(), store.dense().to(dtype))
        assert moved.rows is not store.rows
        for name, kept in (("channels", torch.int16), ("counters", torch.int64)):
            if name in store.own:
                assert moved.own[name].dtype == kept
                moved.own[name].zero_()
                assert store.own[name].any()


@pytest.mark.parametrize("make", [keys, values, lambda: fixed()[0], lambda: fixed()[1]])
def test_stores_can_be_pickled(make):
    store = make()
    assert torch.equal(pickle.loads(pickle.dumps(store)).dense(), store.dense())
    assert torch.equal(copy.deepcopy(store).dense(), store.dense())


def test_dense_store():
    store = Dense.of(torch.randn(2, HEADS, 5, DIM))
    assert store.logical_shape == (2, HEADS, 5, DIM)
    assert torch.equal(store.map_batch(lambda t: t[:1]).dense(), store.dense()[:1])


# ------------------------------------------------------------------ bounded windows


def call(store, k_new):
    """Appends like a compiled call: rows written in place, a new ring, the window moved."""
    n_new = k_new.shape[2]
    room = store.reserve(n_new)
    span = Span(room.end, room.counters.oldest, room.length + n_new)
    left = room.side.append(k_new, {}, room.stored(), span)
    return room.appended(left, n_new)


class Window:
    """The dense equivalent of a bounded store: its tokens, whole, and how many of the first are pruned."""

    def __init__(self, store, whole):
        self.stays = torch.zeros(whole.shape[0], HEADS, DIM, dtype=torch.bool)
        self.stays.scatter_(-1, store.own["channels"].long(), True)
        self.whole, self.pruned, self.recent = whole, store.counters.window_start, store.side.recent
        self.moves = store.side.encodes_later

    def settle(self):
        if self.moves:
            self.pruned = max(self.pruned, self.whole.shape[2] - self.recent)

    def dense(self):
        old = torch.arange(self.whole.shape[2]) < self.pruned
        return self.whole.masked_fill(old[:, None] & ~self.stays[:, :, None], 0)

    def last(self, length):
        self.pruned = max(0, self.pruned - (self.whole.shape[2] - length))
        self.whole = self.whole[:, :, -length:]


def whole_keys(length, recent, prune_generated):
    k = torch.randn(2, HEADS, length, DIM)
    store, _ = first_call(format_of(recent, prune_generated), k, k, k)
    return store, Window(store, k)


STEPS = st.lists(st.tuples(st.sampled_from(["call", "append", "crop", "pick"]), st.integers(1, 30)), max_size=25)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(first=st.integers(1, 40), size=st.integers(1, 24), recent=st.integers(0, 12), moves=st.booleans(), walk=STEPS)
def test_a_window_of_any_size(first, size, recent, moves, walk):
    """Calls, joins outside of graphs, crops and selections, each cut to the window; older stores do not change."""
    store, window = whole_keys(first, recent, moves)
    store, history = store.tail(min(size, first)), []
    window.last(min(size, first))
    for what, n in walk:
        history = [*history[-3:], (store, store.dense())]
        if what == "crop":
            n = max(1, store.length - n)
            store, window.whole = store.crop(n), window.whole[:, :, :n]
            window.pruned = min(window.pruned, n)
        elif what == "pick":
            order = torch.tensor([n % 2, 1])
            store = store.map_batch(lambda t, order=order: t.index_select(0, order))
            window.whole, window.stays = window.whole[order], window.stays[order]
        else:
            k_new = new(n)
            window.settle()
            window.whole = torch.cat([window.whole, k_new], 2)
            store = call(store, k_new) if what == "call" else store.append(k_new)
            if what == "call":
                window.settle()
            length = min(size, store.length)
            store = store.tail(length)
            window.last(length)
        assert torch.equal(store.dense(), window.dense())
        assert store.rows.capacity <= 2 * capacity_for(max(size, first)) + capacity_for(30)
    assert all(torch.equal(older.dense(), was) for older, was in history)


@BOTH
def test_the_rows_of_a_full_window_are_used_again(make):
    """No growth over many steps, few copies, and each copy in the order of the tokens."""
    store, copies = make(length=40).tail(30), 0
    for i in range(400):
        rows = store.rows
        store = store.append(new(1)).tail(30)
        copies += store.rows is not rows
        assert store.rows.capacity <= capacity_for(40)
        assert store.length == 30, i
    assert copies <= 400 / 16 + 1


@BOTH
def test_a_long_call_does_not_leave_its_rows_to_a_window(make):
    store = make(length=20)
    store = store.append(new(500)).tail(20)
    assert store.rows.capacity == capacity_for(20)
    assert store.counters.oldest == 0


# ------------------------------------------------------------------ buffers in a circle


@pytest.mark.parametrize("recent", [0, 3, 30])
def test_a_buffer_in_a_circle_and_back(recent):
    """A full cache of fixed size continues as a circular buffer, and can be written at positions again."""
    size, tokens = 6, 17
    q, k, v = drawn(2, tokens)
    form = format_of(recent)
    key, value = first_call(form, q[:, :, :size], k[:, :, :size], v[:, :, :size], size)
    stays = torch.zeros(2, HEADS, DIM, dtype=torch.bool).scatter_(-1, key.own["channels"].long(), True)
    key.roll(), value.roll()
    for start in range(size, tokens, 3):
        rows = slice(start, start + 3)
        span = Span(torch.tensor(start), torch.tensor(start - size), size, rolling=True)
        key.side.append(k[:, :, rows], {}, key.stored(), span)
        value.side.append(v[:, :, rows], {}, value.stored(), span)
        end = min(start + 3, tokens)
        whole = torch.arange(end - size, end) >= end - recent
        pruned = k[:, :, end - size : end].masked_fill(~(stays[:, :, None] | whole[:, None]), 0)
        assert torch.equal(key.dense(), pruned)
        assert torch.equal(value.dense(), v[:, :, end - size : end])
    for store in (key, value):
        before = store.dense()
        store.unroll()
        assert not store.rolling and all(counters[2] == 0 for name, counters in store.own.items() if name == "counters")
        assert torch.equal(store.dense(), before)
        assert sorted(store.state) == sorted(part.name for part in store.side.parts(fixed=True))
        assert torch.equal(store.to(store.device, torch.float64).dense(), before.double())
        assert torch.equal(store.map_batch(lambda x: x[:1]).dense(), before[:1])
    assert torch.equal(value.rows.parts["rows"], v[:, :, -size:])
