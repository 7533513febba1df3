"""Row buffers shared by the stores of successive calls, and the allocation of memory that outlives a call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from think_compile.cache.state import State


def allocating() -> AbstractContextManager[Any]:
    """Allocate tensors that outlive the call: no inference tensors, since later calls could not write to them."""
    stack = ExitStack()
    stack.enter_context(torch.no_grad())
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    return stack


def writable(tensor: Tensor) -> Tensor:
    """The tensor; for an inference tensor, a writable alias on the same memory."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Rows:
    """Buffers [B, H, C, *] that are appended to in place, shared by the stores of successive calls."""

    def __init__(self, parts: State) -> None:
        self.parts = parts
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.parts, self.owners = state["parts"], weakref.WeakSet()

    @property
    def capacity(self) -> int:
        """Number of records."""
        return next(iter(self.parts.values())).shape[2]

    def free_above(self, used: int, owner: object) -> bool:
        """Whether no store but ``owner`` uses tokens' rows from ``used`` on."""
        return all(other is owner or other.used <= used for other in self.owners)

    def copy(self, first: int, length: int, capacity: int) -> Rows:
        """A copy of ``length`` records from ``first`` on, with ``capacity`` records; those above are zero."""

        def moved(x: Tensor) -> Tensor:
            copy = x.new_zeros([capacity if axis == 2 else size for axis, size in enumerate(x.shape)])
            copy[:, :, :length] = x[:, :, first : first + length]
            return copy

        with allocating():
            return self.map(moved)

    def map(self, f: Callable[[Tensor], Tensor]) -> Rows:
        return Rows({name: f(x) for name, x in self.parts.items()})
