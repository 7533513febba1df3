"""The interface of the stores behind cache tensors, and the store of a plain tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from think_compile.cache.rows import Rows


class NoDenseForm(RuntimeError):
    """An operation needs the dense tensor of a cache whose first call is not stored completely."""


class Store(ABC):
    """The interface of all stores. ``length`` is the number of readable rows: tokens, or the size of a buffer."""

    rows: Rows
    dtype: torch.dtype  # of the tensor that the model sees

    def __post_init__(self) -> None:
        self.rows.owners.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rows.owners.add(self)

    @property
    def length(self) -> int:
        return self.rows.capacity

    @property
    def end(self) -> int:
        """One more than the last token's row."""
        return self.length

    @property
    def used(self) -> int:
        """One more than the last token with an encoded row."""
        return self.end

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the logical tensor."""

    @property
    def grows(self) -> bool:
        """Whether tokens may be appended beyond the allocated rows."""
        return False

    @property
    def kind(self) -> str:
        """A short description."""
        return "dense"

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that hold memory, by the names of their parts."""
        yield from self.rows.parts.items()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that hold memory."""
        yield from (tensor for _, tensor in self.named_tensors())

    @abstractmethod
    def dense(self) -> Tensor:
        """The logical tensor [B, H, length, W]."""

    @abstractmethod
    def map_batch(self, f: Callable[[Tensor], Tensor]) -> Store:
        """A new store with ``f`` applied to every tensor with a batch axis (axis 0)."""

    @abstractmethod
    def to(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False) -> Store:
        """A copy on another device or in another dtype; indices and lengths keep theirs."""

    @property
    def logical_shape(self) -> tuple[int, int, int, int]:
        batch, heads = next(iter(self.rows.parts.values())).shape[:2]
        return batch, heads, self.length, self.width

    @property
    def device(self) -> torch.device:
        return next(iter(self.rows.parts.values())).device


@dataclass(eq=False)
class Dense(Store):
    """A plain tensor in canonical axes: the store of a handle after an operation with no packed form."""

    rows: Rows

    @classmethod
    def of(cls, tensor: Tensor) -> Dense:
        """The store of ``tensor`` [B, H, S, W]."""
        return cls(Rows({"rows": tensor}))

    @property
    def tensor(self) -> Tensor:
        return self.rows.parts["rows"]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.tensor.dtype

    @property
    def width(self) -> int:
        return self.tensor.shape[-1]

    def dense(self) -> Tensor:
        return self.tensor

    def map_batch(self, f: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(self.rows.map(f))

    def to(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool = False) -> Dense:
        return Dense.of(self.tensor.to(device, dtype, non_blocking=non_blocking, copy=True))
