"""Repeated steps: a replayed call is recorded, and the next call only compared with the record.

Finding the usable handles, their stores and all inputs of the lowered graph takes the host longer than launching a
captured graph. In a decode on caches of fixed size, all of these stay the same from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from think_compile.cache.handle import Handle
from think_compile.runtime.capture import Capture, look

Fetch = Callable[[Sequence[Any], Mapping[int, Any]], Any]


class Known:
    """The handles of a call and their stores, as weak references."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.found = [
            (weakref.ref(handle), weakref.ref(handle.store)) for handle in handles if handle.store is not None
        ]

    def are(self, given: Sequence[Any]) -> bool:
        """True if ``given`` are the known handles on their known stores; raises as :meth:`.Handle.check_unwritten`."""
        for one, (handle, store) in zip(given, self.found, strict=True):
            known = handle()
            if known is None or one is not known or known.store is not store():
                return False
            known.check_unwritten()
        return True


class Repeated:
    """A replayed call, and the check that a later call may use the same replay.

    A store of fixed size is written in place: while a handle keeps its store, the tensors keep their addresses.
    """

    def __init__(self, args: Sequence[Any], capture: Capture, passed: Mapping[int, int], fetchers: list[Fetch]) -> None:
        """``passed``: input of the lowered graph -> index in ``args``, for inputs passed through."""
        self.capture = capture
        self.handles = [i for i, x in enumerate(args) if isinstance(x, Handle)]
        self.known = Known([args[i] for i in self.handles])
        self.placed = [passed[i] for i in capture.signature.placed if i in passed]
        self.large = [passed[i] for i in capture.signature.large]
        self.pointers = self._pointers(args)
        self.others = [(i, fetchers[i]) for i in capture.signature.others]

    def _pointers(self, args: Sequence[Any]) -> list[int]:
        return list(map(Tensor.data_ptr, [args[i] for i in self.placed]))

    def values(self, args: Sequence[Any]) -> dict[int, Any] | None:
        """The inputs to copy for the capture, by position; None: the call differs from the recorded one.

        Raises as :meth:`.handle.Handle.check_unwritten`.
        """
        if not self.known.are([args[i] for i in self.handles]) or self._pointers(args) != self.pointers:
            return None
        if [look(args[i]) for i in self.large] != self.capture.signature.large_looks:
            return None
        values = {i: fetch(args, {}) for i, fetch in self.others}
        return values if list(map(look, values.values())) == self.capture.signature.looks else None
