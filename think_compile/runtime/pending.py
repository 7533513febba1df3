"""First calls whose keys and values stay the caller's own tensors: a later call packs them.

If a graph break separates projection and attention, no graph proves the keys to be a cache. The attention's graph then
notes its choice for their rows, and the tensors stay the caller's. A later call with these tensors as its past packs
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from think_compile.cache.canonical import CHANNEL, HEAD, to_canonical
from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle, handle_for
from think_compile.cache.packed import Packed
from think_compile.cache.rows import allocating
from think_compile.cache.state import State
from think_compile.formats.base import CacheFormat, Side
from think_compile.passes.prove.site import CacheSite, CacheTensor, FormatOf
from think_compile.passes.rewrite.plan import Chosen


class _Note(NamedTuple):
    """The choice for a tensor's rows, their later side, and the tensor's version at the time of the choice."""

    chosen: State
    side: Side
    version: int | None


class Pending:
    """The choices of first calls, by key or value tensor; valid while the tensor lives and is not written to."""

    def __init__(self) -> None:
        self.notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def note(self, what: Chosen, tensor: Tensor, chosen: State) -> None:
        """Record a first call's choice for ``tensor``."""
        if not isinstance(tensor, Handle):
            self.notes[tensor] = _Note(chosen, what.format.side(what.of), _version(tensor))

    def take_up(self, args: Sequence[Any], sites: Sequence[CacheSite], format_of: FormatOf) -> Sequence[Any]:
        """``args``, with handles for pasts with a recorded choice."""
        if not self.notes:
            return args
        taken = list(args)
        for site, format in self._known(args, sites, format_of):
            for (of, tensor), index in zip(site.sides, site.past or (), strict=True):
                taken[index] = _packed(args[index], of, format.side(of), tensor, self.notes[args[index]].chosen)
        return taken

    def _known(
        self, args: Sequence[Any], sites: Sequence[CacheSite], format_of: FormatOf
    ) -> Iterator[tuple[CacheSite, CacheFormat]]:
        for site in sites:
            if site.past is None or site.in_buffer or site.window is not None:
                continue
            format = site.format(format_of)
            past = [(args[i], format.side(of)) for i, (of, _) in zip(site.past, site.sides, strict=True)]
            if all(self._is_noted(tensor, side, site.keys.size(HEAD)) for tensor, side in past):
                yield site, format

    def _is_noted(self, tensor: Tensor, side: Side, heads: Any) -> bool:
        if isinstance(tensor, Handle) or tensor not in self.notes:
            return False
        note = self.notes[tensor]
        same_heads = all(x.shape[1] == heads for x in note.chosen.values())
        return bool(same_heads and note.side == side and note.version == _version(tensor))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _packed(past: Tensor, of: str, side: Side, tensor: CacheTensor, chosen: State) -> Handle:
    layout = tensor.join.past_layout
    assert layout is not None
    with allocating():
        rows = to_canonical(past.detach(), layout, int(tensor.size(HEAD)), int(tensor.size(CHANNEL)))
        length = rows.shape[2]
        state = side.pack(rows, chosen, length, side.capacity_for(length), fixed=False)
        state = {name: x.contiguous() for name, x in state.items()}
        return handle_for(Cell(Packed.made(of, side, state, past.dtype, length)), layout)
