"""Run a rewritten graph: unpack the handles, run the lowered graph, pack its outputs into handles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor

from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle, handle_for
from think_compile.cache.packed import Packed
from think_compile.cache.rows import allocating, writable
from think_compile.cache.state import COUNTERS
from think_compile.cache.store import Store
from think_compile.config import ThinkConfig
from think_compile.formats.base import MAX_STEP_QUERIES
from think_compile.passes.layout import value_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.cache_layout import same_layout
from think_compile.passes.prove.site import CacheSite, CacheTensor, FormatOf
from think_compile.passes.rewrite import plan
from think_compile.runtime.capture import Replayed
from think_compile.runtime.lower import Dims, Eager, Inductor
from think_compile.runtime.repeat import Fetch, Known, Repeated

Replace = Callable[[Any, Handle], None]
Note = Callable[[plan.Chosen, Tensor, dict[str, Tensor]], None]


class CacheFull(ValueError, IndexError):
    """A call would write beyond the end of a cache of fixed size; the call was not run."""


class BeginsAgain(Exception):
    """A call would overwrite rows of a full cache of fixed size and read the rows after them; nothing was run."""


class Program:
    """A rewritten graph and its lowering, for one choice of packed handles."""

    def __init__(
        self,
        normalized: Normalized,
        rewritten: plan.Rewritten,
        config: ThinkConfig,
        own: frozenset[int] = frozenset(),
        starts: Callable[..., Any] | None = None,
    ) -> None:
        """``own``: the inputs with the model's parameters and buffers; ``starts``: from :func:`.find_starts`."""
        self.rewritten = rewritten
        placeholders = normalized.placeholders
        self.written = frozenset(normalized.written)
        self.symbols = {
            node.meta["val"].node.expr: i
            for i, node in enumerate(placeholders)
            if isinstance(node.meta["val"], SymInt) and node.meta["val"].node.expr.is_symbol
        }
        self.fetchers = [self._fetcher(what) for what in rewritten.inputs]
        self.new_tokens = [(index, self._number(n)) for index, n in rewritten.appended]
        self.bounded = [
            what.indices for what in rewritten.inputs if isinstance(what, plan.Counter) and what.name == "oldest"
        ]
        dims = [_dims(what, placeholders) for what in rewritten.inputs]
        graph = rewritten.graph_module
        self.lowered = Eager(graph) if config.lowering == "eager" else Inductor(graph, dims, config.inductor_options)
        self.written_rows = [(what.index, self._number(what.tokens)) for what in rewritten.written if not what.rolling]
        self.launched = Undone(self.lowered, rewritten)
        self.starts = starts
        self.replayed = self._replayed(own) if config.cuda_graphs else None
        self.repeated: Repeated | None = None

    def run(self, args: Sequence[Any], replace: Replace, note: Note) -> tuple[Any, ...]:
        """The caller's outputs for the caller's inputs; ``note`` takes the choices for tensors left dense."""
        counts = {index: number(args) for index, number in self.new_tokens}
        with allocating():
            self._take_room(args)
            stores = self._reserved(args, counts)
            stores |= {index: args[index].store.map_batch(torch.clone) for index in self.rewritten.copied}
            self._put_rows_in_place(args, stores)
            launched = self.launched if self.replayed is None or self._is_long(args) else self.replayed
            values = launched([fetch(args, stores) for fetch in self.fetchers])
            self.repeated = self._found_by(args) if launched is self.replayed else None
            made = _Made(args, stores, counts, values, lambda size: self._number(size)(args))
            for chosen in self.rewritten.chosen:
                note(chosen, args[chosen.index], {name: values[position] for name, position in chosen.positions})
            for index, what in self.rewritten.replaced:
                replace(args[index], made.output(what))
            return tuple(made.output(what) for what in self.rewritten.outputs)

    def run_again(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """As :meth:`run`, by a replay of the last call if possible; otherwise None, and nothing ran."""
        values = None if self.repeated is None else self.repeated.values(args)
        if self.repeated is None or values is None or not self._has_rows_in_place(args):
            return None
        with allocating():
            self._take_room(args)
            made = _Made(args, {}, {}, self.repeated.capture.replay(values), lambda size: self._number(size)(args))
            return tuple(made.output(what) for what in self.rewritten.outputs)

    def _found_by(self, args: Sequence[Any]) -> Repeated | None:
        """The record of the last replayed call; None: no replay, or a handle was read densely or replaced."""
        capture = None if self.replayed is None else self.replayed.latest
        if capture is None:
            return None
        passed = {i: what.index for i, what in enumerate(self.rewritten.inputs) if isinstance(what, plan.Passed)}
        stays = all(isinstance(what, plan.SameHandle) for _, what in self.rewritten.replaced)
        if not stays or any(isinstance(args[i], Handle) for i in passed.values()):
            return None
        return Repeated(args, capture, passed, self.fetchers)

    def _put_rows_in_place(self, args: Sequence[Any], stores: Mapping[int, Any]) -> None:
        """Order the rows of caches of fixed size as the graph expects: rolling, or position p in row p."""
        for index, rolling in self.rewritten.sides:
            store = stores[index] if index in stores else args[index].store
            if rolling:
                store.roll()
            else:
                store.unroll()

    def _has_rows_in_place(self, args: Sequence[Any]) -> bool:
        return all(args[what.index].store.rolling == what.rolling for what in self.rewritten.written)

    def _take_room(self, args: Sequence[Any]) -> None:
        """Count the rows written by a call into caches of fixed size; raises if they do not fit."""
        keys = [(args[index].store, number(args)) for index, number in self.written_rows]
        if any(store.written is None or store.written + n > store.capacity for store, n in keys):
            self._ask_for_room(args, keys)
        for store, n in keys:
            store.written = None if store.written is None else store.written + n
        for what in self.rewritten.written:
            if what.rolling:
                args[what.index].store.written = args[what.index].store.capacity

    def _ask_for_room(self, args: Sequence[Any], keys: list[tuple[Packed, int]]) -> None:
        if self.starts is None:
            return
        first, others = self.starts(*args)
        start = int(first)
        if others and any(store.is_full for store, _ in keys):
            raise BeginsAgain
        for store, n in keys:
            if start + n > store.capacity:
                raise CacheFull(
                    f"a cache of {store.capacity} tokens was to take {n} more after {start}; nothing was "
                    "written. Make it for more tokens (max_cache_len)."
                )
            store.written = start

    def _replayed(self, own: frozenset[int]) -> Replayed | None:
        """Replays of the graph, if it writes only to caches of fixed size, in place; else None."""
        new = (*self.rewritten.outputs, *(what for _, what in self.rewritten.replaced))
        stays = all(isinstance(what, plan.Returned | plan.Constant | plan.SameHandle) for what in new)
        in_their_places = self.rewritten.written and stays and not (self.rewritten.appended or self.rewritten.copied)
        if isinstance(self.lowered, Eager) or not in_their_places:
            return None
        in_place = own | self.written
        placed = [
            isinstance(what, plan.FromStore) or (isinstance(what, plan.Passed) and what.index in in_place)
            for what in self.rewritten.inputs
        ]
        return Replayed(self.lowered, self.launched, [i for i, is_placed in enumerate(placed) if is_placed])

    def _is_long(self, args: Sequence[Any]) -> bool:
        """Whether a call is a chunk of a prompt: its launch costs little, and a capture would hold much memory."""
        return any(number(args) > MAX_STEP_QUERIES for _, number in self.written_rows)

    def _reserved(self, args: Sequence[Any], counts: dict[int, int]) -> dict[int, Any]:
        """Stores with room for the call's tokens; their first token is in the row that the graph expects."""
        stores = {index: args[index].store.reserve(n) for index, n in counts.items()}
        moving = {i for group in self.bounded for i in group if len({stores[j].counters.oldest for j in group}) == 1}
        for index in stores.keys() - moving:
            if stores[index].counters.oldest:
                store = stores[index]
                stores[index] = store.from_zero(store.side.capacity_for(store.length + counts[index])).reserve(
                    counts[index]
                )
        return stores

    def _fetcher(self, what: plan.Input) -> Fetch:
        """A function from the caller's inputs and the reserved stores to an input of the lowered graph."""
        if isinstance(what, plan.Passed):
            return _passed(what.index, what.index in self.written)
        if isinstance(what, plan.FromStore):
            return _from_store(what.index, what.part.name)
        if isinstance(what, plan.Size):
            number = self._number(what.size)
            return lambda args, stores: number(args)
        index, name = what.indices[0], what.name
        return lambda args, stores: stores[index].counter(name)

    def _number(self, size: Any) -> Callable[[Sequence[Any]], int]:
        """A function from the caller's inputs to the value of a size of the caller's graph."""
        if isinstance(size, int):
            return lambda args: size
        expr = size.node.expr
        return lambda args: int(expr.subs({s: args[i] for s, i in self.symbols.items() if s in expr.free_symbols}))


def _passed(index: int, written: bool) -> Fetch:
    def fetch(args: Sequence[Any], stores: Mapping[int, Any]) -> Any:
        arg = args[index]
        if not isinstance(arg, Handle):
            return writable(arg) if written else arg
        return arg.densify() if written else arg.dense()

    return fetch


def _from_store(index: int, name: str) -> Fetch:
    def fetch(args: Sequence[Any], stores: Mapping[int, Any]) -> Tensor:
        store = stores[index] if index in stores else args[index].store
        rows = store.rows.parts
        part: Tensor = rows[name] if name in rows else store.own[name]
        return part

    return fetch


def _dims(what: plan.Input, placeholders: Sequence[Any]) -> Dims:
    """The varying sizes of a lowered graph's input; equal sizes of one name share a symbol."""
    if isinstance(what, plan.Size):
        return Dims(number=True)
    if isinstance(what, plan.Counter):
        return Dims(number=True, named=(what.name,))
    if isinstance(what, plan.FromStore):
        named = (f"{what.part.name}_{axis}" if axis >= 2 else f"axis_{axis}" for axis in what.varying)
        return Dims(what.varying, tuple(named))
    value = value_of(placeholders[what.index])
    if isinstance(value, SymInt):
        return Dims(number=True, named=("length",))
    if not isinstance(value, Tensor):
        return Dims()
    varying = tuple(axis for axis, size in enumerate(value.shape) if isinstance(size, SymInt))
    return Dims(varying, strided=any(isinstance(n, SymInt) for n in (*value.shape, *value.stride())))


@dataclass
class _Made:
    """Makes the caller's outputs; outputs on the same store share one cell, whatever their layouts."""

    args: Sequence[Any]
    stores: dict[int, Any]
    counts: dict[int, int]
    values: Sequence[Any]
    number: Callable[[Any], int]
    made: dict[Any, Cell] = field(default_factory=dict)

    def output(self, what: plan.Output) -> Any:
        if isinstance(what, plan.Returned):
            return self.values[what.position]
        if isinstance(what, plan.Constant):
            return what.value
        if isinstance(what, plan.SameHandle):
            return self.args[what.index]
        if isinstance(what, plan.CopiedHandle):
            return self.args[what.index].with_store(self.stores[what.index])
        key = (type(what), what.index if isinstance(what, plan.GrownStore) else what.positions)
        if key not in self.made:
            self.made[key] = Cell(self._store(what))
        handle = handle_for(self.made[key], what.layout)
        if isinstance(what, plan.NewStore):
            handle.mark_encoded()
        return handle

    def _store(self, what: plan.NewStore | plan.GrownStore) -> Store:
        parts = {name: self.values[position].contiguous() for name, position in what.positions}
        if isinstance(what, plan.NewStore):
            length = self.number(what.length)
            what.format.check(parts, length)
            store = Packed.made(what.of, what.format.side(what.of), parts, what.dtype, length, fixed=what.fixed)
            store.written = None if what.written is None else self.number(what.written)
            return store
        store = self.stores[what.index].appended(parts, self.counts[what.index])
        return store if what.length is None else store.tail(self.number(what.length))


class Undone:
    """Runs a lowered graph; after a failure midway, the windows of caches of fixed size are restored.

    A second attempt then sees the same whole rows in every layer, also in layers already run in the first attempt.
    Encoded rows are not restored: the second attempt writes them before reading them. The window is not restored after
    a single token either: the token's row replaces a row outside the new window.
    """

    def __init__(self, lowered: Eager | Inductor, rewritten: plan.Rewritten) -> None:
        self.lowered = lowered
        steps = all(isinstance(what.tokens, int) and what.tokens == 1 for what in rewritten.written)
        fixed = {index for index, _ in rewritten.sides}
        stored = [(i, x) for i, x in enumerate(rewritten.inputs) if isinstance(x, plan.FromStore) and x.part.replaced]
        self.places = [i for i, x in stored if x.index in fixed and (x.part.name == COUNTERS or not steps)]

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        before = [values[i].clone() for i in self.places]
        try:
            return self.lowered(values)
        except BaseException:
            for i, tensor in zip(self.places, before, strict=True):
                values[i].copy_(tensor)
            raise


class PackedInputs:
    """Finds the inputs of a graph whose handles a call can use packed; the graph gets the others densely.

    Handles on caches of fixed size do not change from step to step, so a positive result is remembered for them.
    """

    def __init__(self, sites: Sequence[CacheSite]) -> None:
        self.sites = [site for site in sites if site.past is not None]
        self.known: dict[tuple[int, ...], tuple[FormatOf, Known]] = {}

    def of(self, args: Sequence[Any], format_of: FormatOf) -> frozenset[int]:
        """The indices of the usable inputs."""
        return frozenset(i for site in self.sites if self._usable(site, args, format_of) for i in site.past or ())

    def windows_apart(self, args: Sequence[Any], packed: frozenset[int]) -> bool:
        """Whether growing caches of equal length have different windows, because their histories differ."""
        windows: dict[Any, tuple[int, ...]] = {}
        for site in self.sites:
            if site.past is None or site.in_buffer or not packed.issuperset(site.past):
                continue
            for store in (args[index].store for index in site.past):
                rule = store.length, store.side.window_rule
                if store.side.has_ring and windows.setdefault(rule, store.window) != store.window:
                    return True
        return False

    def _usable(self, site: CacheSite, args: Sequence[Any], format_of: FormatOf) -> bool:
        assert site.past is not None
        before, pair = self.known.get(site.past), [args[index] for index in site.past]
        if before is not None and before[0] == format_of and before[1].are(pair):
            return True
        usable = _usable(site, args, format_of)
        if usable and site.in_buffer:
            self.known[site.past] = format_of, Known(pair)
        return usable


def _usable(site: CacheSite, args: Sequence[Any], format_of: FormatOf) -> bool:
    assert site.past is not None
    handles = [args[index] for index in site.past]
    if not all(isinstance(handle, Handle) for handle in handles):
        return False
    for handle in handles:
        handle.check_unwritten()
    if not all(map(_lies_as, handles, site.tensors)):
        return False
    stores = [handle.store for handle in handles]
    if not all(isinstance(store, Packed) and store.grows != site.in_buffer for store in stores):
        return False
    format = site.format(format_of)
    sides = [format.side(of) for of, _ in site.sides]
    return len({store.length for store in stores}) == 1 and [store.side for store in stores] == sides


def _lies_as(handle: Handle, tensor: CacheTensor) -> bool:
    """Whether a handle has the layout expected by the graph."""
    assert handle.store is not None
    return same_layout(handle.axes, tensor.join.past_layout, handle.store.logical_shape)
