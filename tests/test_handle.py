"""Operations on handles against a dense twin, branches and writes in place."""

import copy
import gc
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import stores
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle, handle_for
from think_compile.cache.state import capacity_for
from think_compile.cache.store import Dense

BHSD, BSHD = (0, 1, 2, 3), (0, 2, 1, 3)
HEADS, DIM, KEEP, RECENT, SIZE = 2, 8, 4, 3, 14
LAYOUTS = pytest.mark.parametrize("layout", [BHSD, BSHD], ids=["BHSD", "BSHD"])
KINDS = pytest.mark.parametrize("kind", ["keys", "values", "fixed_keys", "fixed_values"])
GROWING = pytest.mark.parametrize("kind", ["keys", "values"])
FIXED = pytest.mark.parametrize("kind", ["fixed_keys", "fixed_values"])
OPTIONS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# ------------------------------------------------------------------ the dense twin


@dataclass
class Twin:
    """The dense equivalent of a handle by the rules: its numbers, the kept channels, the start of the window."""

    dense: Tensor  # [B, H, S, D]
    kept: Tensor  # [B, H, D] bool; all of them for values
    floor: int
    recent: int = RECENT
    layout: tuple = BHSD

    def plain(self) -> Tensor:
        return self.dense.permute(self.layout)

    def _prune(self) -> "Twin":
        old = torch.arange(self.dense.shape[2]) < self.floor
        dropped = old[:, None] & ~self.kept[:, :, None]
        self.dense = self.dense.masked_fill(dropped, 0)
        return self

    def settled(self) -> "Twin":
        """The window moves at the next append: the appending call still reads the old one."""
        floor = max(self.floor, self.dense.shape[2] - self.recent)
        return Twin(self.dense, self.kept, floor, self.recent, self.layout)._prune()

    def append(self, new: Tensor) -> "Twin":
        settled = self.settled()
        settled.dense = torch.cat([settled.dense, new], 2)
        return settled

    def crop(self, length: int) -> "Twin":
        dense, floor = self.dense[:, :, :length].clone(), min(self.floor, length)
        return Twin(dense, self.kept, floor, self.recent, self.layout)

    def map_batch(self, f) -> "Twin":
        return Twin(f(self.dense), f(self.kept), self.floor, self.recent, self.layout)

    def relaid(self, layout: tuple) -> "Twin":
        return Twin(self.dense, self.kept, self.floor, self.recent, layout)


def first_call(kind: str, batch: int, length: int, recent: int = RECENT, prune_generated: bool = True):
    """The stored tensors after a first call, and the dense key (or value) tensor given to it."""
    q, k, v = stores.drawn(batch, length, 2 * HEADS)
    size = SIZE if kind.startswith("fixed") else None
    keys, values = stores.first_call(stores.format_of(recent, prune_generated), q, k, v, size)
    store, dense = (values, v) if kind.endswith("values") else (keys, k)
    return store, torch.nn.functional.pad(dense, (0, 0, 0, 0 if size is None else size - length))


def pair(kind="keys", layout=BHSD, batch=2, length=7, recent=RECENT) -> tuple[Handle, Twin]:
    """A handle after a first call, and its twin."""
    store, dense = first_call(kind, batch, length, recent)
    kept = torch.ones(batch, HEADS, DIM, dtype=torch.bool)
    floor = 0
    if kind.endswith("keys"):
        kept = torch.zeros_like(kept).scatter_(-1, store.own["channels"].long(), True)
        floor = max(0, length - recent)
    twin = Twin(dense.clone(), kept, floor, recent, layout)._prune()
    if kind.startswith("fixed"):
        twin.recent = 10**6  # joins and crops of a fixed cache are plain tensors
    return handle_for(Cell(store), tuple((axis,) for axis in layout)), twin


def same(got: Tensor, expected: Tensor) -> None:
    """Equal numbers, shape and dtype; for a handle, its own shape and its dense form."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    numbers = got.dense() if isinstance(got, Handle) else got
    assert numbers.shape == expected.shape
    assert torch.equal(numbers, expected), "contents differ"


def packed(handle: Tensor) -> bool:
    return isinstance(handle, Handle) and not isinstance(handle.store, Dense)


# ------------------------------------------------------------------ random sequences of operations


@dataclass
class Live:
    """A tensor of a test's history: all of them must keep their contents."""

    handle: Tensor
    twin: Twin
    aliased: bool = False  # shares memory with another: not written in place here
    trail: list = field(default_factory=list)

    def check(self) -> None:
        try:
            same(self.handle, self.twin.plain())
        except AssertionError as error:
            raise AssertionError(f"{error}, after {self.trail}") from None


class Machine:
    """Applies one random operation after another to a tensor of the history and to its twin."""

    def __init__(self, draw, kind: str, layout: tuple) -> None:
        self.draw = draw
        batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 10))
        self.kind = kind
        self.lives = [Live(*pair(kind, layout, batch, length, draw(st.sampled_from([0, 1, 3, 20]))))]

    def step(self) -> None:
        live = self.draw(st.sampled_from(self.lives))
        name = self.draw(st.sampled_from(sorted(n for n in dir(self) if n.startswith("op_"))))
        live.trail.append(name)
        made = getattr(self, name)(live)
        if made is not None:
            made.trail = [*live.trail]
            self.lives.append(made)
        if len(self.lives) > 2 and self.draw(st.booleans()):
            del self.lives[self.draw(st.integers(0, len(self.lives) - 2))]
            gc.collect(0)
        for each in self.lives:
            each.check()

    def _length(self, live: Live) -> int:
        return live.twin.dense.shape[2]

    def _rows(self, live: Live) -> Tensor:
        batch = live.twin.dense.shape[0]
        return torch.tensor(self.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))

    # each returns a new Live, or None if it only changed or read the given one

    def op_index_select(self, live: Live) -> Live:
        rows = self._rows(live)
        got = live.handle.index_select(live.twin.layout.index(0), rows)
        return Live(got, live.twin.map_batch(lambda t: t[rows]))

    def op_index(self, live: Live) -> Live:
        rows = self._rows(live) - (live.twin.dense.shape[0] if self.draw(st.booleans()) else 0)
        return Live(live.handle[rows, ...], live.twin.map_batch(lambda t: t[rows]))

    def op_bool_index(self, live: Live) -> Live:
        batch = live.twin.dense.shape[0]
        mask = torch.tensor(self.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
        if not mask.any():
            return None
        return Live(live.handle[mask], live.twin.map_batch(lambda t: t[mask]))

    def op_repeat_interleave(self, live: Live) -> Live:
        n = self.draw(st.integers(1, 3))
        got = live.handle.repeat_interleave(n, dim=0)
        return Live(got, live.twin.map_batch(lambda t: t.repeat_interleave(n, 0)))

    def op_batch_slice(self, live: Live) -> Live:
        start = self.draw(st.integers(0, live.twin.dense.shape[0] - 1))
        got = live.handle[start:]
        live.aliased = True
        return Live(got, live.twin.map_batch(lambda t: t[start:]), aliased=True)

    def op_crop(self, live: Live) -> Live:
        n = self.draw(st.integers(1, self._length(live)))
        live.aliased = True
        at = (slice(None),) * live.twin.layout.index(2)
        return Live(live.handle[(*at, slice(None, n))], live.twin.crop(n), aliased=True)

    def op_crop_end(self, live: Live) -> Live:
        if self._length(live) < 2:
            return None
        n = self.draw(st.integers(1, self._length(live) - 1))
        live.aliased = True
        at = (slice(None),) * live.twin.layout.index(2)
        return Live(live.handle[(*at, slice(None, -n))], live.twin.crop(self._length(live) - n), aliased=True)

    def op_append(self, live: Live) -> Live:
        shape = list(live.twin.dense.shape)
        shape[2] = self.draw(st.sampled_from([1, 1, 1, 2, 5, 20]))
        new = torch.randn(shape, dtype=live.twin.dense.dtype)
        got = torch.cat([live.handle, new.permute(live.twin.layout)], live.twin.layout.index(2))
        twin = live.twin if packed(live.handle) else Twin(live.twin.dense, live.twin.kept, 0, 10**6)
        grown = twin.append(new)
        grown.layout = live.twin.layout
        return Live(got, grown)

    def op_replace_by_append(self, live: Live) -> None:
        made = self.op_append(live)
        live.handle, live.twin = made.handle, made.twin
        live.aliased = False

    def op_cat_batches(self, live: Live) -> Live:
        got = torch.cat([live.handle, live.handle], live.twin.layout.index(0))
        return Live(got, live.twin.map_batch(lambda t: torch.cat([t, t])))

    def op_clone(self, live: Live) -> Live:
        way = self.draw(st.sampled_from([torch.clone, copy.deepcopy, lambda h: h.to(h.device, copy=True)]))
        return Live(way(live.handle), live.twin.map_batch(torch.clone))

    def op_detach(self, live: Live) -> Live:
        live.aliased = True
        return Live(live.handle.detach(), live.twin, aliased=True)

    def op_to(self, live: Live) -> Live:
        dtype = self.draw(st.sampled_from([torch.float64, torch.bfloat16]))
        if dtype == live.twin.dense.dtype:
            return None
        twin = live.twin.relaid(live.twin.layout)
        twin.dense = twin.dense.to(dtype)
        return Live(live.handle.to(dtype), twin)

    def op_permute(self, live: Live) -> Live:
        dims = self.draw(st.permutations(range(4)))
        live.aliased = True
        layout = tuple(live.twin.layout[d] for d in dims)
        if layout[0] != 0:
            same(live.handle.permute(dims), live.twin.relaid(layout).plain())
            return None
        return Live(live.handle.permute(dims), live.twin.relaid(layout), aliased=True)

    def op_unknown(self, live: Live) -> None:
        h, plain = live.handle, live.twin.plain()
        live.aliased = True
        operation = self.draw(
            st.sampled_from(
                [
                    lambda t: t + 1,
                    lambda t: t.sum(),
                    lambda t: t[:, 0],
                    lambda t: t[..., 2],
                    lambda t: t[:, :, -1:],
                    lambda t: t.unsqueeze(0),
                    lambda t: t.softmax(-1),
                    lambda t: torch.cat([t, t], -1),
                    lambda t: torch.stack([t, t]),
                    lambda t: t.flatten(),
                    lambda t: t[[0]],
                    lambda t: t.flip(2),
                ]
            )
        )
        expected = operation(plain.contiguous())
        if expected.dtype == torch.bfloat16:
            return
        torch.testing.assert_close(torch.as_tensor(operation(h)), expected)

    def op_mul_(self, live: Live) -> None:
        if live.aliased:
            return
        live.handle.mul_(2)
        live.twin.dense = live.twin.dense * 2

    def op_copy_(self, live: Live) -> None:
        if live.aliased:
            return
        new = torch.randn(live.twin.plain().shape, dtype=live.twin.dense.dtype)
        live.handle.copy_(new)
        live.twin.dense = new.permute(sorted(range(4), key=lambda i: live.twin.layout[i]))

    def op_set(self, live: Live) -> None:
        if live.aliased:
            return
        at, axis = self.draw(st.integers(0, self._length(live) - 1)), live.twin.layout.index(2)
        plain = live.twin.plain().clone()
        index = (slice(None),) * axis + (at,)
        new = torch.randn(plain[index].shape, dtype=plain.dtype)
        live.handle[index] = new
        plain[index] = new
        live.twin.dense = plain.permute(sorted(range(4), key=lambda i: live.twin.layout[i]))

    def op_zero_(self, live: Live) -> None:
        if live.aliased:
            return
        live.handle.zero_()
        live.twin.dense = torch.zeros_like(live.twin.dense)
        live.twin.floor = 0 if self.kind.startswith("fixed") else live.twin.floor


@pytest.mark.parametrize("kind", ["keys", "values", "fixed_keys", "fixed_values"])
@LAYOUTS
def test_random_operations(kind, layout):
    @OPTIONS
    @given(st.data())
    def run(data):
        torch.manual_seed(0)
        machine = Machine(data.draw, kind, layout)
        for _ in range(data.draw(st.integers(1, 7))):
            machine.step()

    run()


# ------------------------------------------------------------------ which operations stay packed


def stays_packed():
    new = torch.randn(2, HEADS, 2, DIM)
    return {
        "index_select": lambda h: h.index_select(0, torch.tensor([1, 0, 1])),
        "index": lambda h: h[torch.tensor([1, 0]), ...],
        "index list": lambda h: h[[1, 0]],
        "index bool": lambda h: h[torch.tensor([False, True])],
        "index negative": lambda h: h[torch.tensor([-1])],
        "index empty": lambda h: h[torch.tensor([], dtype=torch.long)],
        "repeat_interleave": lambda h: h.repeat_interleave(3, 0),
        "repeat_interleave counts": lambda h: h.repeat_interleave(torch.tensor([2, 1]), dim=0),
        "batch slice": lambda h: h[1:],
        "clone": lambda h: h.clone(),
        "deepcopy": copy.deepcopy,
        "copy": copy.copy,
        "detach": lambda h: h.detach(),
        "float64": lambda h: h.to(torch.float64),
        "bfloat16": lambda h: h.to(torch.bfloat16),
        "half": lambda h: h.half(),
        "device": lambda h: h.to(h.device, copy=True),
        "cpu": lambda h: h.cpu().to(h.device),
        "contiguous": lambda h: h.contiguous(),
        "whole": lambda h: h[:],
        "ellipsis": lambda h: h[...],
        "crop": lambda h: h[..., :4, :],
        "crop end": lambda h: h[:, :, :-2],
        "crop short": lambda h: h[:, :, :1],
        "crop too long": lambda h: h[:, :, :100],
        "narrow": lambda h: h.narrow(2, 0, 5),
        "narrow from behind": lambda h: h.narrow(-2, 0, 5),
        "append": lambda h: torch.cat([h, new], 2),
        "append two": lambda h: torch.cat([h, new, new], dim=-2),
        "join batches": lambda h: torch.cat([h, h], 0),
    }


@GROWING
@pytest.mark.parametrize("name", stays_packed())
def test_stays_packed(kind, name):
    handle, twin = pair(kind)
    got = stays_packed()[name](handle)
    assert packed(got), "densified"
    assert packed(handle), "the handle itself was densified"
    torch.manual_seed(1)
    operation = stays_packed()[name]
    if "append" not in name:
        same(got, operation(twin.plain()))


@LAYOUTS
def test_pickle(layout):
    handle, twin = pair("keys", layout)
    got = pickle.loads(pickle.dumps(handle))
    same(got, twin.plain())
    assert packed(got)


@KINDS
def test_save_and_load(kind, tmp_path):
    handle, twin = pair(kind)
    torch.save(handle, tmp_path / "cache.pt")
    same(torch.load(tmp_path / "cache.pt", weights_only=False), twin.plain())


@KINDS
def test_deepcopy_keeps_identity_within_one_copy(kind):
    handle, _ = pair(kind)
    a, b = copy.deepcopy([handle, handle])
    assert a is b
    assert a is not handle


@KINDS
@LAYOUTS
def test_shape_dtype_device_repr(kind, layout):
    handle, twin = pair(kind, layout, batch=3, length=5)
    assert handle.shape == twin.plain().shape == handle.size()
    assert (handle.dtype, handle.device, handle.dim()) == (torch.float32, twin.dense.device, 4)
    assert handle.numel() == twin.dense.numel()
    assert len(handle) == 3
    assert "Handle" in repr(handle)
    assert f"{handle}"
    assert isinstance(handle, Tensor)
    assert handle.is_floating_point()


# ------------------------------------------------------------------ operations that were once wrong, or nearly


def test_index_with_numpy():
    handle, twin = pair()
    rows = np.array([1, 0])
    same(handle[rows], twin.plain()[rows])


def test_narrow_from_a_negative_start():
    handle, twin = pair()
    same(handle.narrow(2, -3, 3), twin.plain().narrow(2, -3, 3))


@pytest.mark.parametrize("start,length", [(0, 100), (5, 3), (-9, 2)])
def test_narrow_out_of_range_raises(start, length):
    handle, twin = pair()
    with pytest.raises((RuntimeError, IndexError)):
        twin.plain().narrow(2, start, length)
    with pytest.raises((RuntimeError, IndexError)):
        handle.narrow(2, start, length)


@pytest.mark.parametrize("dims", [(0, 1), (0, 1, 1, 2), (0, 1, 2, 3, 3)])
def test_permute_of_wrong_axes_raises(dims):
    handle, _ = pair()
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        handle.permute(dims)


def test_mask_of_wrong_size_raises():
    handle, _ = pair(batch=3)
    for mask in ([True], [True, False, True, False]):
        with pytest.raises(IndexError):
            handle[torch.tensor(mask)]


FLATTENED = {
    "view": lambda t: t.view(2, 7, HEADS * DIM),
    "reshape": lambda t: t.reshape(2, 7, HEADS * DIM),
    "flatten": lambda t: t.flatten(2),
    "as_strided": lambda t: t.as_strided((2, 7, HEADS * DIM), (7 * HEADS * DIM, HEADS * DIM, 1)),
}


@KINDS
@pytest.mark.parametrize("name", FLATTENED)
def test_merged_axes_of_a_sequence_major_cache(kind, name):
    handle, twin = pair(kind, BSHD)
    length = handle.shape[1]
    plain = twin.plain().contiguous()
    if length != 7:
        handle, plain = handle[:, :7].contiguous(), plain[:, :7].contiguous()
    same(FLATTENED[name](handle), FLATTENED[name](plain))


@GROWING
def test_transpose_then_merge_heads(kind):
    handle, twin = pair(kind)
    expected = twin.plain().transpose(1, 2).reshape(2, 7, -1)
    same(handle.transpose(1, 2).reshape(2, 7, -1), expected)
    same(handle.transpose(1, 2).contiguous().view(2, 7, -1), expected)


def test_cat_of_a_legacy_empty_tensor():
    handle, twin = pair()
    same(torch.cat([handle, torch.tensor([])], -2), twin.plain())
    same(torch.cat([torch.tensor([]), handle], -2), twin.plain())


@GROWING
@pytest.mark.parametrize("shape", [(3, HEADS, 1, DIM), (1, 2 * HEADS, 1, DIM), (1, HEADS, 1, DIM + 1)])
def test_append_of_another_shape_raises(kind, shape):
    handle, twin = pair(kind, batch=1)
    with pytest.raises((RuntimeError, ValueError)):
        torch.cat([handle, torch.randn(shape)], 2)
    same(handle, twin.plain())


def test_append_of_more_heads_to_one_head_raises():
    handle, _ = pair(batch=1)
    narrow = handle.store.map_batch(lambda t: t[:, :1].clone())
    with pytest.raises((RuntimeError, ValueError)):
        torch.cat([Handle(narrow), torch.randn(1, 3, 1, DIM)], 2)


def test_append_of_another_dtype_promotes():
    handle, twin = pair()
    new = torch.randn(2, HEADS, 1, DIM, dtype=torch.float64)
    same(torch.cat([handle, new], 2), torch.cat([twin.plain(), new], 2))


def test_join_of_different_histories():
    a, twin_a = pair(length=7)
    b, twin_b = pair(length=6)
    b = torch.cat([b, torch.zeros(2, HEADS, 1, DIM)], 2)
    twin_b = twin_b.append(torch.zeros(2, HEADS, 1, DIM))
    same(torch.cat([a, b], 0), torch.cat([twin_a.plain(), twin_b.plain()]))
    c = torch.cat([a, torch.zeros(2, HEADS, 2, DIM)], 2)[:, :, :7]  # as long, but its window begins elsewhere
    c_twin = twin_a.append(torch.zeros(2, HEADS, 2, DIM)).crop(7)
    same(torch.cat([a, c], 0), torch.cat([twin_a.plain(), c_twin.plain()]))
    with pytest.raises(RuntimeError):
        torch.cat([a, b[:, :, :5]], 0)


def test_join_with_plain_tensors():
    handle, twin = pair()
    other = torch.randn(2, HEADS, 7, DIM)
    for axis in range(4):
        same(torch.cat([handle, other], axis), torch.cat([twin.plain(), other], axis)) if axis != 2 else None
        same(torch.cat([other, handle], axis), torch.cat([other, twin.plain()], axis))


# ------------------------------------------------------------------ writing in place


@KINDS
@LAYOUTS
def test_writes_reach_the_handle(kind, layout):
    handle, twin = pair(kind, layout)
    expected = twin.plain().contiguous().clone()
    for tensor in (handle, expected):
        tensor[:, 1] = 5.0
        tensor[..., 3].mul_(3)
        tensor.add_(1)
        tensor[0].zero_()
        tensor[:, :, 2:4] -= 7
        tensor.view(2, -1)[:, 5] = 2.0
    same(handle, expected)


@pytest.mark.parametrize("way", ["detach", "data", "alias", "transpose"])
@KINDS
def test_a_write_through_an_alias_reaches_the_cache_or_raises(kind, way):
    handle, twin = pair(kind)
    try:
        if way == "detach":
            handle.detach().mul_(2)
        elif way == "data":
            handle.data.mul_(2)
        elif way == "alias":
            torch.ops.aten.alias(handle).mul_(2)
        else:
            handle.transpose(1, 2).mul_(2)
        same(handle, twin.plain() * 2)
    except RuntimeError:
        return


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_write_to_a_slice_raises(kind):
    handle, twin = pair(kind)
    for part in (handle[:, :, :4], handle[:1], handle[..., :-1, :]):
        with pytest.raises(RuntimeError, match="slice"):
            part.zero_()
        with pytest.raises(RuntimeError, match="slice"):
            part.copy_(torch.zeros(part.shape))
    same(handle, twin.plain())


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_write_to_a_view_of_a_slice_raises_or_reaches(kind):
    """`cache[:, :, :4][:, 0] = 1` writes to the cache in torch."""
    handle, twin = pair(kind)
    expected = twin.plain().clone()
    expected[:, :, :4][:, 0] = 1.0
    try:
        handle[:, :, :4][:, 0] = 1.0
    except RuntimeError:
        return
    same(handle, expected)


@KINDS
def test_a_write_to_a_view_of_a_packed_cache_is_found_out(kind):
    """The view is a copy, so the write cannot reach the cache; the next use of the cache raises."""
    handle, _ = pair(kind)
    handle[..., 3].mul_(3)
    with pytest.raises(RuntimeError, match="view of a packed cache"):
        handle.sum()


def test_out_argument():
    handle, twin = pair()
    try:
        torch.add(twin.plain(), 1, out=handle)
    except (RuntimeError, TypeError, NotImplementedError):
        return
    same(handle, twin.plain() + 1)


METADATA = {
    "transpose_": lambda t: t.transpose_(1, 2),
    "unsqueeze_": lambda t: t.unsqueeze_(0),
    "squeeze_": lambda t: t.squeeze_(0),
    "resize_": lambda t: t.resize_(1, HEADS, 7, 4),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_change_of_shape_in_place_raises_or_is_right(name):
    handle, twin = pair(batch=1)
    expected = METADATA[name](twin.plain().clone())
    try:
        METADATA[name](handle)
    except (RuntimeError, NotImplementedError):
        return
    same(handle, expected)


@FIXED
def test_zero_clears_a_fixed_cache(kind):
    handle, twin = pair(kind)
    address = handle.store.rows.parts["rows"].data_ptr()
    assert handle.zero_() is handle
    same(handle, torch.zeros_like(twin.plain()))
    assert packed(handle)
    assert handle.store.rows.parts["rows"].data_ptr() == address


@FIXED
def test_a_copy_of_a_fixed_cache_is_its_own(kind):
    handle, twin = pair(kind)
    copies = [handle.clone(), copy.deepcopy(handle), handle[torch.tensor([0, 1])], handle.to(handle.device, copy=True)]
    handle.zero_()
    for each in copies:
        same(each, twin.plain())


@KINDS
def test_reading_leaves_a_cache_packed(kind):
    """Reading a cache must not change its stored form, nor the later calls."""
    handle, twin = pair(kind)
    same(handle[:, :, 3], twin.plain()[:, :, 3])
    assert handle.sum() is not None
    assert packed(handle)


# ------------------------------------------------------------------ branches and copies on write


def address(handle: Handle) -> int:
    return handle.store.rows.parts["rows"].data_ptr()


def one_more(batch: int = 2) -> Tensor:
    return torch.randn(batch, HEADS, 1, DIM)


@GROWING
def test_appends_happen_in_place(kind):
    handle, twin = pair(kind)
    first = address(handle)
    for _ in range(capacity_for(7) - 8):  # one row stays free
        new = one_more()
        handle, twin = torch.cat([handle, new], 2), twin.append(new)
        assert address(handle) == first
    same(handle, twin.plain())
    new = one_more()
    handle, twin = torch.cat([handle, new], 2), twin.append(new)
    assert address(handle) != first
    same(handle, twin.plain())


@GROWING
def test_an_older_handle_keeps_its_contents(kind):
    old, old_twin = pair(kind)
    new = one_more()
    newer, newer_twin = torch.cat([old, new], 2), old_twin.append(new)
    assert address(newer) == address(old)
    new = torch.randn(2, HEADS, 3, DIM)
    branch, branch_twin = torch.cat([old, new], 2), old_twin.append(new)
    assert address(branch) != address(newer)
    cropped, cropped_twin = newer[:, :, :5], newer_twin.crop(5)
    again, again_twin = torch.cat([cropped, new], 2), cropped_twin.append(new)
    more, more_twin = torch.cat([again, new], 2), again_twin.append(new)
    for handle, twin in [
        (old, old_twin),
        (newer, newer_twin),
        (branch, branch_twin),
        (cropped, cropped_twin),
        (again, again_twin),
        (more, more_twin),
    ]:
        same(handle, twin.plain())


@GROWING
def test_a_crop_is_appended_to_in_place_once_nothing_else_holds_the_rows(kind):
    handle, twin = pair(kind)
    first = address(handle)
    handle, twin = handle[:, :, :5], twin.crop(5)
    gc.collect()
    for _ in range(4):
        new = one_more()
        handle, twin = torch.cat([handle, new], 2), twin.append(new)
        assert address(handle) == first
        same(handle, twin.plain())


@GROWING
def test_two_appends_to_an_alias_do_not_meet(kind):
    handle, twin = pair(kind)
    other = handle.detach()
    a, b = one_more(), one_more()
    first, second = torch.cat([handle, a], 2), torch.cat([other, b], 2)
    same(first, twin.append(a).plain())
    same(second, twin.append(b).plain())


def test_a_cropped_window_does_not_come_back():
    handle, twin = pair("keys")
    handle, twin = handle[:, :, :5], twin.crop(5)  # the window began at 4
    assert (handle.store.counters.window_start, twin.floor) == (4, 4)
    for _ in range(5):
        new = one_more()
        handle, twin = torch.cat([handle, new], 2), twin.append(new)
        same(handle, twin.plain())


def test_generated_tokens_stay_whole_without_prune_generated():
    store, dense = first_call("keys", 2, 7, prune_generated=False)
    handle = Handle(store)
    kept = torch.zeros(2, HEADS, DIM, dtype=torch.bool).scatter_(-1, store.own["channels"].long(), True)
    twin = Twin(dense, kept, 7 - RECENT, 10**6)._prune()
    for step in range(60):
        new = one_more()
        handle, twin = torch.cat([handle, new], 2), twin.append(new)
        assert torch.equal(handle.dense(), twin.plain()), f"wrong after {step + 1} tokens"


# ------------------------------------------------------------------ inference mode, gradients, other compilers


@KINDS
def test_made_in_inference_mode_and_used_outside(kind):
    """A beam's reordering may run in inference mode, and a compiled call writes outside of it."""
    handle, _ = pair(kind)
    with torch.inference_mode():
        chosen = handle[torch.tensor([1, 0])]
    tensors = list(chosen.store.tensors())
    assert not any(t.is_inference() for t in tensors), "no later call can write to inference tensors"


@GROWING
def test_room_made_in_inference_mode(kind):
    handle, _ = pair(kind)
    with torch.inference_mode():
        room = handle.store.reserve(100)
    assert not room.rows.parts["rows"].is_inference()


def test_gradients_flow_around():
    handle, twin = pair()
    weight = torch.randn(DIM, requires_grad=True)
    (handle * weight).sum().backward()
    torch.testing.assert_close(weight.grad, twin.plain().sum((0, 1, 2)))


READERS = {
    "sum": lambda t: t.sum(),
    "first head": lambda t: t[:, 0].clone(),
    "crop": lambda t: t[:, :, :4].clone(),
    "transpose": lambda t: t.transpose(1, 2) + 0,
    "matmul": lambda t: t @ t.mT,
    "repeat_interleave": lambda t: t.repeat_interleave(2, 0) + 0,
    "append": lambda t: torch.cat([t, t], 2) + 0,
    "clone": lambda t: t.clone(),
}


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", READERS)
def test_in_a_graph_of_another_backend(name, backend):
    handle, twin = pair()
    function = READERS[name]
    try:
        got = torch.compile(lambda t: function(t), backend=backend)(handle)
    except Exception as error:
        assert "packed" in str(error), "the error must tell what is wrong"
        return
    torch.testing.assert_close(got.dense() if isinstance(got, Handle) else got, function(twin.plain()))


def test_attention_of_torch_reads_the_dense_numbers():
    keys, keys_twin = pair("keys")
    values, values_twin = pair("values")
    q = torch.randn(2, HEADS, 3, DIM)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(q, keys, values), attend(q, keys_twin.plain(), values_twin.plain()))
    same(keys, keys_twin.plain())


OUTSIDE = {
    "numpy": lambda t: torch.from_numpy(t.numpy()),
    "numpy.asarray": lambda t: torch.from_numpy(np.asarray(t)),
    "numpy.asarray as another type": lambda t: torch.from_numpy(np.asarray(t, dtype=np.float32)),
    "numpy.from_dlpack": lambda t: torch.from_numpy(np.from_dlpack(t).copy()),
    "torch.from_dlpack": torch.from_dlpack,
    "tolist": lambda t: torch.tensor(t.tolist(), dtype=t.dtype),
}


@pytest.mark.host
@pytest.mark.parametrize("read", OUTSIDE.values(), ids=OUTSIDE)
def test_code_outside_of_torch_reads_the_dense_numbers(read):
    handle, twin = pair()
    torch.testing.assert_close(read(handle), read(twin.plain()))
    same(handle, twin.plain())


MEMORY = {
    "data_ptr": lambda t, _: t.data_ptr(),
    "storage": lambda t, _: t.storage(),
    "safetensors": lambda t, folder: save_file({"keys": t}, folder / "keys.safetensors"),
    "share_memory_": lambda t, _: t.share_memory_(),
}


@pytest.mark.parametrize("read", MEMORY.values(), ids=MEMORY)
def test_memory_of_a_packed_cache_is_refused_with_the_way_out(read, tmp_path):
    handle, _ = pair()
    with pytest.raises(RuntimeError, match=r"cache\.dense\(\)"):
        read(handle, tmp_path)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(handle, copy=False)


def test_a_shallow_copy_shares_the_cache():
    handle, _twin = pair("fixed_keys")
    other = copy.copy(handle)
    assert isinstance(other, Handle) and other.cell is handle.cell
    handle[:, :, 3] = 7
    assert torch.equal(other.dense(), handle.dense()) and (other.dense()[:, :, 3] == 7).all()
    deep = copy.deepcopy(handle)
    handle.zero_()
    assert not other.dense().any() and deep.dense().any()


def test_one_cache_in_two_layouts_is_one_cache():
    handle, twin = pair("fixed_keys")
    other = Handle.on(handle.cell, tuple(handle.axes[i] for i in (0, 2, 1, 3)))
    same(other, twin.plain().transpose(1, 2))
    handle.zero_()
    assert not other.dense().any()
    other[:, 3] = 7
    assert (handle.dense()[:, :, 3] == 7).all()
    handle[:, :, 4] = 8
    assert (other.dense()[:, 4] == 8).all() and (other.dense()[:, 3] == 7).all()


# ------------------------------------------------------------------ the last tokens


@GROWING
@LAYOUTS
@pytest.mark.parametrize("length", [1, 3, 5, 7])
def test_the_last_tokens_stay_packed(kind, layout, length):
    handle, twin = pair(kind, layout)
    axis = handle.axes.index((2,))
    index = (slice(None),) * axis + (slice(-length, None),)
    tail, expected = handle[index], twin.plain()[index]
    same(tail, expected)
    assert isinstance(tail, Handle)
    assert not tail.is_dense
    same(tail[:1].clone(), expected[:1])
    same(torch.cat([tail, tail], 0), torch.cat([expected, expected]))
    same(handle, twin.plain())
