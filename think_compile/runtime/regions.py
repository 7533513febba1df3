"""Compile layers once: the repeated part of a graph becomes one piece of code, run for each layer in turn.

The layers of a model differ only in their weights and caches: their nodes have the same order, operations, arguments
and shapes. The longest such repetition is cut out where few values cross. The parts before and after are compiled
separately. A graph without a repetition is compiled as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node

from think_compile.config import fallback_allowed
from think_compile.passes.normalize import AUTOCAST
from think_compile.passes.prove.readers import PROJECTIONS
from think_compile.passes.walks import part_of

log = logging.getLogger(__name__)

SMALLEST = 8  # nodes of a layer worth its own call

Compile = Callable[[GraphModule, list[Any]], Callable[..., Sequence[Any]]]
Values = dict[Node, Any]


def compile_by_regions(
    graph_module: GraphModule, fakes: Sequence[Any], mode: FakeTensorMode, compile_graph: Compile
) -> Callable[..., Sequence[Any]]:
    """Compile ``graph_module`` for these inputs, its repeated part only once."""
    try:
        values = _Propagation(graph_module, mode).values_for(fakes)
        _write_early(graph_module.graph, values)
        cut = _cut(graph_module.graph, values)
    except Exception as error:
        if not fallback_allowed():
            raise
        log.warning("layers are not compiled once: %s: %s", type(error).__name__, error)
        cut = None
    if cut is None:
        return compile_graph(graph_module, list(fakes))
    log.info("%d layers of %d operations are compiled once", cut.count, cut.period)
    return _Regional(graph_module, cut, values, compile_graph)


class _Propagation(Interpreter):
    """Computes the values of all nodes as fake tensors."""

    def __init__(self, graph_module: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.mode = mode

    def values_for(self, fakes: Sequence[Any]) -> Values:
        # some operations accept symbolic sizes only in their Python versions
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            self.run(*fakes)
        return self.env

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


# --------------------------------------------------------------------------------- writes to the graph's inputs


def _write_early(graph: Graph, values: Values) -> None:
    """Move writes to inputs from the end of the graph into the layers, each right after the last read of its target."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    sharing: dict[int, list[Node]] = {}
    for node, value in values.items():
        for storage in _storages(value):
            sharing.setdefault(storage, []).append(node)
    for write in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        last = _last_reader(write, [x for s in _storages(values[write.args[0]]) for x in sharing[s]], place)
        if last.op not in ("placeholder", "get_attr"):
            last.append(write)


def _last_reader(write: Node, aliases: Sequence[Node], place: Mapping[Node, int]) -> Node:
    """The earliest node that a write may follow: after all earlier uses of its target and after the written value."""
    readers = [user for node in aliases for user in node.users]
    before = [node for node in (*aliases, *readers, *_arguments(write)) if place[node] < place[write]]
    return max(before, key=place.__getitem__)


def _storages(value: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in pytree.tree_leaves(value) if isinstance(x, Tensor)}


# ------------------------------------------------------------------------------------------------- where to cut


@dataclass(frozen=True)
class _Cut:
    """``count`` layers of ``period`` nodes each, starting at node ``start`` of the body."""

    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.count

    def layers(self, body: Sequence[Node]) -> list[list[Node]]:
        """The nodes of each layer."""
        starts = range(self.start, self.end, self.period)
        return [list(body[at : at + self.period]) for at in starts]


def _body(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]


def _cut(graph: Graph, values: Values) -> _Cut | None:
    """The best cut into equal layers; None: there is none, or the graph has autocast regions."""
    if any(node.target in AUTOCAST for node in graph.nodes):
        return None
    body = _body(graph)
    looks: dict[Any, int] = {}
    numbers = torch.tensor([looks.setdefault(_look(node, values), len(looks)) for node in body], device="cpu")
    repeated = _repetition(numbers)
    if repeated is None:
        return None
    place = {node: i for i, node in enumerate(body)}
    first, period, length = repeated
    cuts = (_Cut(first + offset, period, (length - offset) // period) for offset in range(period))
    ranked = sorted((cut for cut in cuts if cut.count >= 2), key=lambda cut: _cost(cut, body, place))
    return next((cut for cut in ranked[:8] if _slots(cut.layers(body), values) is not None), None)


def _look(node: Node, values: Values) -> str:
    """A node's operation, its arguments (tensors by shape only), and the result's shape."""
    given = pytree.tree_map_only(Node, lambda arg: _shape(values[arg]), (node.args, node.kwargs))
    return f"{node.target} {given} {_shape(values[node])}"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {list(value.stride())} {value.dtype} {value.device}"
    return str([_shape(x) for x in value]) if isinstance(value, tuple | list) else str(value)


def _repetition(numbers: Tensor) -> tuple[int, int, int] | None:
    """(first, period, length) of the stretch of equal parts with the most nodes saved from compilation."""
    best, saved = None, 0
    for period in range(SMALLEST, len(numbers) // 2 + 1):
        start, run = _longest_run(numbers[:-period] == numbers[period:])
        if run // period * period > saved:
            best, saved = (start, period, run + period), run // period * period
    return best


def _longest_run(same: Tensor) -> tuple[int, int]:
    """(start, length) of the longest run of True."""
    ends = torch.nonzero(~same)[:, 0]
    first, last = (torch.tensor([end], device=same.device) for end in (-1, len(same)))
    bounds = torch.cat([first, ends, last])
    lengths = bounds.diff() - 1
    longest = int(lengths.argmax())
    return int(bounds[longest]) + 1, int(lengths[longest])


def _cost(cut: _Cut, body: Sequence[Node], place: Mapping[Node, int]) -> tuple[int, int, bool]:
    """Rank by most layers, then by fewest values crossing to the next layer, then by a border after a projection."""
    border = cut.start + cut.period
    crossing = 0
    for node in body[cut.start : border]:
        crossing += any(border <= place.get(user, -1) < border + cut.period for user in node.users)
    return -cut.count, crossing, body[border - 1].target not in PROJECTIONS


def _slots(layers: list[list[Node]], values: Values) -> list[tuple[Node, ...]] | None:
    """The outside inputs of the layers, each a tuple with one node per layer; None: the layers are not alike."""
    places = [{node: i for i, node in enumerate(layer)} for layer in layers]
    slots: dict[tuple[Node, ...], None] = {}
    for same in zip(*layers, strict=True):
        for given in zip(*(_arguments(node) for node in same), strict=True):
            inside = {place.get(node) for place, node in zip(places, given, strict=True)}
            if inside == {None}:
                slots[given] = None
            elif len(inside) > 1:
                return None
    alike = all(len({_shape(values[node]) for node in slot}) == 1 for slot in slots)
    return list(slots) if alike and not _written_twice(slots) else None


def _arguments(node: Node) -> list[Node]:
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, Node)]


def _written_twice(slots: Iterable[tuple[Node, ...]]) -> bool:
    """Whether a layer takes the same graph input, possibly written to, in two slots."""
    layers = ([node for node in layer if node.op == "placeholder"] for layer in zip(*slots, strict=True))
    return any(len(set(inputs)) < len(inputs) for inputs in layers)


# -------------------------------------------------------------------------------------------- the parts, compiled


@dataclass
class _Step:
    """One call of a part. Its inputs, its outputs, and values unused after it, as places in a run's list of values."""

    run: Callable[..., Sequence[Any]]
    takes: list[int]
    leaves: list[int]
    done: list[int]


class _Regional:
    """The compiled parts of a graph, in running order."""

    def __init__(self, graph_module: GraphModule, cut: _Cut, values: Values, compile_graph: Compile) -> None:
        self.graph_module, self.values, self.compile_graph = graph_module, values, compile_graph
        body, nodes = _body(graph_module.graph), list(graph_module.graph.nodes)
        self.place = {node: i for i, node in enumerate(nodes)}
        self.inputs = [self.place[node] for node in nodes if node.op == "placeholder"]
        self.numbers = [n for n in nodes if n.op == "placeholder" and isinstance(values[n], SymInt)]
        self.held = [(self.place[n], getattr(graph_module, str(n.target))) for n in nodes if n.op == "get_attr"]
        self.result = pytree.tree_map_only(Node, self.place.__getitem__, list(nodes[-1].args[0]))
        self.returned = {self.place[node] for node in nodes[-1].all_input_nodes}
        self.is_node = [isinstance(x, Node) for x in nodes[-1].args[0]]
        self.steps = self._once(body[: cut.start]) + self._layers(cut.layers(body)) + self._once(body[cut.end :])
        self._free()

    def __call__(self, *args: Any) -> list[Any]:
        held: list[Any] = [None] * len(self.place)
        for place, value in (*zip(self.inputs, args, strict=True), *self.held):
            held[place] = value
        for step in self.steps:
            for place, value in zip(step.leaves, step.run(*[held[i] for i in step.takes]), strict=True):
                held[place] = value
            for place in step.done:
                held[place] = None
        return [held[x] if is_node else x for x, is_node in zip(self.result, self.is_node, strict=True)]

    def _once(self, nodes: list[Node]) -> list[_Step]:
        """A part outside the repetition."""
        if not nodes:
            return []
        inside = set(nodes)
        takes = list(dict.fromkeys(x for node in nodes for x in _arguments(node) if x not in inside))
        return self._compiled([nodes], [(node,) for node in takes])

    def _layers(self, layers: list[list[Node]]) -> list[_Step]:
        slots = _slots(layers, self.values)
        assert slots is not None
        return self._compiled(layers, slots)

    def _compiled(self, layers: list[list[Node]], slots: list[tuple[Node, ...]]) -> list[_Step]:
        """One compiled graph for all of the equal ``layers``, and a step for each."""
        known = {slot[0] for slot in slots}
        slots = slots + [tuple([number] * len(layers)) for number in self.numbers if number not in known]
        outputs = _left(layers)
        inputs = [slot[0] for slot in slots]
        graph = part_of(layers[0], inputs, [layers[0][i] for i in outputs])
        fakes = [_settled(self.values[node]) for node in inputs]
        run = self.compile_graph(GraphModule(self.graph_module, graph), fakes)
        takes = [[self.place[slot[k]] for slot in slots] for k in range(len(layers))]
        leaves = [[self.place[layer[i]] for i in outputs] for layer in layers]
        return [_Step(run, *places, []) for places in zip(takes, leaves, strict=True)]

    def _free(self) -> None:
        """Have each value released by its last step."""
        needed = set(self.returned)
        for step in reversed(self.steps):
            step.done = [i for i in dict.fromkeys((*step.takes, *step.leaves)) if i not in needed]
            needed.update(step.takes)


def _settled(value: Any) -> Any:
    """A symbolic number under the symbol that stands for it now.

    Two symbols may have been found equal. Inductor calls an input by its first symbol, and uses the other, which is a
    size of some tensor that this part need not take.
    """
    if not isinstance(value, SymInt) or not value.node.expr.is_Symbol:
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def _left(layers: list[list[Node]]) -> list[int]:
    """Indices of the nodes read outside their layer, in any of the layers."""
    found: set[int] = set()
    for layer in layers:
        inside = set(layer)
        found |= {i for i, node in enumerate(layer) if any(user not in inside for user in node.users)}
    return sorted(found)
