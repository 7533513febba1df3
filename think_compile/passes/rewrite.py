"""Pass 4: the graph with packed caches. First calls keep their attention and store what they leave pruned; later
calls append to the packed store and attend to it.

The result tells for each input of the new graph where the runtime finds it, and for each output of the caller's
graph how the runtime makes it. A graph is rewritten on a copy, once with its handles packed and, if ever needed,
once with them dense.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from think_compile.config import ThinkConfig
from think_compile.kernels import steps
from think_compile.passes.kv_cache import CachedAttention, CacheTensor
from think_compile.passes.layout import same_size, stride_order
from think_compile.passes.normalize import Normalized
from think_compile.passes.observe import observed

aten = torch.ops.aten


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
    """The lowest position with a whole key in the handles at these inputs."""

    indices: tuple[int, ...]


Input = Passed | FromStore | PastLength | FloorOf


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
    """Packed keys of ``length`` tokens from outputs ``position`` and on: (pruned, channels, recent[, progress])."""

    position: int
    length: Any
    fixed: bool
    layout: tuple[int, ...]
    spec: steps.LayerSpec


@dataclass(frozen=True)
class NewValues:
    """Values of ``length`` tokens from output ``position``."""

    position: int
    length: Any
    fixed: bool
    layout: tuple[int, ...]


@dataclass(frozen=True)
class GrownKeys:
    """The handle at input ``index`` with the call's tokens behind it; its new ring is output ``position``."""

    index: int
    position: int
    layout: tuple[int, ...]


@dataclass(frozen=True)
class GrownValues:
    """The handle at input ``index`` with the call's tokens behind it."""

    index: int
    layout: tuple[int, ...]


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
    """

    graph_module: GraphModule
    inputs: list[Input]
    outputs: list[Output]
    replaced: list[tuple[int, Output]]
    appended: list[tuple[int, Any]]
    copied: list[int]


def layer_spec(site: CachedAttention, config: ThinkConfig) -> steps.LayerSpec:
    """What the kernels need to know of a layer."""
    head_dim = int(site.keys.size(3))
    return steps.LayerSpec(
        keep=config.kept_channels(head_dim),
        head_dim=head_dim,
        recent=config.recent,
        observe=config.observe,
        prune_generated=config.prune_generated,
    )


def rewrite(
    normalized: Normalized, sites: Sequence[CachedAttention], packed: frozenset[int], config: ThinkConfig
) -> Rewritten:
    """Rewrite ``sites``; ``packed`` are the inputs that hold handles with packed stores."""
    with observed("rewrite", normalized.graph_module.graph) as count:
        rewritten = _Rewriter(normalized, packed, config).run(sites)
        count.matches, count.graph = len(sites), rewritten.graph_module.graph
    return rewritten


class _Rewriter:
    """One rewriting: a copy of the graph, and what is known of its inputs and outputs so far."""

    def __init__(self, normalized: Normalized, packed: frozenset[int], config: ThinkConfig) -> None:
        self.normalized, self.packed, self.config = normalized, packed, config
        self.graph = Graph()
        self.map: dict[Node, Node] = {}
        result = self.graph.graph_copy(normalized.graph_module.graph, self.map)
        self.graph.output(result)
        self.caller_inputs = self.graph.find_nodes(op="placeholder")
        self.inputs: dict[Node, Input] = {n: Passed(i) for i, n in enumerate(self.caller_inputs)}
        self.results: list[Node] = []
        self.made: dict[int, Output] = {}  # output index of the normalized graph -> how it is made
        self.appended: list[tuple[int, Any]] = []
        self.copied: list[int] = []
        self.floors: dict[Node, list[int]] = {}

    def run(self, sites: Sequence[CachedAttention]) -> Rewritten:
        for site in sites:
            if site.past is not None and self.packed.issuperset(site.past):
                self._later_call(site)
            else:
                self._first_call(site)
        outputs, replaced = self._finish_outputs()
        self._drop_unused()
        graph_module = GraphModule(self.normalized.graph_module, self.graph)
        self.graph.lint()
        order = self.graph.find_nodes(op="placeholder")
        return Rewritten(graph_module, [self.inputs[n] for n in order], outputs, replaced, self.appended, self.copied)

    # ------------------------------------------------------------------------------------------------ nodes

    def _at(self, node: Any) -> Any:
        return self.map[node] if isinstance(node, Node) else node

    def _input(self, name: str, what: Input) -> Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        self.inputs[node] = what
        return node

    def _canonical(self, node: Node, tensor: CacheTensor) -> Node:
        order = tensor.to_canonical
        return node if order == [0, 1, 2, 3] else self.graph.call_function(aten.permute.default, (node, order))

    def _result(self, node: Node) -> int:
        self.results.append(node)
        return len(self.results) - 1

    def _start(self, site: CachedAttention) -> Any:
        """The first position of a call on a fixed cache."""
        join = site.keys.join
        start = self._at(join.start)
        if isinstance(join.start, Node) and isinstance(join.start.meta["val"], torch.Tensor):
            return self.graph.call_function(steps.start_of, (start, join.consecutive))
        return start

    # ------------------------------------------------------------------------------------------- first calls

    def _first_call(self, site: CachedAttention) -> None:
        """Behind the untouched attention: score, prune and store the keys; copy the values into their buffer."""
        spec, attention = layer_spec(site, self.config), site.attention
        with self.graph.inserting_after(self._at(attention.node)):
            anchor = self.graph.call_function(operator.getitem, ((), 0))  # a place to insert before; erased below
        with self.graph.inserting_before(anchor):
            k = self._canonical(self._at(site.keys.root), site.keys)
            v = self._canonical(self._at(site.values.root), site.values)
            arguments = [self._at(attention.q), k, v, self._at(attention.mask)]
            if site.fixed:
                arguments.append(self._start(site))
            step = steps.first_call_fixed if site.fixed else steps.first_call_growing
            stored = self.graph.call_function(step, (*arguments, spec))
            parts = [self.graph.call_function(operator.getitem, (stored, i)) for i in range(5 if site.fixed else 4)]
        self.graph.erase_node(anchor)
        positions = [self._result(part) for part in parts]
        for index, layout in site.keys.outputs.items():
            self.made[index] = NewKeys(positions[0], site.keys.size(2), site.fixed, layout, spec)
        for index, layout in site.values.outputs.items():
            self.made[index] = NewValues(positions[-1], site.values.size(2), site.fixed, layout)

    # ------------------------------------------------------------------------------------------- later calls

    def _later_call(self, site: CachedAttention) -> None:
        """In the attention's place: append the new rows and attend to the packed store."""
        attention = site.attention
        old = self._at(attention.node)
        with self.graph.inserting_before(old):
            k_new = self._canonical(self._at(site.keys.join.new), site.keys)
            v_new = self._canonical(self._at(site.values.join.new), site.values)
            step = self._attend_fixed if site.fixed else self._attend_growing
            arguments = (self._at(attention.q), k_new, v_new, self._at(attention.mask))
            out = step(site, arguments, (self._at(attention.scale), attention.is_causal))
            value = attention.node.meta["val"]  # later views rely on how the stock attention's output lies in memory
            out = self.graph.call_function(steps.laid_out, (out, stride_order(value)))
        out.meta["val"] = value
        old.replace_all_uses_with(out)
        self.graph.erase_node(old)
        self.map[attention.node] = out  # a later layer may read it as it stands, as its queries say

    def _stored(self, site: CachedAttention, names: Sequence[str]) -> list[Node]:
        """Inputs for the keys' tensors of these names, then the values."""
        assert site.past is not None
        keys, values = site.past
        nodes = [self._input(f"{name}_{keys}", FromStore(keys, name, self._varying(site, name))) for name in names]
        return [*nodes, self._input(f"values_{values}", FromStore(values, "rows", self._varying(site, "rows")))]

    def _varying(self, site: CachedAttention, name: str) -> tuple[int, ...]:
        """The axes of a store's tensor that vary: batch and heads as the caller's graph says, and what grows."""
        axes = [axis for axis in (0, 1) if isinstance(site.keys.size(axis), torch.SymInt)]
        growing = {"rows"} if self.config.prune_generated else {"rows", "recent"}
        symbolic = isinstance(site.keys.size(2), torch.SymInt)
        if (not site.fixed and name in growing) or (site.fixed and name == "rows" and symbolic):
            axes.append(2)
        return () if name == "progress" else tuple(axes)

    def _attend_growing(self, site: CachedAttention, arguments: tuple[Any, ...], tail: tuple[Any, ...]) -> Node:
        assert site.past is not None
        stored = self._stored(site, ("rows", "channels", "recent"))
        start = self._past_length(site)
        floor = self._floor(start, site.past[0])
        call = (*arguments, *stored, start, floor, *tail)
        both = self.graph.call_function(steps.later_call_growing, call)
        out = self.graph.call_function(operator.getitem, (both, 0))
        recent = self._result(self.graph.call_function(operator.getitem, (both, 1)))
        n_new = site.attention.q.meta["val"].shape[2]
        self.appended += [(index, n_new) for index in site.past]
        for index, layout in site.keys.outputs.items():
            self.made[index] = GrownKeys(site.past[0], recent, layout)
        for index, layout in site.values.outputs.items():
            self.made[index] = GrownValues(site.past[1], layout)
        return out

    def _attend_fixed(self, site: CachedAttention, arguments: tuple[Any, ...], tail: tuple[Any, ...]) -> Node:
        assert site.past is not None
        stored = self._stored(site, ("rows", "channels", "recent", "progress"))
        spec = layer_spec(site, self.config)
        extent = self._size(site.keys.extent)
        call = (*arguments, *stored, self._start(site), extent, spec, *tail)
        for tensor, index in zip((site.keys, site.values), site.past, strict=True):
            in_place = index in self.normalized.written
            if not in_place:
                self.copied.append(index)
            for output in tensor.outputs:
                self.made[output] = SameHandle(index) if in_place else CopiedHandle(index)
        return self.graph.call_function(steps.later_call_fixed, call)

    def _size(self, size: Any) -> Any:
        """A size as an argument: a number, a node of the graph, or the input that carries the symbol."""
        if isinstance(size, (int, Node)):
            return self._at(size)
        for node in self.caller_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
        raise RuntimeError(f"no input of the graph carries the size {size}")

    def _past_length(self, site: CachedAttention) -> Any:
        """The past's token count: a number, the caller's own input for it, or one more input."""
        assert site.past is not None and site.keys.past_layout is not None
        past = self.caller_inputs[site.past[0]]
        size = past.meta["val"].shape[site.keys.past_layout.index(2)]
        try:
            return self._size(size)
        except RuntimeError:
            return self._input(f"past_length_{site.past[0]}", PastLength(site.past[0]))

    def _floor(self, start: Any, index: int) -> Node:
        """One input for the floors of all handles of one length; writing every row narrow makes the highest right."""
        for node, what in self.inputs.items():
            if isinstance(what, FloorOf) and node.meta["start"] == start:
                self.inputs[node] = FloorOf((*what.indices, index))
                return node
        node = self._input(f"floor_{index}", FloorOf((index,)))
        node.meta["start"] = start
        return node

    # ----------------------------------------------------------------------------------------------- closing

    def _finish_outputs(self) -> tuple[list[Output], list[tuple[int, Output]]]:
        output = self.graph.output_node()
        values = list(output.args[0])
        n_written = len(self.normalized.written)
        replaced: list[tuple[int, Output]] = []
        with self.graph.inserting_before(output):
            for value, index, position in zip(values, self.normalized.written, range(n_written), strict=False):
                self._finish_written(value, index, position, replaced)
        outputs = [self._finish_output(i, values[i]) for i in range(n_written, len(values))]
        output.args = (tuple(self.results),)
        return outputs, replaced

    def _finish_written(self, value: Node, index: int, position: int, replaced: list[tuple[int, Output]]) -> None:
        """The new value of a written input: stored already, a new store, or copied back as the model wrote it."""
        made = self.made.get(position)
        if made is None:
            self.graph.call_function(aten.copy_.default, (self.caller_inputs[index], value))
        elif not isinstance(made, SameHandle | CopiedHandle):
            replaced.append((index, made))

    def _finish_output(self, index: int, value: Any) -> Output:
        if index in self.made:
            return self.made[index]
        return Returned(self._result(value)) if isinstance(value, Node) else Constant(value)

    def _drop_unused(self) -> None:
        """Drop dead nodes, then inputs that nothing reads: above all the handles' own, of which no value exists."""
        self.graph.eliminate_dead_code(is_impure_node=_must_stay)
        for index in self.packed:
            self._forget_shape_readers(self.caller_inputs[index], index)
        for node in self.graph.find_nodes(op="placeholder"):
            if not node.users:
                del self.inputs[node]
                self.graph.erase_node(node)

    def _forget_shape_readers(self, node: Node, index: int) -> None:
        for user in list(node.users):
            if user.target is aten.sym_size.int:
                user.replace_all_uses_with(self._size(user.meta["val"]))
                self.graph.erase_node(user)


def _must_stay(node: Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
