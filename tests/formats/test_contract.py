"""The promises of every format; :mod:`contract` has the list of formats."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from contract import FORMATS, HQ, B, D, H, begun, draw
from oracle import assert_close_to

from think_compile.cache.state import COUNTERS, Call, Prompt, Span, Stored
from think_compile.formats import attention
from think_compile.formats.seen import Seen


def _of(wanted):
    """The formats that satisfy ``wanted``."""
    chosen = {name: form for name, form in FORMATS.items() if wanted(form)}
    return pytest.mark.parametrize("form", chosen.values(), ids=chosen)


EVERY = _of(lambda form: True)
# If later tokens stay whole, the ring is as large as a cache of fixed size: test_calls rewinds that.
WINDOWED = _of(lambda form: form.keys.encodes_later)
ROLLING = _of(lambda form: form.keys.window_group == 1)
LOSSLESS = _of(lambda form: not form.is_lossy)
SIZE = 40
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where kernels are not interpreted


def shape_of(part, capacity, ring):
    return tuple({"B": B, "H": H, "C": capacity, "R": ring}.get(size, size) for size in part.shape)


def causal(n, length):
    return torch.arange(length) <= torch.arange(length - n, length)[:, None]


def stock(q, k, v, mask):
    k, v = (x.to(q.dtype).repeat_interleave(HQ // H, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask)


def called(form, sides, n, length, *, rolling=0, start=None):
    """The output of a call of ``n`` tokens after ``length``, and the expected one; ``sides`` store the call."""
    q, k, v = draw(n)
    (keys, k_sim), (values, v_sim) = sides
    fixed = not keys.grows
    begin = length if start is None else start
    mask, columns = causal(n, begin + n), begin + n
    if keys.grows:
        keys, values = keys.reserve(n), values.reserve(n)
        for simulated in (k_sim, v_sim):
            simulated.settle()
    for simulated in (k_sim, v_sim):
        simulated.crop(begin)
    dense = [torch.cat([one.dense(), new], 2) for one, new in ((k_sim, k), (v_sim, v))]
    expected = stock(q, *dense, mask)
    if fixed and not rolling:
        mask, columns = F.pad(mask, (0, SIZE - columns)), SIZE
    if rolling:
        oldest = begin + n - columns + max(0, begin - rolling)
        columns = begin + n - oldest
        mask, expected = mask[:, oldest:], stock(q, *(x[:, :, oldest:] for x in dense), mask[:, oldest:])
        span = Span(torch.tensor(begin), torch.tensor(oldest), columns, rolling=True)
    else:
        span = Span(torch.tensor(begin) if fixed else begin, 0, columns)
    out, left = form.step(Call(q, k, v, mask), keys.stored(), values.stored(), span)
    after = []
    for store, simulated, new, replaced in zip((keys, values), (k_sim, v_sim), (k, v), left, strict=True):
        simulated.append(new)
        after.append((store.appended(replaced, n) if store.grows else store, simulated))
    return out, expected, after


@EVERY
@pytest.mark.parametrize("size", [None, SIZE])
def test_the_parts_are_what_is_stored(form, size):
    for (store, _), of in zip(begun(form, 9, size), ("keys", "values"), strict=True):
        parts = form.side(of).parts(fixed=size is not None)
        assert sorted(store.state) == sorted(part.name for part in parts)
        ring = store.own["ring"].shape[2] if "ring" in store.own else 0
        for part in parts:
            tensor = store.state[part.name]
            assert tuple(tensor.shape) == shape_of(part, store.rows.capacity, ring), part.name
            assert tensor.dtype == (part.dtype or torch.float64) and tensor.is_contiguous()
        assert sum(t.nbytes for t in store.tensors()) == sum(store.state[part.name].nbytes for part in parts)


@EVERY
def test_encode_and_decode(form):
    for side in (form.keys, form.values):
        q, k, v = draw(8)
        chosen = side.codec.choose(Seen(q, k, v))
        state = side.codec.encode(k, chosen) | chosen
        decoded = side.codec.decode(state, D)
        assert decoded.shape == k.shape
        assert torch.equal(decoded, k) == (not side.is_lossy)
        again = side.codec.encode(decoded, chosen) | chosen
        close = {} if side.codec.group == 1 else {"rtol": 0, "atol": 0.01}  # a range in fp16 is rounded again
        torch.testing.assert_close(side.codec.decode(again, D), decoded, **close)
        queries = torch.randn(B, H, 3, D).double()
        torch.testing.assert_close(side.codec.scores(queries, state), queries @ decoded.to(queries.dtype).mT)


@EVERY
@pytest.mark.parametrize("length", [1, 4, 17])
@pytest.mark.parametrize("size", [None, SIZE])
def test_a_first_call_leaves_its_rows(form, length, size):
    for store, simulated in begun(form, length, size):
        assert torch.equal(store.dense()[:, :, :length], simulated.dense())
        assert store.logical_shape == (B, H, length if size is None else size, D)


@EVERY
@pytest.mark.parametrize("calls", [[9, 1, 1, 1, 1, 1, 1], [5, 3, 1, 20, 1, 2], [1, 1, 2, 17]], ids=str)
def test_steps_of_a_growing_cache(form, calls):
    sides, length = begun(form, calls[0]), calls[0]
    for n in calls[1:]:
        out, expected, sides = called(form, sides, n, length)
        torch.testing.assert_close(out, expected)
        length += n
        for store, simulated in sides:
            assert torch.equal(store.dense(), simulated.dense())


@EVERY
@pytest.mark.parametrize("calls", [[9, 1, 1, 1, 1, 1, 1], [5, 3, 1, 20, 1, 2]], ids=str)
def test_steps_of_a_cache_of_fixed_size(form, calls):
    sides, length = begun(form, calls[0], SIZE), calls[0]
    for n in calls[1:]:
        out, expected, sides = called(form, sides, n, length)
        torch.testing.assert_close(out, expected)
        length += n
        for store, simulated in sides:
            assert torch.equal(store.dense()[:, :, :length], simulated.dense())


@WINDOWED
@pytest.mark.parametrize("start", [21, 18, 12, 9, 4, 1])
def test_a_cache_of_fixed_size_is_rewound(form, start):
    sides = begun(form, 22, SIZE)
    for n, begin in ((1, 22), (2, start), (1, start + 2), (5, start + 3)):
        out, expected, sides = called(form, sides, n, begin, start=begin)
        torch.testing.assert_close(out, expected)
        for store, simulated in sides:
            assert torch.equal(store.dense()[:, :, : begin + n], simulated.dense())


@EVERY
def test_a_cache_of_fixed_size_begins_again(form):
    """A call that writes from the first row chooses again, like a first call."""
    stores = [store for store, _ in begun(form, 12, SIZE)]
    q, k, v = draw(7)
    mask = F.pad(causal(7, 7), (0, SIZE - 7))
    form.step(Call(q, k, v, mask), *(store.stored() for store in stores), Span(torch.tensor(0), 0, SIZE))
    fresh = form.first_call(Call(q, k, v), Prompt(capacity=SIZE))
    for store, state in zip(stores, fresh, strict=True):
        names = [part.name for part in store.side.parts(fixed=True) if not (part.is_rows or part.replaced)]
        assert all(torch.equal(store.own[name], state[name]) for name in names)
        if COUNTERS in state:
            assert torch.equal(store.own[COUNTERS], state[COUNTERS])
        assert torch.equal(
            store.dense()[:, :, :7], attention.dense(store.side, _stored(state), 0, 7, 7).to(store.dtype)
        )


def _stored(state):
    return Stored(state, state[COUNTERS][0] if COUNTERS in state else None)


@ROLLING
@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_full_buffer_goes_on_in_a_circle(form, n):
    sides = begun(form, 8, 8)
    for store, _ in sides:
        store.roll()
    length = 8
    for _ in range(4):
        out, expected, sides = called(form, sides, n, length, rolling=8)
        torch.testing.assert_close(out, expected)
        length += n
        for store, simulated in sides:
            assert torch.equal(store.dense(), simulated.dense()[:, :, -8:])


@EVERY
def test_what_caches_do_to_a_growing_store(form):
    """Joins outside of graphs, crops, the last tokens, selected sequences; each followed by a call."""
    sides, length = begun(form, 12), 12
    for what in ("append", "crop", "pick", "last", "copy", "pickle", "move"):
        after = []
        for store, simulated in sides:
            before = store.dense()
            if what == "append":
                new = torch.randn(B, H, 2, D).double()
                grown = store.append(new)
                simulated.settle()
                simulated.append(new, moves=False)
            elif what == "crop":
                grown = store.crop(length - 3)
                simulated.crop(length - 3)
            elif what == "pick":
                order = torch.tensor([1, 1])
                grown = store.map_batch(lambda x, order=order: x.index_select(0, order))
                simulated.pick(order)
            elif what == "last":
                grown = store.tail(length - 2)
                simulated.last(length - 2)
            elif what == "move":
                grown = store.moved(64)
            else:
                grown = copy.deepcopy(store) if what == "copy" else pickle.loads(pickle.dumps(store))
            assert torch.equal(grown.dense(), simulated.dense()), what
            assert torch.equal(store.dense(), before)
            after.append((grown, simulated))
        length = after[0][0].length
        if after[0][0].counters.oldest:
            after = [(store.from_zero(store.length + 8), simulated) for store, simulated in after]
        out, expected, sides = called(form, after, 1, length)
        torch.testing.assert_close(out, expected, msg=lambda m, what=what: f"{what}: {m}")
        length += 1


@EVERY
@pytest.mark.parametrize("n", [1, 3])
def test_a_cropped_token_leaves_nothing_behind(form, n):
    """Not even NaN, in the rows that the next tokens take."""
    sides = begun(form, 12)
    bad = torch.full((B, H, 4, D), torch.nan).double()
    after = [(store.append(bad).crop(12), simulated) for store, simulated in sides]
    del sides
    out, expected, after = called(form, after, n, 12)
    torch.testing.assert_close(out, expected)
    for store, simulated in after:
        assert torch.equal(store.dense(), simulated.dense())


@WINDOWED
@pytest.mark.parametrize("n", [1, 3])
def test_a_rewound_token_leaves_nothing_behind(form, n):
    """As above, in a cache of fixed size."""
    (keys, k_sim), (values, v_sim) = begun(form, 12, SIZE)
    q, _, _ = draw(n)
    bad = torch.full((B, H, n, D), torch.nan).double()
    mask, span = F.pad(causal(n, 12 + n), (0, SIZE - 12 - n)), Span(torch.tensor(12), 0, SIZE)
    form.step(Call(q, bad, bad, mask), keys.stored(), values.stored(), span)
    for simulated in (k_sim, v_sim):  # the window has moved, and does not come back
        simulated.append(q[:, :H])
        simulated.crop(12)
    out, expected, _ = called(form, [(keys, k_sim), (values, v_sim)], n, 12, start=12)
    torch.testing.assert_close(out, expected)


@EVERY
@pytest.mark.parametrize("size", [None, SIZE])
def test_to_another_dtype(form, size):
    for store, _ in begun(form, 9, size):
        moved = store.to(store.device, torch.float32)
        assert moved.dtype == moved.dense().dtype == torch.float32
        torch.testing.assert_close(moved.dense(), store.dense().float())
        for part in store.side.parts(fixed=size is not None):
            assert moved.state[part.name].dtype == (part.dtype or torch.float32)


@LOSSLESS
def test_lossless_formats_are_exact(form):
    sides = begun(form, 9)
    for store, simulated in sides:
        assert torch.equal(store.dense(), simulated.rows)


def has_kernel(form):
    """Of rows that are stored one by one, in fp32."""
    kernels = attention.kernels_for(form.keys, form.values)
    dtypes = {part.dtype for side in (form.keys, form.values) for part in side.parts(fixed=False)}
    return form.keys.window_group == 1 and kernels and kernels.one_window and torch.int8 not in dtypes


KERNELS = {name: form for name, form in FORMATS.items() if has_kernel(form)}


@pytest.mark.parametrize("form", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("n", [1, 3])
def test_the_kernel_is_within_the_error_of_its_precision(form, size, n):
    kernels = attention.kernels_for(form.keys, form.values)
    keys, values = (store.to(DEVICE, None) for store, _ in begun(form, 21, size, torch.float32))
    q, k, v = (x.to(DEVICE) for x in draw(n, dtype=torch.float32))
    if size is None:
        keys, values = keys.reserve(n), values.reserve(n)
    columns = 21 + n if size is None else size
    mask = F.pad(causal(n, 21 + n), (0, columns - 21 - n))[None, None].to(DEVICE)
    call, span = Call(q, k, v, mask), Span(21 if size is None else torch.tensor(21, device=DEVICE), 0, columns)
    sides = form.keys, form.values
    got = kernels.attend(call, keys.stored(), values.stored(), span)
    same = attention.narrow(call, keys.stored(), values.stored(), span, sides)
    wide = [store.to(store.device, torch.float64).stored() for store in (keys, values)]
    exact = attention.narrow(Call(*(x.double() for x in call[:3]), mask), *wide, span, sides)
    assert_close_to(same, got, exact)
