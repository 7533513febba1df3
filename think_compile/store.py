"""The packed storage behind a handle: pruned keys and whole values, growing or of fixed size.

A growing store is a value: an append makes a new store that shares the row buffers, so an older store (a branch,
a reused prefix) stays what it was. It may let go of its oldest tokens (a bounded window): the live rows then begin at
``first``, and move to the front of a new buffer when this one is full. Its ``floor`` counts rows, as ``first`` does.
A fixed store is a place: it is written in place, as the buffer it replaces.
Canonical axes are [batch, head, token, channel]; shapes as in :mod:`think_compile.kernels.reference`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from think_compile.kernels import reference as ref
from think_compile.kernels.steps import LayerSpec, capacity_for


def allocating() -> AbstractContextManager[Any]:
    """Stores outlive the call, so they must not be inference tensors, which no later call could write to."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    return stack


def writable(tensor: Tensor) -> Tensor:
    """The tensor, or where that can be written to in inference mode only, another on the same memory."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Rows:
    """A buffer [B, H, C, *] that is appended to in place, shared by the stores of one line of calls."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.owners: weakref.WeakSet[Store] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"tensor": self.tensor}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.tensor, self.owners = state["tensor"], weakref.WeakSet()

    @property
    def capacity(self) -> int:
        return self.tensor.shape[2]

    def free_above(self, length: int, owner: Store) -> bool:
        """Whether rows from ``length`` on belong to nobody but ``owner``."""
        return all(other is owner or other.end <= length for other in self.owners)

    def copy(self, first: int, length: int, capacity: int) -> Rows:
        """A copy, with ``capacity``, of ``length`` rows from ``first`` on; the rows above are zero."""
        shape = list(self.tensor.shape)
        shape[2] = capacity
        with allocating():
            tensor = self.tensor.new_zeros(shape)
            tensor[:, :, :length] = self.tensor[:, :, first : first + length]
        return Rows(tensor)

    def map(self, f: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(f(self.tensor))


class Store:
    """What every store can do. ``length`` is the number of rows a reader may see: tokens, or a fixed cache's size."""

    length: int
    rows: Rows

    def __post_init__(self) -> None:
        self.rows.owners.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows.owners.add(self)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that hold memory."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The logical tensor [B, H, length, *]."""
        raise NotImplementedError

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> Store:
        """A new store with ``f`` applied to every tensor that has a batch axis (in front)."""
        raise NotImplementedError

    def to(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False) -> Store:
        """A copy on another device or in another dtype; indices and lengths keep theirs."""

        def cast(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else None, non_blocking=non_blocking, copy=True)

        return self.map_batch(cast)

    @property
    def end(self) -> int:
        """The row behind the last token's."""
        return self.length

    @property
    def logical_shape(self) -> tuple[int, int, int, int]:
        batch, heads, _, _ = self.rows.tensor.shape
        return batch, heads, self.length, self.width

    @property
    def width(self) -> int:
        """Channels of the logical tensor."""
        return self.rows.tensor.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.tensor.device


def _capacity_of_copy(store: GrowingKeys | GrowingValues, n_new: int) -> int | None:
    """Rows of a larger or private copy in which ``n_new`` more may be written; None: the store's own rows take them."""
    fits = store.end + n_new < store.rows.capacity  # one row stays free: a slice that is the whole is compiled apart
    if fits and store.rows.free_above(store.end, store):
        return None
    return store.rows.capacity if fits and not store.first else capacity_for(store.length + n_new)


def _has_outgrown(store: GrowingKeys | GrowingValues) -> bool:
    """Whether most of the rows were needed only by tokens that were let go."""
    return store.rows.capacity > 2 * capacity_for(store.length)


@dataclass(eq=False)
class GrowingKeys(Store):
    """Pruned keys of a growing cache. The ring holds whole keys of the tokens in rows [floor, first + length)."""

    rows: Rows  # [B, H, C, T]
    channels: Tensor  # [B, H, T]
    recent: Tensor  # [B, H, R, D]
    length: int
    floor: int
    spec: LayerSpec
    first: int = 0

    @property
    def end(self) -> int:
        return self.first + self.length

    @property
    def width(self) -> int:
        return self.recent.shape[-1]

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.rows.tensor, self.channels, self.recent)

    def dense(self) -> Tensor:
        packed = ref.Packed(self.rows.tensor, self.channels, self.recent)
        return ref.dense_keys(packed, self.floor, self.end, self.end, self.first)

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> GrowingKeys:
        return replace(self, rows=self.rows.map(f), channels=f(self.channels), recent=f(self.recent))

    def crop(self, length: int) -> GrowingKeys:
        """The first ``length`` tokens, sharing the rows; tokens that have left the window stay pruned."""
        return replace(self, length=length, floor=min(self.floor, self.first + length))

    def tail(self, length: int) -> GrowingKeys:
        """The last ``length`` tokens, sharing the rows unless those are far too many."""
        first = self.end - length
        kept = replace(self, length=length, first=first, floor=max(self.floor, first))
        return kept.moved(capacity_for(length)) if _has_outgrown(kept) else kept

    def moved(self, capacity: int) -> GrowingKeys:
        """The same tokens in the first rows of a new buffer."""
        rows = self.rows.copy(self.first, self.length, capacity)
        recent = self.recent.roll(-self.first, 2) if self.first else self.recent  # token in row p: ring row p % R
        return replace(self, rows=rows, recent=recent, floor=self.floor - self.first, first=0)

    def reserve(self, n_new: int) -> GrowingKeys:
        """This store, or one with the same tokens whose rows and ring take ``n_new`` more in place."""
        settled = self.settled()
        capacity = _capacity_of_copy(settled, n_new)
        room = settled if capacity is None else settled.moved(capacity)
        recent = room.recent if self.spec.prune_generated else room.ring_with_room(n_new)
        return room if recent is room.recent else replace(room, recent=recent)

    def settled(self) -> GrowingKeys:
        """This store, or one whose window has moved on: :meth:`append` leaves that to whatever comes next."""
        rows = self.spec.ring_rows(0)
        if not self.spec.prune_generated or self.recent.shape[2] == rows:
            return self
        positions = ref.ring_positions(self.end, rows, self.device).clamp(min=0)
        recent = self.recent.index_select(2, positions % self.recent.shape[2])
        return replace(self, recent=recent, floor=max(self.floor, self.end - self.spec.recent))

    def ring_with_room(self, n_new: int) -> Tensor:
        """The ring, or a larger copy, in which ``n_new`` more tokens stay beside all that are whole."""
        needed = self.end + n_new - self.floor
        if needed < self.recent.shape[2]:  # a full ring is a window again, and would let go of its oldest token
            return self.recent
        positions = ref.ring_positions(self.end, capacity_for(needed), self.device)
        return self.recent.index_select(2, positions % self.recent.shape[2])

    def appended(self, recent: Tensor, n_new: int) -> GrowingKeys:
        """The store after a call wrote ``n_new`` rows in place and handed back the new ring."""
        floor = max(self.floor, self.end + n_new - self.spec.whole_tokens(recent.shape[2]))
        return replace(self, recent=recent, length=self.length + n_new, floor=floor)

    def append(self, k_new: Tensor) -> GrowingKeys:
        """The store with ``k_new`` [B, H, N, D] behind its tokens, outside of any graph.

        The window does not move yet: whoever appends reads the result next, and is to see whole keys of all tokens
        that were whole before, as an attention in a graph does.
        """
        n_new = k_new.shape[2]
        room = self.reserve(n_new)
        ref.append_rows(room.rows.tensor, ref.narrow_rows(k_new, room.channels), room.end)
        recent = ref.advance_ring(room.ring_with_room(n_new), k_new, room.end)
        return replace(room, recent=recent, length=room.length + n_new)


@dataclass(eq=False)
class GrowingValues(Store):
    """Whole values of a growing cache."""

    rows: Rows  # [B, H, C, Dv]
    length: int
    first: int = 0

    @property
    def end(self) -> int:
        return self.first + self.length

    def tensors(self) -> Iterator[Tensor]:
        yield self.rows.tensor

    def dense(self) -> Tensor:
        return self.rows.tensor[:, :, self.first : self.end].clone()

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> GrowingValues:
        return replace(self, rows=self.rows.map(f))

    def crop(self, length: int) -> GrowingValues:
        """The first ``length`` tokens, sharing the rows."""
        return replace(self, length=length)

    def tail(self, length: int) -> GrowingValues:
        """The last ``length`` tokens, sharing the rows unless those are far too many."""
        kept = replace(self, length=length, first=self.end - length)
        return kept.moved(capacity_for(length)) if _has_outgrown(kept) else kept

    def moved(self, capacity: int) -> GrowingValues:
        """The same tokens in the first rows of a new buffer."""
        return replace(self, rows=self.rows.copy(self.first, self.length, capacity), first=0)

    def reserve(self, n_new: int) -> GrowingValues:
        """This store, or one with the same tokens whose rows take ``n_new`` more in place."""
        capacity = _capacity_of_copy(self, n_new)
        return self if capacity is None else self.moved(capacity)

    def appended(self, n_new: int) -> GrowingValues:
        """The store after a call wrote ``n_new`` rows in place."""
        return replace(self, length=self.length + n_new)

    def append(self, v_new: Tensor) -> GrowingValues:
        """The store with ``v_new`` [B, H, N, Dv] behind its tokens, outside of any graph."""
        room = self.reserve(v_new.shape[2])
        ref.append_rows(room.rows.tensor, v_new, room.end)
        return room.appended(v_new.shape[2])


@dataclass(eq=False)
class FixedKeys(Store):
    """Pruned keys of a cache of fixed size; ``progress`` is [floor, length written], on the device.

    ``written`` is no less than the length written, as far as the host knows; None: it does not.
    """

    rows: Rows  # [B, H, C, T]
    channels: Tensor  # [B, H, T]
    recent: Tensor  # [B, H, R, D]
    progress: Tensor  # [2] int64
    spec: LayerSpec
    written: int | None = None

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.rows.capacity

    @property
    def width(self) -> int:
        return self.recent.shape[-1]

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.rows.tensor, self.channels, self.recent, self.progress)

    def dense(self) -> Tensor:
        packed = ref.Packed(self.rows.tensor, self.channels, self.recent)
        return ref.dense_keys(packed, self.progress[0], self.progress[1], self.length)

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> FixedKeys:
        return replace(
            self,
            rows=self.rows.map(f),
            channels=f(self.channels),
            recent=f(self.recent),
            progress=self.progress.clone(),
        )

    def to(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False) -> FixedKeys:
        moved = super().to(device, dtype, non_blocking)
        assert isinstance(moved, FixedKeys)
        return replace(moved, progress=self.progress.to(device, copy=True))

    def clear(self) -> None:
        """Forget every token; the next call writes from position 0 and chooses its channels anew."""
        for tensor in (self.rows.tensor, self.recent, self.progress):
            tensor.zero_()
        self.written = 0


@dataclass(eq=False)
class FixedValues(Store):
    """Whole values of a cache of fixed size."""

    rows: Rows  # [B, H, C, Dv]

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.rows.capacity

    def tensors(self) -> Iterator[Tensor]:
        yield self.rows.tensor

    def dense(self) -> Tensor:
        return self.rows.tensor.clone()

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> FixedValues:
        return replace(self, rows=self.rows.map(f))

    def clear(self) -> None:
        """Zero every row."""
        self.rows.tensor.zero_()


@dataclass(eq=False)
class Dense(Store):
    """A plain tensor in canonical axes: what a handle holds after an operation that no packed form can express."""

    rows: Rows

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.rows.capacity

    def tensors(self) -> Iterator[Tensor]:
        yield self.rows.tensor

    def dense(self) -> Tensor:
        return self.rows.tensor

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> Dense:
        return replace(self, rows=self.rows.map(f))


def join_batches(stores: Sequence[Any]) -> Store | None:
    """One store of the sequences of several growing ones that have the same history; None: they have not."""
    if all(isinstance(s, GrowingValues) and s.length == stores[0].length for s in stores):
        return GrowingValues(_joined_rows(stores), stores[0].length)
    keys = [s.moved(s.length) if s.first else s for s in stores if isinstance(s, GrowingKeys)]
    if len(keys) != len(stores) or len({(s.length, s.floor, s.spec, s.recent.shape[2]) for s in keys}) != 1:
        return None
    channels, recent = (torch.cat([getattr(s, name) for s in keys]) for name in ("channels", "recent"))
    return GrowingKeys(_joined_rows(keys), channels, recent, keys[0].length, keys[0].floor, keys[0].spec)


def _joined_rows(stores: Sequence[Any]) -> Rows:
    return Rows(torch.cat([s.rows.tensor[:, :, s.first : s.end] for s in stores]))
