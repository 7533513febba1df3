"""What a rewritten graph takes and leaves: where its inputs are found, and how the caller's outputs are made."""

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
    """A part of the store behind the handle at input ``index``; ``varying``: axes whose size is dynamic."""

    index: int
    part: Part
    varying: tuple[int, ...]


@dataclass(frozen=True)
class Counter:
    """A counter of the growing stores at these inputs, the same in all: "length", "oldest" or "window_start"."""

    indices: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Size:
    """A number that follows from sizes of the caller's inputs."""

    size: Any


Input = Passed | FromStore | Counter | Size


# ------------------------------------------------------------------------ how the caller's outputs are made


@dataclass(frozen=True)
class Returned:
    """Output ``position`` of the new graph."""

    position: int


@dataclass(frozen=True)
class Constant:
    """A value that is no tensor of the graph."""

    value: Any


Positions = tuple[tuple[str, int], ...]  # of the outputs of the new graph that hold the parts of a side, by name


@dataclass(frozen=True)
class NewStore:
    """A cache of ``length`` tokens, the "keys" or "values" of a format, of parts that the graph leaves.

    ``dtype`` is the model's; ``written``: of fixed size how many rows hold tokens, if that is known.
    """

    of: str
    format: CacheFormat
    positions: Positions
    length: Any
    fixed: bool
    layout: Layout
    dtype: Any
    written: Any = None
    rolling: bool = False


@dataclass(frozen=True)
class GrownStore:
    """The handle at input ``index`` with the call's tokens after its own, and new parts in the place of old ones.

    A bounded cache keeps the last ``length`` tokens.
    """

    index: int
    positions: Positions
    layout: Layout
    length: Any = None


@dataclass(frozen=True)
class SameHandle:
    """The handle at input ``index``, whose store the call has written."""

    index: int


@dataclass(frozen=True)
class CopiedHandle:
    """A new handle on the copy of input ``index``'s store that the call has written; the old cache is unchanged."""

    index: int


Output = Returned | Constant | NewStore | GrownStore | SameHandle | CopiedHandle


@dataclass(frozen=True)
class Written:
    """A cache of fixed size that a call writes ``tokens`` rows of; of one in a circle all rows then hold tokens."""

    index: int
    tokens: Any
    rolling: bool


@dataclass(frozen=True)
class Chosen:
    """What a call chooses for the rows of the tensor at input ``index``, which stays as it is."""

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
        replaced: (input index, its new content): caches that were dense and are handles from now on.
        appended: inputs whose growing handles take the call's new tokens, with the size that tells how many.
        copied: inputs whose handles of fixed size are written on a copy, since the model does not write to them.
        written: the caches of fixed size that a call writes to; the keys of each layer stand for both sides.
        chosen: keys and values that stay dense, and what a later call is to know of them.
        sides: (input index, whether rows stand in a circle) of all handles of fixed size that are read packed.
    """

    graph_module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    replaced: list[tuple[int, Output]] = field(default_factory=list)
    appended: list[tuple[int, Any]] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    sides: list[tuple[int, bool]] = field(default_factory=list)
