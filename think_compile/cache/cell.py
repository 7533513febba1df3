"""What several handles share: the place of a cache tensor's store, and the count of their own writes."""

from __future__ import annotations

import weakref

from think_compile.cache.store import Packed, Store


class Cell:
    """A cache tensor's place: its store now, shared by the aliases of the tensor.

    Attributes:
        store: the store; a write to the tensor that no packed form can express puts a dense one here.
        of_keys: whether the tensor holds keys.
        family: the living cells of one model's caches, for the report.
        encoded_in: the call that stored this cache, its first.
    """

    def __init__(self, store: Store, parent: Cell | None = None) -> None:
        """``parent``: the cell of the tensor that this one is made of."""
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
    """How often a tensor and its aliases have written to their cell themselves: autograd counts other writes too."""

    def __init__(self) -> None:
        self.writes = 0
