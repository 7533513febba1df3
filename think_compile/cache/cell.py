"""State shared by handles: the cell with a cache tensor's store, and a count of their own writes."""

from __future__ import annotations

import weakref

from think_compile.cache.packed import Packed
from think_compile.cache.store import Store


class Cell:
    """The current store of a cache tensor, shared by the aliases of the tensor.

    Attributes:
        store: the store; a write without a packed form puts a dense one here.
        of_keys: whether the tensor holds keys.
        family: the live cells of one model's caches, for the report.
        encoded_in: the first call on this cache, which encoded it.
    """

    def __init__(self, store: Store, parent: Cell | None = None) -> None:
        """``parent``: the cell of the tensor from which this one is made."""
        self.store = store
        of_keys = isinstance(store, Packed) and store.of == "keys"
        self.of_keys: bool = of_keys if parent is None else parent.of_keys
        self.family: weakref.WeakSet[Cell] | None = None
        self.encoded_in: object = None
        if parent is not None and parent.family is not None:
            self.join(parent.family)

    def join(self, family: weakref.WeakSet[Cell]) -> None:
        """Become a member of ``family``."""
        self.family = family
        family.add(self)


class Tally:
    """Counts the writes of a tensor and its aliases to their own cell; autograd's version counts other writes too."""

    def __init__(self) -> None:
        self.writes = 0
