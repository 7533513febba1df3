"""Pass 4: the graph with packed caches. First calls keep their attention and store what they leave pruned; later
calls append to the packed store and attend to it.

The result tells for each input of the new graph where the runtime finds it, and for each output of the caller's
graph how the runtime makes it. A graph is rewritten on a copy, once with its handles packed and, if ever needed,
once with them dense.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from think_compile.config import ThinkConfig
from think_compile.kernels import steps
from think_compile.kernels.canonical import CANONICAL, from_canonical, to_canonical, token_axis
from think_compile.passes.kv_cache import CachedAttention, CacheTensor
from think_compile.passes.layout import same_size, scale_of, stride_order
from think_compile.passes.normalize import Normalized
from think_compile.passes.observe import observed
from think_compile.passes.plan import (
    Constant,
    CopiedHandle,
    FirstOf,
    FloorOf,
    FromStore,
    GrownKeys,
    GrownValues,
    Input,
    NewKeys,
    NewValues,
    Output,
    Passed,
    PastLength,
    Returned,
    Rewritten,
    SameHandle,
    Size,
)
from think_compile.passes.region import Masking, Order
from think_compile.passes.roles import to_product_order, usable_masks

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}


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
        self.spans: dict[int, tuple[Any, Any]] = {}
        self.firsts: dict[Any, tuple[Node, Node]] = {}  # length of bounded pasts -> (first row, next free row)

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
        if tensor.layout == CANONICAL:
            return node
        _, heads, _, channels = tensor.shape
        return self.graph.call_function(to_canonical, (node, tensor.layout, int(heads), int(channels)))

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

    @contextmanager
    def _behind(self, node: Node) -> Iterator[None]:
        """Nodes are made after ``node``, in the order in which they are asked for."""
        with self.graph.inserting_after(node):
            anchor = self.graph.call_function(operator.getitem, ((), 0))
        with self.graph.inserting_before(anchor):
            yield
        self.graph.erase_node(anchor)

    def _replace(self, node: Node, new: Node) -> None:
        """``new`` in the place of the caller's ``node``; a later layer may read it as it stands, as its queries say."""
        old = self._at(node)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.map[node] = new

    def _queries(self, site: CachedAttention, k: Node) -> Node:
        """The queries [B, Hq, N, D], multiplied by what the model multiplies its cached keys by."""
        q = self._at(site.attention.q)
        if site.queries is not None:
            q = self.graph.call_function(steps.canonical_queries, (q, site.queries.queries, k))
        for scale in site.keys.scales:
            q = self.graph.call_function(scale.target, (q, self._at(scale_of(scale))))
        return q

    # ------------------------------------------------------------------------------------------------ masks

    def _mask(self, site: CachedAttention, k: Node) -> Any:
        """What hides positions, broadcast to [B, Hq, N, S]: of a written-out attention all of it, as one bool."""
        region = site.attention.region
        if region is None:
            return self._at(site.attention.mask)
        masks = [self._allowed(site, masking, k) for masking in usable_masks(region)]
        if not masks:
            attended = self.graph.call_function(steps.nonzero_pairs, (self._at(region.output.left),))
            return self._pairs(site, attended, region.output.left, region.axes, k)
        return functools.reduce(lambda a, b: self.graph.call_function(aten.logical_and.default, (a, b)), masks)

    def _allowed(self, site: CachedAttention, masking: Masking, k: Node) -> Node:
        allowed = self.graph.call_function(steps.allowed_pairs, (self._at(masking.mask), masking.kind))
        if site.is_canonical(masking.at.meta["val"].shape, masking.axes):
            return allowed
        return self._pairs(site, allowed, masking.at, masking.axes, k)

    def _pairs(self, site: CachedAttention, allowed: Node, at: Node, axes: Order, k: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        logits = self._at(site.attention.region.logits.node)
        arguments = (allowed, self._at(at), to_product_order(axes), logits, site.queries.logits, k)
        return self.graph.call_function(steps.canonical_pairs, arguments)

    # ------------------------------------------------------------------------------------------- first calls

    def _first_call(self, site: CachedAttention) -> None:
        """Behind the untouched attention: score, prune and store the keys; copy the values into their buffer."""
        spec, attention = layer_spec(site, self.config), site.attention
        with self._behind(self._at(attention.node)):
            k = self._canonical(self._at(site.keys.root), site.keys)
            v = self._canonical(self._at(site.values.root), site.values)
            arguments = [self._queries(site, k), k, v, self._mask(site, k)]
            if site.fixed:
                arguments.append(self._start(site))
            step = steps.first_call_fixed if site.fixed else steps.first_call_growing
            arguments.append(spec)
            if site.window is not None:
                step = steps.first_call_bounded
                arguments += [self._number(site.window.read), self._number(site.window.kept)]
            stored = self.graph.call_function(step, tuple(arguments))
            parts = [self.graph.call_function(operator.getitem, (stored, i)) for i in range(5 if site.fixed else 4)]
        positions = [self._result(part) for part in parts]
        for index, layout in site.keys.outputs.items():
            self.made[index] = NewKeys(positions[0], _length_kept(site.keys), site.fixed, layout, spec)
        for index, layout in site.values.outputs.items():
            self.made[index] = NewValues(positions[-1], _length_kept(site.values), site.fixed, layout)

    # ------------------------------------------------------------------------------------------- later calls

    def _later_call(self, site: CachedAttention) -> None:
        """Append the new rows and attend to the packed store."""
        step = self._attend if site.attention.region is None else self._attend_written_out
        ring = step(site)
        if site.fixed:
            self._leave_fixed(site)
        else:
            self._leave_growing(site, self._result(ring))

    def _new_rows(self, tensor: CacheTensor) -> Node:
        return self._canonical(self._at(tensor.join.new), tensor)

    def _attend(self, site: CachedAttention) -> Any:
        """In the place of the stock attention; the new ring of a growing cache."""
        attention = site.attention
        with self.graph.inserting_before(self._at(attention.node)):
            k_new, v_new = self._new_rows(site.keys), self._new_rows(site.values)
            arguments = [self._queries(site, k_new), k_new, v_new, self._at(attention.mask)]
            arguments += [*self._stored_keys(site), self._stored_values(site), *self._span(site)]
            arguments += [layer_spec(site, self.config)] if site.fixed else []
            arguments += [self._at(attention.scale), attention.is_causal]
            arguments += [] if site.window is None else [self._first(site), self._number(site.window.read)]
            step = steps.later_call_fixed if site.fixed else steps.later_call_growing
            out = self.graph.call_function(step, tuple(arguments))
            ring = None if site.fixed else self.graph.call_function(operator.getitem, (out, 1))
            out = out if site.fixed else self.graph.call_function(operator.getitem, (out, 0))
            out = self._as(out, attention.node)
        self._replace(attention.node, out)
        return ring

    def _as(self, out: Node, old: Node) -> Node:
        """``out`` as ``old`` lies in memory, which later views rely on."""
        value = old.meta["val"]
        out = self.graph.call_function(steps.laid_out, (out, stride_order(value)))
        out.meta["val"] = value
        return out

    def _attend_written_out(self, site: CachedAttention) -> Any:
        """The product with the keys becomes one with the packed ones; the values' buffer takes the values' place."""
        region = site.attention.region
        assert region is not None
        stored = self._stored_keys(site)
        self._replace_values(site)
        with self.graph.inserting_before(self._at(region.logits.node)):
            k_new = self._new_rows(site.keys)
            q = self._queries(site, k_new)
            step = steps.logits_fixed if site.fixed else steps.logits_growing
            part = () if site.window is None else (self._first(site), self._number(site.window.read))
            logits = self.graph.call_function(step, (q, k_new, *stored, *self._span(site), *part))
            logits = self._as_product(site, logits)
        self._replace(region.logits.node, logits)
        with self._behind(self._at(region.output.node)):
            span = self._span(site)
            if not site.fixed:
                return self.graph.call_function(steps.append_keys_growing, (k_new, *stored, span[0]))
            arguments = (q, k_new, self._mask(site, k_new), *stored, *span, layer_spec(site, self.config))
            return self.graph.call_function(steps.append_keys_fixed, arguments)

    def _as_product(self, site: CachedAttention, logits: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        product, layout = site.attention.region.logits, site.queries
        formula = (self._at(product.alpha), self._at(product.bias), self._at(product.beta))
        dtype = product.node.meta["val"].dtype
        arguments = (logits, self._at(product.left), layout.queries, layout.logits, *formula, dtype)
        return self._as(self.graph.call_function(steps.as_product, arguments), product.node)

    def _replace_values(self, site: CachedAttention) -> None:
        """Where the model joins its values: append the new ones in place, and go on with the buffer."""
        tensor = site.values
        root = self._at(tensor.root)
        for node in tensor.chain:
            if node.target in _VIEWS:  # of a buffer with room to grow, a view may have to copy
                self._at(node).target = aten.reshape.default
        with self.graph.inserting_before(root):
            arguments = [self._new_rows(tensor), self._stored_values(site), self._span(site)[0], not site.fixed]
            arguments += [] if site.window is None else [self._first(site)]
            values = self.graph.call_function(steps.append_values, tuple(arguments))
            values = self.graph.call_function(from_canonical, (values, tensor.layout))
        values.meta["val"] = tensor.root.meta["val"]
        self._replace(tensor.root, values)

    def _stored_keys(self, site: CachedAttention) -> list[Node]:
        """Inputs for the tensors of the keys' store."""
        assert site.past is not None
        names = ("rows", "channels", "recent", "progress") if site.fixed else ("rows", "channels", "recent")
        index = site.past[0]
        return [self._input(f"{name}_{index}", FromStore(index, name, self._varying(site, name))) for name in names]

    def _stored_values(self, site: CachedAttention) -> Node:
        assert site.past is not None
        index = site.past[1]
        return self._input(f"values_{index}", FromStore(index, "rows", self._varying(site, "rows")))

    def _varying(self, site: CachedAttention, name: str) -> tuple[int, ...]:
        """The axes of a store's tensor that vary: batch and heads as the caller's graph says, and what grows."""
        axes = [axis for axis in (0, 1) if isinstance(site.keys.size(axis), torch.SymInt)]
        growing = {"rows"} if self.config.prune_generated else {"rows", "recent"}
        symbolic = isinstance(site.keys.size(2), torch.SymInt)
        if (not site.fixed and name in growing) or (site.fixed and name == "rows" and symbolic):
            axes.append(2)
        return () if name == "progress" else tuple(axes)

    def _span(self, site: CachedAttention) -> tuple[Any, Any]:
        """(first new position, lowest position with a whole key); of a fixed cache (that, positions read)."""
        assert site.past is not None
        if site.fixed:
            return self._start(site), self._size(site.keys.extent)
        index = site.past[0]
        if index not in self.spans:
            length = self._past_length(site)
            start = length if site.window is None else self._bounded(length, site.past)[1]
            self.spans[index] = start, self._floor(start, index)
        return self.spans[index]

    def _bounded(self, length: Any, past: tuple[int, int]) -> tuple[Node, Node]:
        """(first row, next free row) of bounded caches, whose past holds ``length`` tokens."""
        if length not in self.firsts:
            first = self._input(f"first_{past[0]}", FirstOf(()))
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                self.firsts[length] = first, self.graph.call_function(operator.add, (first, length))
        first, start = self.firsts[length]
        before = self.inputs[first]
        assert isinstance(before, FirstOf)
        self.inputs[first] = FirstOf((*before.indices, *past))
        return first, start

    def _first(self, site: CachedAttention) -> Node:
        """The row of the first token that a bounded cache joins with the call's."""
        assert site.window is not None
        start, _ = self._span(site)
        if site.window.joined is not None:
            return self.graph.call_function(operator.sub, (start, self._number(site.window.joined)))
        return next(first for first, end in self.firsts.values() if end is start)

    def _leave_growing(self, site: CachedAttention, ring: int) -> None:
        assert site.past is not None
        self.appended += [(index, site.query_tokens) for index in site.past]
        for index, layout in site.keys.outputs.items():
            length = None if site.window is None else _length_kept(site.keys)
            self.made[index] = GrownKeys(site.past[0], ring, layout, length)
        for index, layout in site.values.outputs.items():
            length = None if site.window is None else _length_kept(site.values)
            self.made[index] = GrownValues(site.past[1], layout, length)

    def _leave_fixed(self, site: CachedAttention) -> None:
        assert site.past is not None
        for tensor, index in zip((site.keys, site.values), site.past, strict=True):
            in_place = index in self.normalized.written
            if not in_place:
                self.copied.append(index)
            for output in tensor.outputs:
                self.made[output] = SameHandle(index) if in_place else CopiedHandle(index)

    def _size(self, size: Any) -> Any:
        """A size as an argument: a number, a node of the graph, or the input that carries the symbol."""
        if isinstance(size, (int, Node)):
            return self._at(size)
        for node in self.caller_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
        raise RuntimeError(f"no input of the graph carries the size {size}")

    def _number(self, size: Any) -> Any:
        """Any size of the caller's graph, or None, as an argument."""
        if size is None:
            return None
        try:
            return self._size(size)
        except RuntimeError:
            return self._input("size", Size(size))

    def _past_length(self, site: CachedAttention) -> Any:
        """The past's token count: a number, the caller's own input for it, or one more input."""
        layout = site.keys.join.past_layout
        assert site.past is not None and layout is not None
        past = self.caller_inputs[site.past[0]]
        size = past.meta["val"].shape[token_axis(layout)]
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


def _length_kept(tensor: CacheTensor) -> Any:
    """How many tokens a call leaves in a growing cache."""
    kept = None if tensor.window is None else tensor.window.kept
    return tensor.size(2) if kept is None else kept


def _must_stay(node: Node) -> bool:
    if node.op in ("placeholder", "output") or node.target is steps.append_keys_fixed:  # it writes in place
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
