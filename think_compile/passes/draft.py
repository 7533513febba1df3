"""A graph that is being rewritten: its inputs, and the nodes that every rewritten attention needs.

Part of pass 4.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.config import ThinkConfig
from think_compile.kernels import steps, written_out
from think_compile.kernels.canonical import CANONICAL, CHANNEL, HEAD, to_canonical, token_axis
from think_compile.passes.kv_cache import CachedAttention, CacheTensor
from think_compile.passes.layout import same_size, scale_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.plan import FirstOf, FloorOf, FromStore, Input, Passed, PastLength, Size
from think_compile.passes.region import Masking, Order
from think_compile.passes.roles import to_product_order, usable_masks

aten = torch.ops.aten


class Draft:
    """A copy of the graph, what is known of its inputs so far, and the nodes that are asked for by role."""

    def __init__(self, normalized: Normalized, config: ThinkConfig, floors_apart: bool = False) -> None:
        """``floors_apart``: whether growing caches of one length may have windows of several lengths."""
        self.normalized, self.config, self.floors_apart = normalized, config, floors_apart
        self.graph = Graph()
        self.map: dict[Node, Node] = {}
        result = self.graph.graph_copy(normalized.graph_module.graph, self.map)
        self.graph.output(result)
        self.caller_inputs = self.graph.find_nodes(op="placeholder")
        self.inputs: dict[Node, Input] = {n: Passed(i) for i, n in enumerate(self.caller_inputs)}
        self.spans: dict[int, tuple[Any, Any]] = {}
        self.stored: dict[tuple[int, str], Node] = {}
        self.sizes: dict[Any, Node] = {}  # expressions of sizes -> the inputs that carry them
        self.firsts: dict[Any, tuple[Node, Node]] = {}  # length of bounded pasts -> (first row, next free row)

    # ------------------------------------------------------------------------------------------------ nodes

    def at(self, node: Any) -> Any:
        """What stands for the caller's ``node`` now; anything else as it is."""
        return self.map[node] if isinstance(node, Node) else node

    def input(self, name: str, what: Input) -> Node:
        """A new input of the graph."""
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        self.inputs[node] = what
        return node

    def canonical(self, node: Node, tensor: CacheTensor) -> Node:
        """``node``, whose axes are the cache tensor's, as [B, H, S, D]."""
        if tensor.layout == CANONICAL:
            return node
        _, heads, _, channels = tensor.shape
        return self.graph.call_function(to_canonical, (node, tensor.layout, int(heads), int(channels)))

    def start(self, site: CachedAttention) -> Any:
        """The first position of a call on a fixed cache."""
        join = site.keys.join
        start = self.at(join.start)
        if isinstance(join.start, Node) and isinstance(join.start.meta["val"], torch.Tensor):
            return self.graph.call_function(steps.start_of, (start, join.consecutive))
        return start

    @contextmanager
    def behind(self, node: Node) -> Iterator[None]:
        """Nodes are made after ``node``, in the order in which they are asked for."""
        with self.graph.inserting_after(node):
            anchor = self.graph.call_function(operator.getitem, ((), 0))
        with self.graph.inserting_before(anchor):
            yield
        self.graph.erase_node(anchor)

    def replace(self, node: Node, new: Node) -> None:
        """``new`` in the place of the caller's ``node``; a later layer may read it as it stands, as its queries say."""
        old = self.at(node)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.map[node] = new

    def queries(self, site: CachedAttention, k: Node) -> Node:
        """The queries [B, Hq, N, D], multiplied by what the model multiplies its cached keys by."""
        q = self.at(site.attention.q)
        if site.queries is not None:
            q = self.graph.call_function(written_out.canonical_queries, (q, site.queries.queries, k))
        elif site.attention.layout != CANONICAL:
            sizes = (site.query_heads, int(site.keys.size(CHANNEL)))
            q = self.graph.call_function(to_canonical, (q, site.attention.layout, *sizes))
        for scale in site.keys.scales:
            q = self.graph.call_function(scale.target, (q, self.at(scale_of(scale))))
        return self._beside(site, q)

    def _beside(self, site: CachedAttention, x: Any) -> Any:
        """``x`` [B, Hq, *, *], the query heads of a KV head together."""
        if not site.keys.in_turn or x is None:
            return x
        return self.graph.call_function(steps.heads_beside, (x, int(site.keys.size(HEAD))))

    def in_turn(self, site: CachedAttention, x: Node) -> Node:
        """``x`` [B, Hq, *, *], the query heads in the order that the model has them in."""
        if not site.keys.in_turn:
            return x
        return self.graph.call_function(steps.heads_in_turn, (x, int(site.keys.size(HEAD))))

    # ------------------------------------------------------------------------------------------------ masks

    def mask(self, site: CachedAttention, k: Node) -> Any:
        """What hides positions, broadcast to [B, Hq, N, S]: of a written-out attention all of it, as one bool."""
        return self._beside(site, self._mask(site, k))

    def _mask(self, site: CachedAttention, k: Node) -> Any:
        region = site.attention.region
        if region is None:
            return self.at(site.attention.mask)
        masks = [self._allowed(site, masking, k) for masking in usable_masks(region)]
        if not masks:
            attended = self.graph.call_function(written_out.nonzero_pairs, (self.at(region.output.left),))
            return self._pairs(site, attended, region.output.left, region.axes, k)
        return functools.reduce(lambda a, b: self.graph.call_function(aten.logical_and.default, (a, b)), masks)

    def _allowed(self, site: CachedAttention, masking: Masking, k: Node) -> Node:
        allowed = self.graph.call_function(written_out.allowed_pairs, (self.at(masking.mask), masking.kind))
        if site.is_canonical(masking.at.meta["val"].shape, masking.axes):
            return allowed
        return self._pairs(site, allowed, masking.at, masking.axes, k)

    def _pairs(self, site: CachedAttention, allowed: Node, at: Node, axes: Order, k: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        logits = self.at(site.attention.region.logits.node)
        arguments = (allowed, self.at(at), to_product_order(axes), logits, site.queries.logits, k)
        return self.graph.call_function(written_out.canonical_pairs, arguments)

    # ------------------------------------------------------------------------------------- the stores' tensors

    def stored_keys(self, site: CachedAttention) -> list[Node]:
        """Inputs for the tensors of the keys' store."""
        assert site.past is not None
        names = ("rows", "channels", "recent", "progress") if site.in_buffer else ("rows", "channels", "recent")
        index = site.past[0]
        return [self._stored(site, index, name) for name in names]

    def stored_values(self, site: CachedAttention) -> Node:
        """The input for the values' buffer."""
        assert site.past is not None
        return self._stored(site, site.past[1], "rows")

    def _stored(self, site: CachedAttention, index: int, name: str) -> Node:
        if (index, name) not in self.stored:
            what = FromStore(index, name, self._varying(site, name))
            self.stored[index, name] = self.input(f"{name}_{index}", what)
        return self.stored[index, name]

    def _varying(self, site: CachedAttention, name: str) -> tuple[int, ...]:
        """The axes of a store's tensor that vary: batch and heads as the caller's graph says, and what grows."""
        axes = [axis for axis in (0, 1) if isinstance(site.keys.size(axis), torch.SymInt)]
        growing = {"rows"} if self.config.prune_generated else {"rows", "recent"}
        symbolic = isinstance(self._buffer_rows(site) if site.filling else site.keys.size(2), torch.SymInt)
        if (not site.in_buffer and name in growing) or (site.in_buffer and name == "rows" and symbolic):
            axes.append(2)
        return () if name == "progress" else tuple(axes)

    def span(self, site: CachedAttention) -> tuple[Any, Any]:
        """(first new position, lowest position with a whole key); of a fixed cache (that, positions read).

        Of a window that fills a buffer (row of the first new token, row of the first that it joins).
        """
        assert site.past is not None
        if site.fixed:
            return self.start(site), self.size(site.keys.extent)
        if site.filling:
            return self._joined_rows(site)
        index = site.past[0]
        if index not in self.spans:
            length = self.past_length(site)
            start = length if site.window is None else self._bounded(length, site.past)[1]
            self.spans[index] = start, self.floor(start, index)
        return self.spans[index]

    def _buffer_rows(self, site: CachedAttention) -> Any:
        layout = site.keys.join.past_layout
        assert site.past is not None and layout is not None
        return self.caller_inputs[site.past[0]].meta["val"].shape[token_axis(layout)]

    def _joined_rows(self, site: CachedAttention) -> tuple[Any, Any]:
        join = site.keys.join
        if join.past_prefix is not None:
            return self.number(join.past_prefix), 0
        rows = self.number(self._buffer_rows(site))
        if join.past_suffix is None or join.past_suffix.size is None:
            return rows, 0
        joined = self.number(join.past_suffix.size)
        if isinstance(rows, int) and isinstance(joined, int):
            return rows, rows - joined
        return rows, self.graph.call_function(operator.sub, (rows, joined))

    def _bounded(self, length: Any, past: tuple[int, int]) -> tuple[Node, Node]:
        """(first row, next free row) of bounded caches, whose past holds ``length`` tokens."""
        if length not in self.firsts:
            first = self.input(f"first_{past[0]}", FirstOf(()))
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                self.firsts[length] = first, self.graph.call_function(operator.add, (first, length))
        first, start = self.firsts[length]
        before = self.inputs[first]
        assert isinstance(before, FirstOf)
        self.inputs[first] = FirstOf((*before.indices, *past))
        return first, start

    def part(self, site: CachedAttention) -> tuple[Any, ...]:
        """Of a bounded cache: (row of the first token that a call joins, how many of the last it reads or None)."""
        if site.window is None or site.filling:
            return ()
        start, _ = self.span(site)
        if site.window.joined is None:
            first = next(first for first, end in self.firsts.values() if end is start)
        else:
            first = self.graph.call_function(operator.sub, (start, self.number(site.window.joined)))
        return first, self.number(site.window.read)

    def size(self, size: Any) -> Any:
        """A size as an argument: a number, a node of the graph, or the input that carries the symbol."""
        if isinstance(size, (int, Node)):
            return self.at(size)
        for node in self.caller_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
        raise RuntimeError(f"no input of the graph carries the size {size}")

    def number(self, size: Any) -> Any:
        """Any size of the caller's graph as an argument; None stays what it is."""
        if size is None:
            return None
        try:
            return self.size(size)
        except RuntimeError:
            known = size.node.expr
            if known not in self.sizes:
                self.sizes[known] = self.input(f"size_{len(self.sizes)}", Size(size))
            return self.sizes[known]

    def past_length(self, site: CachedAttention) -> Any:
        """The past's token count: a number, the caller's own input for it, or one more input."""
        layout = site.keys.join.past_layout
        assert site.past is not None and layout is not None
        past = self.caller_inputs[site.past[0]]
        size = past.meta["val"].shape[token_axis(layout)]
        try:
            return self.size(size)
        except RuntimeError:
            return self.input(f"past_length_{site.past[0]}", PastLength(site.past[0]))

    def floor(self, start: Any, index: int) -> Node:
        """The input for the floor of a handle; handles of one length share it, unless their histories differ."""
        for node, what in self.inputs.items():
            if isinstance(what, FloorOf) and node.meta["start"] == start and not self.floors_apart:
                self.inputs[node] = FloorOf((*what.indices, index))
                return node
        node = self.input(f"floor_{index}", FloorOf((index,)))
        node.meta["start"] = start
        return node
