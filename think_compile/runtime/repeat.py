"""A step like the last: what a replayed call found is remembered, so that the next one need only be compared with it.

Finding the handles that can be used, their stores and every input of the lowered graph takes the host longer than
launching a captured graph. In a decode on fixed caches all of it stays the same from step to step.
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
    """Handles, and the stores behind them, as a call found them; it keeps none alive."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.found = [
            (weakref.ref(handle), weakref.ref(handle.store)) for handle in handles if handle.store is not None
        ]

    def are(self, given: Sequence[Any]) -> bool:
        """Whether these are they; raises as :meth:`.handle.Handle.check_unwritten`."""
        for one, (handle, store) in zip(given, self.found, strict=True):
            known = handle()
            if known is None or one is not known or known.store is not store():
                return False
            known.check_unwritten()
        return True


class Repeated:
    """A replayed call, and how to tell that another may be replayed in the same way.

    The stores of fixed caches are places: while a handle has the same store, its tensors lie where they lay.
    """

    def __init__(self, args: Sequence[Any], capture: Capture, passed: Mapping[int, int], fetchers: list[Fetch]) -> None:
        """``passed``: for the inputs of the lowered graph that are the caller's own, which of ``args`` they are."""
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
        """The inputs that the capture takes copies of, by place; None: the call differs from the remembered one.

        Raises as :meth:`.handle.Handle.check_unwritten`.
        """
        if not self.known.are([args[i] for i in self.handles]) or self._pointers(args) != self.pointers:
            return None
        if [look(args[i]) for i in self.large] != self.capture.signature.large_looks:
            return None
        values = {i: fetch(args, {}) for i, fetch in self.others}
        return values if list(map(look, values.values())) == self.capture.signature.looks else None
