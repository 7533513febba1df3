"""The inputs and outputs of a rewritten graph: the sources of its inputs, and how the caller's outputs are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from think_compile.cache.canonical import Layout
from think_compile.cache.state import Part
from think_compile.formats.base import CacheFormat

# ------------------------------------------------------------------------- where the new graph's inputs come from


@dataclass(frozen=True)
class Passed:
    """Input ``index`` of the caller, as a plain tensor or number."""

    index: int


@dataclass(frozen=True)
class FromStore:
    """A part of the store of the handle at input ``index``; ``varying``: axes of dynamic size."""

    index: int
    part: Part
    varying: tuple[int, ...]


@dataclass(frozen=True)
class Counter:
    """A counter of the growing stores at these inputs, the same in all.

    ``name``: "length", "oldest", "window_start" or "evicted".
    """

    indices: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Size:
    """A number computed from sizes of the caller's inputs."""

    size: Any


Input = Passed | FromStore | Counter | Size


# ------------------------------------------------------------------------ how the caller's outputs are made


@dataclass(frozen=True)
class Returned:
    """Output ``position`` of the new graph."""

    position: int


@dataclass(frozen=True)
class Constant:
    """A constant value of the caller's graph."""

    value: Any


Positions = tuple[tuple[str, int], ...]  # part's name and its output of the new graph, for a side


@dataclass(frozen=True)
class NewStore:
    """A new cache of ``length`` tokens, the "keys" or "values" of a format, made of the graph's outputs.

    ``dtype`` is the model's. ``written``: the number of rows with tokens in a cache of fixed size, if known.
    """

    of: str
    format: CacheFormat
    positions: Positions
    length: Any
    fixed: bool
    layout: Layout
    dtype: Any
    written: Any = None


@dataclass(frozen=True)
class GrownStore:
    """The cache of the handle at input ``index``, with the call's tokens appended and some parts replaced.

    A bounded cache keeps the last ``length`` tokens.
    """

    index: int
    positions: Positions
    layout: Layout
    length: Any = None


@dataclass(frozen=True)
class SameHandle:
    """The handle at input ``index``; the call has written to its store."""

    index: int


@dataclass(frozen=True)
class CopiedHandle:
    """A new handle on the written copy of input ``index``'s store; the old cache is unchanged."""

    index: int


Output = Returned | Constant | NewStore | GrownStore | SameHandle | CopiedHandle


@dataclass(frozen=True)
class Written:
    """A cache of fixed size with ``tokens`` rows written by a call; a rolling buffer is full after the call."""

    index: int
    tokens: Any
    rolling: bool


@dataclass(frozen=True)
class Chosen:
    """The choice of a call for the rows of the tensor at input ``index``; the tensor stays unchanged."""

    index: int
    of: str
    format: CacheFormat
    positions: Positions


@dataclass
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph_module: the new graph.
        inputs: one for each of its placeholders.
        outputs: one for each of the caller's own outputs.
        replaced: (input index, its new content): dense caches to be replaced by handles.
        appended: (input index, number of new tokens): growing handles to be appended to.
        copied: inputs whose handles of fixed size are written on a copy, since the model does not write to them.
        written: the written caches of fixed size; the keys of each layer stand for both sides.
        chosen: the choices for keys and values left dense until a later call.
        sides: (input index, whether the buffer is rolling) of all handles of fixed size in packed form.
    """

    graph_module: GraphModule = field(init=False)
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    replaced: list[tuple[int, Output]] = field(default_factory=list)
    appended: list[tuple[int, Any]] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    sides: list[tuple[int, bool]] = field(default_factory=list)
