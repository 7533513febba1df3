"""The holders of a tensor: modules of a model, and containers among a call's arguments.

A cache that is written in place frees memory only if every holder releases its dense tensor.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

Place = tuple[Any, Any]  # a dict or list, and the tensor's key or index in it
_LEAVES = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, int, float)


def holders(tensor: Tensor, model: nn.Module | None, arguments: Any) -> list[Place]:
    """The places in the model's modules and in the ``arguments`` of its call that hold this tensor object."""
    places = [d for m in model.modules() for d in (m._buffers, m.__dict__)] if model is not None else []
    found: list[Place] = []
    for place in (*places, *_containers(arguments)):
        items = place.items() if isinstance(place, dict) else enumerate(place)
        found += [(place, name) for name, held in items if held is tensor]
    return found


def owns_its_storage(tensor: Tensor) -> bool:
    """Whether a tensor is no view of another, through which its numbers could also be read and changed."""
    return tensor._base is None and tensor.untyped_storage().nbytes() == tensor.nbytes


def _containers(value: Any) -> Iterator[dict[Any, Any] | list[Any]]:
    """All dicts and lists reachable from ``value``, including the attribute dicts of objects."""
    waiting, seen = [value], set[int]()  # no recursion: arguments may nest deeper than Python's limit
    while waiting:
        value = waiting.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        inside = value if isinstance(value, (dict, list, tuple, set)) else getattr(value, "__dict__", None)
        if isinstance(inside, (dict, list)):
            yield inside
        held = list(inside.values() if isinstance(inside, dict) else inside or ())
        if isinstance(value, dict) and hasattr(value, "__dict__"):
            held.insert(0, value.__dict__)
        waiting += reversed(held)
