"""What a rewritten graph takes and leaves: where the runtime finds its inputs, and how it makes the caller's outputs.

Written by pass 4, read by the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from think_compile.kernels import steps
from think_compile.kernels.canonical import Layout

# ------------------------------------------------------------------------- where the new graph's inputs come from


@dataclass(frozen=True)
class Passed:
    """Input ``index`` of the caller, as a plain tensor or number."""

    index: int


@dataclass(frozen=True)
class FromStore:
    """A tensor of the store behind the handle at input ``index``; ``varying``: axes whose size is dynamic."""

    index: int
    name: str
    varying: tuple[int, ...]


@dataclass(frozen=True)
class PastLength:
    """The token count of the handle at input ``index``."""

    index: int


@dataclass(frozen=True)
class FloorOf:
    """The lowest position with a whole key in the handles at these inputs, the same in all."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class FirstOf:
    """The row of the first token in the handles at these inputs, whose caches are bounded: made the same for all."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A number that follows from sizes of the caller's inputs."""

    size: Any


Input = Passed | FromStore | PastLength | FloorOf | FirstOf | Size


# ------------------------------------------------------------------------ how the caller's outputs are made


@dataclass(frozen=True)
class Returned:
    """Output ``position`` of the new graph (or a constant)."""

    position: int


@dataclass(frozen=True)
class Constant:
    """A value that is no tensor of the graph."""

    value: Any


@dataclass(frozen=True)
class NewKeys:
    """Packed keys of ``length`` tokens from outputs ``position`` and on: (pruned, channels, recent[, progress]).

    ``written``: of a fixed cache how many rows hold tokens, if that is known.
    """

    position: int
    length: Any
    fixed: bool
    layout: Layout
    spec: steps.LayerSpec
    written: Any = None


@dataclass(frozen=True)
class NewValues:
    """Values of ``length`` tokens from output ``position``."""

    position: int
    length: Any
    fixed: bool
    layout: Layout


@dataclass(frozen=True)
class GrownKeys:
    """The handle at input ``index`` with the call's tokens behind it; its new ring is output ``position``.

    A bounded cache keeps the last ``length`` tokens.
    """

    index: int
    position: int
    layout: Layout
    length: Any = None


@dataclass(frozen=True)
class GrownValues:
    """The handle at input ``index`` with the call's tokens behind it; of a bounded cache the last ``length``."""

    index: int
    layout: Layout
    length: Any = None


@dataclass(frozen=True)
class SameHandle:
    """The handle at input ``index``, whose store the call has written."""

    index: int


@dataclass(frozen=True)
class CopiedHandle:
    """A new handle on the copy of input ``index``'s store that the call has written: the past itself stays."""

    index: int


Output = Returned | Constant | NewKeys | NewValues | GrownKeys | GrownValues | SameHandle | CopiedHandle


@dataclass
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph_module: the new graph.
        inputs: one for each of its placeholders.
        outputs: one for each of the caller's own outputs.
        replaced: (input index, its new content): caches that were dense and are handles from now on.
        appended: inputs whose growing handles take the call's new tokens, with (input index, axis) or the number
            that tells how many those are.
        copied: inputs whose fixed handles are written on a copy, since the model does not write to them.
        written_fixed: (input index, number of tokens) of the fixed key caches that a call writes to.
        filled: inputs that hold the keys of windows which fill their buffer once the call is over.
        chosen: (input index, result, what the kernels know of the layer): keys that stay what they are, and channels of
            them that a later call is to keep.
    """

    graph_module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    replaced: list[tuple[int, Output]]
    appended: list[tuple[int, Any]]
    copied: list[int]
    written_fixed: list[tuple[int, Any]]
    filled: list[int]
    chosen: list[tuple[int, int, steps.LayerSpec]]
