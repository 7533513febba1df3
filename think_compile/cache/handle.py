"""The handle: a tensor subclass with the logical shape of a cache tensor and a packed store.

The model keeps a handle in place of each cache tensor. Inside a compiled call the runtime swaps in the store's tensors.
Outside, the usual cache operations (batch selection, crops, moves, copies, resets, joins) run on the packed store. Any
other operation gets the decoded, dense tensor: slow, never wrong. A write makes the handle dense. A view of a handle is
a copy; a write to it is detected and raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from think_compile.cache import operations
from think_compile.cache.canonical import BATCH, CANONICAL, TOKEN, Layout, from_canonical, shape_of, token_axis
from think_compile.cache.cell import Cell, Tally
from think_compile.cache.packed import Packed
from think_compile.cache.rows import allocating
from think_compile.cache.store import Dense, NoDenseForm, Store
from think_compile.runtime.running import RUNNING, Running

aten = torch.ops.aten
log = logging.getLogger(__name__)


class LostWrite(RuntimeError):
    """An in-place write went to a copy of packed numbers and is lost."""


class Handle(torch.Tensor):
    """A key or value cache tensor backed by a packed :class:`~think_compile.cache.store.Store`, in any layout.

    Dynamo sees an opaque subclass with one inner tensor, the anchor, and so sets no guards on the store.
    """

    cell: Cell | None
    tally: Tally
    axes: Layout
    anchor: Tensor
    sliced: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, store: Store, layout: Layout = CANONICAL) -> Handle:
        return Handle.on(Cell(store), layout)

    @staticmethod
    def on(cell: Cell, layout: Layout, anchor: Tensor | None = None) -> Handle:
        """A handle in ``layout`` on a cell; ``anchor``: from another handle with the same dtype and device."""
        shape = shape_of(cell.store.logical_shape, layout)
        return Handle._wrap(shape, cell, layout, _anchor(cell.store) if anchor is None else anchor)

    @staticmethod
    def _wrap(shape: Any, cell: Cell | None, layout: Layout, anchor: Tensor) -> Handle:
        self = torch.Tensor._make_wrapper_subclass(Handle, shape, dtype=anchor.dtype, device=anchor.device)
        self.cell, self.tally, self.axes, self.anchor, self.sliced = cell, Tally(), layout, anchor, False
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    # ---------------------------------------------------------------- what Dynamo needs of an opaque subclass

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["anchor"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> Handle:
        return Handle._wrap(size, None, CANONICAL, inner["anchor"])

    # ------------------------------------------------------------------------------- the store, and the dense tensor

    @property
    def store(self) -> Store | None:
        """The packed store; None while Dynamo traces."""
        return None if self.cell is None else self.cell.store

    @store.setter
    def store(self, store: Store) -> None:
        assert self.cell is not None
        self.cell.store = store

    @property
    def is_dense(self) -> bool:
        """Whether the store holds a plain tensor, after an operation with no packed form."""
        return isinstance(self.store, Dense)

    def dense(self) -> Tensor:
        """The logical tensor in the cache's own layout; tokens that have left the window are decoded."""
        if self.cell is None:
            return self._traced_dense()
        self.check_unwritten()
        dense = from_canonical(self.cell.store.dense(), self.axes)
        return dense if self.is_dense else dense.contiguous()  # no copy of a dense store: writes are to reach the cache

    def check_unwritten(self) -> None:
        """Raise if a view of this packed tensor was written to: a view is a copy, so the write is lost."""
        if self.cell is None or self.is_inference() or self._version == self.tally.writes:
            return
        if not self.is_dense:
            raise LostWrite(
                "a view of a packed cache was written to in place, which cannot reach the cache; "
                "assign to the cache itself (cache[...] = values)"
            )

    def _traced_dense(self) -> Tensor:
        """A placeholder of the same shape while Dynamo traces; raises if a graph of another backend reads it."""
        keys = torch._C._TorchDispatchModeKey
        if any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FUNCTIONAL)):
            raise RuntimeError(
                "a packed key/value cache was given to a graph that think_compile did not compile; "
                "pass cache.dense() there, or run that function without torch.compile"
            )
        return self.anchor.new_empty(tuple(self.shape))

    def densify(self) -> Tensor:
        """Make this handle dense from now on, and return the dense tensor, which aliases the handle."""
        assert self.cell is not None
        if not self.is_dense:
            log.info("a packed cache %s becomes dense", tuple(self.shape))
            with allocating():
                self.cell.store = Dense.of(operations.canonical(self.dense(), self.cell.store, self.axes))
        return from_canonical(self.cell.store.dense(), self.axes)

    def pack_anew(self, cell: Cell | None) -> None:
        """Replace the dense store by the packed one in ``cell``, which holds all writes so far."""
        assert cell is not None
        if cell is not self.cell:
            self.tally.writes = 0 if self.is_inference() else self._version
            self.cell = cell

    def put_back(self, store: Store | None) -> None:
        """Restore an earlier ``store`` of this tensor, and so undo all writes since then."""
        assert self.cell is not None and store is not None
        self.cell.store = store
        self.tally.writes = 0 if self.is_inference() else self._version

    def mark_encoded(self) -> None:
        """Note that the running call encoded this cache; the call itself had whole rows."""
        assert self.cell is not None
        running = RUNNING.get()
        self.cell.encoded_in = running and running.token

    def with_store(self, store: Store) -> Handle:
        """A handle in the same layout on another store."""
        anchor = self.anchor if (store.device, store.dtype) == (self.device, self.dtype) else None
        return Handle.on(Cell(store, self.cell), self.axes, anchor)

    def clone_packed(self) -> Handle:
        """A copy that shares no memory."""
        assert self.store is not None
        return self.with_store(operations.clone(self.store, self.axes))

    # -------------------------------------------------------------------------------- operations on the handle

    def share_memory_(self) -> NoReturn:
        """Raises: a packed cache has no single memory to share between processes."""
        raise RuntimeError("a packed cache cannot be moved to shared memory; use cache.dense().share_memory_()")

    def storage(self) -> NoReturn:
        """Raises: the packed store is several tensors, none of this shape."""
        _refuse_memory("storage()")

    def data_ptr(self) -> NoReturn:
        """Raises as :meth:`storage`."""
        _refuse_memory("data_ptr()")

    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the dense numbers."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """The dense numbers."""
        return self.dense().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False and not self.is_dense:
            raise ValueError("a packed cache becomes an array by a copy only")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, **options: Any) -> Any:
        """A capsule of a copy of the dense numbers."""
        return self.dense().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.dense().__dlpack_device__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kind = "traced" if self.store is None else self.store.kind
        return f"Handle({tuple(self.shape)}, {self.dtype}, {self.device}, {kind})"

    def __copy__(self) -> Handle:
        return _alias(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        if id(self) not in memo:
            with allocating():
                memo[id(self)] = self.clone_packed()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Handle, (self.clone_packed().store, self.axes)

    def __getitem__(self, index: Any) -> Tensor:
        """As in torch, but a crop of the tokens is packed and is not a view that autograd tracks."""
        tokens = operations.token_range(self.axes, index)
        cropped = None if tokens is None or self.store is None else _slice(self, token_axis(self.axes), *tokens)
        return super().__getitem__(index) if cropped is None else cropped

    def __setitem__(self, index: Any, value: Any) -> None:
        """As in torch; the cache is dense from then on."""
        if self.store is not None:
            _refuse_slices(self, "assignment")
            self.densify()
        super().__setitem__(index, value)

    def narrow(self, dim: int, start: int | Tensor, length: int) -> Tensor:  # type: ignore[override]
        """As in torch; a crop of the tokens stays packed."""
        inside = isinstance(start, int) and 0 <= start <= start + length <= self.shape[dim]
        if inside and self.axes[dim] == (TOKEN,):
            return self[(slice(None),) * (dim % self.dim()) + (slice(start, start + length),)]
        return super().narrow(dim, start, length)

    def repeat_interleave(  # type: ignore[override]
        self, repeats: int | Tensor, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        """As in torch; along the batch the result stays packed."""
        if dim is not None and self.axes[dim] == (BATCH,) and self.store is not None:
            with allocating():
                return self.with_store(self.store.map_batch(lambda t: t.repeat_interleave(repeats, 0)))
        return self.dense().repeat_interleave(repeats, dim, output_size=output_size)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Handle) else None
        if first is not None and first.cell is None and func in (aten.detach.default, aten.alias.default):
            return Handle._wrap(first.shape, None, first.axes, first.anchor)
        operation = _cat if func is aten.cat.default else _PACKED.get(func)
        if operation is not None and (func is aten.cat.default or (first is not None and first.cell is not None)):
            if first is not None:
                first.check_unwritten()
            with allocating():
                result = operation(*args, **kwargs)
            if result is not None:
                return result
        return _on_dense(func, args, kwargs)


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """Run ``func`` on dense tensors; a handle that it writes to becomes dense itself."""
    if torch.Tag.inplace_view in func.tags:
        raise RuntimeError(f"{func}: the shape of a packed cache cannot be changed in place; use cache.dense()")
    schema = func._schema.arguments
    written = {s.name for s in schema if s.alias_info is not None and s.alias_info.is_write}
    named = {**{s.name: a for s, a in zip(schema, args, strict=False)}, **kwargs}
    targets = [a for name, a in named.items() if name in written and isinstance(a, Handle)]
    for target in targets:
        _refuse_slices(target, func)
    _warn_if_just_encoded(func, named)
    log.debug("%s on a packed cache runs on the dense tensor", func)
    with allocating(), _named(func):  # a handle is no inference tensor, so its views must be none
        plain = {name: _dense_argument(a, name in written) for name, a in named.items()}
        result = func(*[plain[s.name] for s, _ in zip(schema, args, strict=False)], **{k: plain[k] for k in kwargs})
    return targets[0] if len(targets) == 1 else result


@contextmanager
def _named(func: Any) -> Iterator[None]:
    """Name the operation that has no result on a cache without a dense form."""
    try:
        yield
    except NoDenseForm as error:
        raise NoDenseForm(f"{func}: {error}") from None


def _warn_if_just_encoded(func: Any, arguments: dict[str, Any]) -> None:
    """Warn if code after a graph break reads a cache that the same call compressed: it reads decoded rows."""
    running = RUNNING.get()
    if running is not None and any(_was_encoded_in(x, running) for x in pytree.tree_leaves(arguments)):
        running.warn(
            f"after a graph break, {func} reads a cache that the same call has just compressed: it sees decoded rows, "
            "not those of the call. TORCH_LOGS=graph_breaks names the breaks"
        )


def _was_encoded_in(x: Any, running: Running) -> bool:
    if not isinstance(x, Handle) or x.cell is None or x.cell.encoded_in is not running.token:
        return False
    return isinstance(x.cell.store, Packed) and x.cell.store.is_lossy


def _anchor(store: Store) -> Tensor:
    """A one-element tensor with a handle's dtype and device."""
    return torch.empty(1, dtype=store.dtype, device=store.device)


def _refuse_memory(what: str) -> NoReturn:
    raise RuntimeError(f"{what}: a packed cache has no memory of its shape; cache.dense() is a plain tensor")


def _refuse_slices(handle: Handle, what: Any) -> None:
    if handle.sliced:
        raise RuntimeError(
            f"{what}: writing in place to a slice of a packed cache would not reach the cache; "
            "write to the cache itself, or to slice.dense()"
        )


def _dense_argument(argument: Any, written: bool) -> Any:
    def plain(handle: Handle) -> Tensor:
        return handle.densify() if written and handle.cell is not None else handle.dense()

    return pytree.tree_map_only(Handle, plain, argument)


# ---------------------------------------------- operations on the packed store; None: use the dense tensor instead


def _alias(handle: Handle) -> Handle:
    alias = Handle._wrap(handle.shape, handle.cell, handle.axes, handle.anchor)
    alias.sliced, alias.tally = handle.sliced, handle.tally
    return alias


def _slice(handle: Handle, *args: Any, **kwargs: Any) -> Handle | None:
    assert handle.store is not None
    store = operations.slice_of(handle.store, handle.axes, *args, **kwargs)
    if store is None or store is handle.store:
        return None if store is None else _alias(handle)
    part = handle.with_store(store)
    part.sliced = True
    return part


def _zero_(handle: Handle) -> Handle | None:
    if handle.sliced or not isinstance(handle.store, Packed) or handle.store.grows:
        return None
    if handle.store.side.evicts:  # the next call is a first call again, and selects
        handle.store = Dense.of(torch.zeros(handle.store.logical_shape, dtype=handle.dtype, device=handle.device))
    else:
        handle.store.clear()
    handle.tally.writes += 1  # autograd counts this write too
    return handle


def _cat(tensors: list[Tensor], dim: int = 0) -> Handle | None:
    """Joins: new tokens after a growing cache, or batches of growing caches with the same history."""
    tensors = [t for t in tensors if t.dim() != 1 or t.numel()]  # torch skips empty 1-d tensors in joins
    first, *others = tensors
    if not isinstance(first, Handle) or first.store is None:
        return None
    store = None
    if first.axes[dim] == (TOKEN,) and not any(isinstance(t, Handle) for t in others):
        store = operations.append(first.store, first.axes, others)
    elif first.axes[dim] == (BATCH,) and all(_is_alike(t, first) for t in others):
        store = operations.join_batches([t.store for t in tensors])  # type: ignore[attr-defined]
    return None if store is None else first.with_store(store)


def _is_alike(other: Tensor, handle: Handle) -> bool:
    return isinstance(other, Handle) and other.axes == handle.axes and other.dtype == handle.dtype


def _made_by(operation: Callable[..., Store | None]) -> Callable[..., Handle | None]:
    def on_handle(handle: Handle, *args: Any, **kwargs: Any) -> Handle | None:
        assert handle.store is not None
        store = operation(handle.store, handle.axes, *args, **kwargs)
        return None if store is None else handle.with_store(store)

    return on_handle


_PACKED: dict[Any, Callable[..., Handle | None]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.lift_fresh.default: _alias,
    aten.slice.Tensor: _slice,
    aten.zero_.default: _zero_,
    **{func: _made_by(operation) for func, operation in operations.OPERATIONS.items()},
}


def handle_for(cell: Cell, layout: Layout) -> Handle:
    """The handle that a compiled call returns. A growing cache's token axis is dynamic, so that no step recompiles.

    A cache of fixed size keeps a static axis: a graph with symbols takes longer to trace.
    """
    handle = Handle.on(cell, layout)
    if cell.store.grows:
        torch._dynamo.maybe_mark_dynamic(handle, token_axis(layout))
    return handle
