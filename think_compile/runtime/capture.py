"""Replays of a lowered graph: one CUDA graph for all steps of a decode on a cache of fixed size.

A call replays the capture of an earlier call if its tensors have the same addresses. Parameters and stores are read
and written in place. Other inputs are copied to the addresses expected by the capture. Outputs are copied as well: the
next replay must not change the caller's tensors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from think_compile.runtime.lower import Inductor

log = logging.getLogger(__name__)

MAX_CAPTURES = 8  # per graph; a ninth replaces the oldest
ATTEMPTS = 3  # failed captures before giving up: a shortage of memory may be temporary
Launched = Callable[[Sequence[Any]], Sequence[Any]]
LARGE = 16 * 2**20  # bytes; inputs from this size on are read in place: a new address needs a new capture


class Replayed:
    """A lowered graph with its captures; the inputs ``in_place`` are parameters or caches with fixed addresses."""

    def __init__(self, lowered: Inductor, launched: Launched, in_place: Sequence[int]) -> None:
        """``launched`` runs ``lowered`` without capture or replay."""
        self.lowered, self.launched, self.in_place = lowered, launched, frozenset(in_place)
        self.captures: list[Capture] = []
        self.latest: Capture | None = None  # replayed by the last call
        self.seen: Signature | None = None  # of the last call that was not replayed
        self.refused, self.failures = "", 0

    def __call__(self, values: Sequence[Any]) -> Sequence[Any]:
        if self.refused:
            return self.launched(values)
        for capture in self.captures:
            if capture.signature.matches(values):
                self.latest = capture
                return capture.replay(values)
        self.latest = None
        signature = Signature(values, self.in_place)
        if signature != self.seen:  # before its capture a graph runs once uncaptured, which also compiles it
            self.seen = signature
            return self.launched(values)
        return self._capture(values, signature)

    def _capture(self, values: Sequence[Any], signature: Signature) -> Sequence[Any]:
        """Capture and replay a call; if the capture fails, launch the call, and a later one may try again."""
        self.refused = obstacle(values)
        try:
            capture = None if self.refused else Capture(self.lowered, values, signature)
        except NotCaptured as error:
            log.info("a CUDA graph was not captured: %s", error)
            capture, self.seen, self.failures = None, None, self.failures + 1
            self.refused = str(error) if self.failures == ATTEMPTS else ""
        if self.refused:
            log.warning("steps are launched one by one and not replayed from a CUDA graph: %s", self.refused)
        if capture is None:
            return self.launched(values)
        log.info("captured a CUDA graph")
        self.captures = [capture, *self.captures][:MAX_CAPTURES]
        return capture.replay(values)


class Signature:
    """The conditions of a capture: addresses of the inputs read in place, shapes or values of the others."""

    def __init__(self, values: Sequence[Any], in_place: frozenset[int]) -> None:
        self.placed = [
            i for i, x in enumerate(values) if isinstance(x, Tensor) and (i in in_place or x.nbytes >= LARGE)
        ]
        self.pointers = [values[i].data_ptr() for i in self.placed]
        placed = set(self.placed)
        self.others = [i for i in range(len(values)) if i not in placed]
        self.looks = [look(values[i]) for i in self.others]
        self.large = [i for i in self.placed if i not in in_place]  # the caller's own: shapes may change in place
        self.large_looks = [look(values[i]) for i in self.large]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Signature):
            return NotImplemented
        mine, theirs = ((x.placed, x.pointers, x.looks, x.large_looks) for x in (self, other))
        return mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def matches(self, values: Sequence[Any]) -> bool:
        """Whether ``values`` have this signature: a replay can stand in for running the lowered graph on them."""
        same_places = self.pointers == [values[i].data_ptr() for i in self.placed]
        same_looks = self.large_looks == [look(values[i]) for i in self.large]
        return same_places and same_looks and self.looks == [look(values[i]) for i in self.others]


def look(value: Any) -> Any:
    """A tensor's shape and strides; any other value itself."""
    return (value.shape, value.stride()) if isinstance(value, Tensor) else value


def _without_repeats(x: Tensor) -> tuple[slice, ...] | None:
    """The index of the first element along each expanded axis (stride 0); None: no axis is expanded."""
    if 0 not in x.stride():
        return None
    return tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())


def obstacle(values: Sequence[Any]) -> str:
    """The reason against capturing a call with these inputs; "" for none."""
    devices = {x.device for x in values if isinstance(x, Tensor)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"inputs are on {', '.join(sorted(map(str, devices)))}"
    if any(is_traceable_wrapper_subclass(x) for x in values if isinstance(x, Tensor)):
        return "inputs are tensor subclasses, which do not tell where their numbers lie"
    return ""


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: each costs a workspace. Torch shares one, on the device of the first capture."""
    return torch.cuda.Stream(device)


class NotCaptured(Exception):
    """A call was not captured; the message says why."""


@contextmanager
def _mended(device: torch.device) -> Iterator[None]:
    """Restore the random generator, unusable after a failed capture; raises :class:`NotCaptured`."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    try:
        yield
    except Exception as error:
        generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
        generator.manual_seed(seed).set_offset(offset)
        raise NotCaptured(f"{type(error).__name__}: {error}".splitlines()[0]) from error


class Capture:
    """One CUDA graph, with its input and output tensors."""

    def __init__(self, lowered: Inductor, values: Sequence[Any], signature: Signature) -> None:
        """Raises :class:`NotCaptured`; then nothing of the graph has run."""
        self.signature = signature
        self.copied = [i for i in signature.others if isinstance(values[i], Tensor)]
        self.parts = [_without_repeats(values[i]) for i in self.copied]
        self.inputs = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in self._of(values)
        ]
        given = list(values)
        for i, tensor in zip(self.copied, self.inputs, strict=True):
            given[i] = tensor.expand(values[i].shape)
        if not lowered.is_compiled_for(given):
            raise NotCaptured("it would be compiled anew")
        self.graph = torch.cuda.CUDAGraph()
        device = next(x.device for x in values if isinstance(x, Tensor))
        with (
            torch.cuda.device(device),
            _mended(device),
            torch.cuda.graph(self.graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
        ):
            self.outputs = list(lowered(given))
        self._refuse_aliases(values)

    def _of(self, values: Sequence[Any] | Mapping[int, Any]) -> list[Tensor]:
        """The inputs to copy; expanded ones without their repetitions."""
        given = zip(self.copied, self.parts, strict=True)
        return [values[i] if part is None else values[i][part] for i, part in given]

    def _refuse_aliases(self, values: Sequence[Any]) -> None:
        """Raise if an output shares memory with an input: a replay would return a copy."""
        inputs = {x.untyped_storage().data_ptr() for x in (*values, *self.inputs) if isinstance(x, Tensor)}
        if any(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in inputs for x in self.outputs):
            raise NotCaptured("an output is an input")

    def replay(self, values: Sequence[Any] | Mapping[int, Any]) -> list[Any]:
        """The outputs of a call with ``values``; only the copied inputs are needed."""
        if self.copied:
            torch._foreach_copy_(self.inputs, self._of(values))
        self.graph.replay()
        return [x.clone() if isinstance(x, Tensor) else x for x in self.outputs]
