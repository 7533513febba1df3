"""A graph during its rewriting: its inputs, and the common nodes of rewritten attentions."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from think_compile.cache.canonical import BATCH, CANONICAL, CHANNEL, HEAD, TOKEN, to_canonical, token_axis
from think_compile.cache.state import (
    BATCH_SIZE,
    CAPACITY,
    COUNTERS,
    COUNTERS_PART,
    HEADS,
    KEPT,
    RING,
    Part,
    Span,
    Stored,
)
from think_compile.formats.base import CacheFormat, Side, rolled, window_start_of
from think_compile.kernels import arrange, written_out
from think_compile.passes.find.region import Masking, Order
from think_compile.passes.layout import same_size, scale_of
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.roles import to_product_order, usable_masks
from think_compile.passes.prove.site import CachedAttention, CacheSite, CacheTensor, FormatOf
from think_compile.passes.rewrite.plan import Counter, FromStore, Input, Passed, Size

aten = torch.ops.aten


class Draft:
    """A copy of the graph, its inputs so far, and methods for making nodes by role."""

    def __init__(self, normalized: Normalized, format_of: FormatOf, windows_apart: bool = False) -> None:
        """``windows_apart``: whether growing caches of equal length may have windows of different lengths."""
        self.normalized, self.format_of, self.windows_apart = normalized, format_of, windows_apart
        self.graph = Graph()
        self.map: dict[Node, Node] = {}
        result = self.graph.graph_copy(normalized.graph_module.graph, self.map)
        self.graph.output(result)
        self.caller_inputs = self.graph.find_nodes(op="placeholder")
        self.inputs: dict[Node, Input] = {n: Passed(i) for i, n in enumerate(self.caller_inputs)}
        self.parts: dict[tuple[int, str], Node] = {}  # (input index, part's name) -> the new graph's input
        self.counters: dict[Any, Node] = {}  # (name, what layers share it) -> the input with a counter
        self.starts: dict[tuple[int, ...], tuple[Any, Any]] = {}  # past -> (first row, next free row)
        self.sizes: dict[Any, Node] = {}  # size expression -> its input
        self.firsts: dict[Any, tuple[Node, Node]] = {}  # length of a bounded past -> (first row, next free row)

    # ------------------------------------------------------------------------------------------------ nodes

    def at(self, node: Any) -> Any:
        """The current node for the caller's ``node``; any other argument unchanged."""
        return self.map[node] if isinstance(node, Node) else node

    def call(self, target: Any, *arguments: Any) -> Node:
        """A new call at the current insertion point."""
        return self.graph.call_function(target, arguments)

    def input(self, name: str, what: Input) -> Node:
        """A new input of the graph."""
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        self.inputs[node] = what
        return node

    def canonical(self, node: Node, tensor: CacheTensor) -> Node:
        """``node``, which has the axes of ``tensor``, as [B, H, S, D]."""
        if tensor.layout == CANONICAL:
            return node
        _, heads, _, width = tensor.shape
        return self.call(to_canonical, node, tensor.layout, int(heads), int(width))

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Put new nodes after ``node``, in the order of their creation."""
        with self.graph.inserting_after(node):  # reverses the order, so insert before an anchor
            anchor = self.call(operator.getitem, (), 0)
        with self.graph.inserting_before(anchor):
            yield
        self.graph.erase_node(anchor)

    def replace(self, node: Node, new: Node) -> None:
        """Replace the caller's ``node`` by ``new``, also for readers in later layers (as their queries, say)."""
        old = self.at(node)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.map[node] = new

    def queries(self, site: CachedAttention, k: Node) -> Node:
        """The queries [B, Hq, N, D], scaled as the model scales its cached keys."""
        q = self.at(site.attention.q)
        if site.queries is not None:
            q = self.call(written_out.canonical_queries, q, site.queries.queries, k)
        elif site.attention.layout != CANONICAL:
            sizes = (site.query_heads, int(site.keys.size(CHANNEL)))
            q = self.call(to_canonical, q, site.attention.layout, *sizes)
        for scale in site.keys.scales:
            q = self.call(scale.target, q, self.at(scale_of(scale)))
        return self._together(site, q)

    def _together(self, site: CachedAttention, x: Any) -> Any:
        """``x`` [B, Hq, *, *], with the query heads of a KV head together."""
        if not site.keys.interleaved or x is None:
            return x
        return self.call(arrange.heads_together, x, int(site.keys.size(HEAD)))

    def interleaved(self, site: CachedAttention, x: Node) -> Node:
        """``x`` [B, Hq, *, *], with the query heads in the model's order."""
        if not site.keys.interleaved:
            return x
        return self.call(arrange.heads_interleaved, x, int(site.keys.size(HEAD)))

    # ------------------------------------------------------------------------------------------------ masks

    def mask(self, site: CachedAttention, k: Node) -> Any:
        """The mask, broadcast to [B, Hq, N, S]; of a written-out attention all masks, as one bool tensor."""
        return self._together(site, self._mask(site, k))

    def _mask(self, site: CachedAttention, k: Node) -> Any:
        region = site.attention.region
        if region is None:
            return self.at(site.attention.mask)
        masks = [self._allowed(site, masking, k) for masking in usable_masks(region)]
        if not masks:
            attended = self.call(written_out.nonzero_pairs, self.at(region.output.left))
            return self._pairs(site, attended, region.output.left, region.axes, k)
        return functools.reduce(lambda a, b: self.call(aten.logical_and.default, a, b), masks)

    def _allowed(self, site: CachedAttention, masking: Masking, k: Node) -> Node:
        allowed = self.call(written_out.allowed_pairs, self.at(masking.mask), masking.kind)
        if site.is_canonical(masking.at.meta["val"].shape, masking.axes):
            return allowed
        return self._pairs(site, allowed, masking.at, masking.axes, k)

    def _pairs(self, site: CachedAttention, allowed: Node, at: Node, axes: Order, k: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        order, logits = to_product_order(axes), self.at(site.attention.region.logits.node)
        return self.call(written_out.canonical_pairs, allowed, self.at(at), order, logits, site.queries.logits, k)

    # ----------------------------------------------------------------------------------------- stores and spans

    def format(self, site: CacheSite) -> CacheFormat:
        """The format of the layer's cache."""
        return site.format(self.format_of)

    def stored(self, site: CacheSite, of: str, start: Any) -> Stored:
        """The stored "keys" or "values" of a later call from position ``start`` on."""
        assert site.past is not None
        index, side = site.past[of == "values"], self.format(site).side(of)
        parts = side.parts(fixed=site.in_buffer, rolling=site.in_rolling_buffer)
        state: dict[str, Any] = {part.name: self._part(site, index, part) for part in parts}
        if site.in_buffer:
            return Stored(state, self.call(window_start_of, state[COUNTERS]) if side.has_ring else None)
        evicted = self._counter("evicted", start, index) if side.evicts else 0
        return Stored(state, self._window_start(start, index, side) if side.has_ring else None, evicted)

    def _part(self, site: CacheSite, index: int, part: Part) -> Node:
        if (index, part.name) not in self.parts:
            what = FromStore(index, part, self._varying(site, part))
            self.parts[index, part.name] = self.input(f"{part.name}_{index}", what)
        return self.parts[index, part.name]

    def _varying(self, site: CacheSite, part: Part) -> tuple[int, ...]:
        """The axes of dynamic size of a part: batch and heads if dynamic in the caller's graph, and growing axes."""
        rows = self._past_rows(site) if site.in_rolling_buffer else site.keys.size(TOKEN)
        evicts = self.format(site).evicts
        varying = {
            BATCH_SIZE: isinstance(site.keys.size(BATCH), torch.SymInt),
            HEADS: isinstance(site.keys.size(HEAD), torch.SymInt),
            CAPACITY: not site.in_buffer or evicts or isinstance(rows, torch.SymInt),
            RING: not site.in_buffer,
            KEPT: evicts,
        }
        return tuple(axis for axis, size in enumerate(part.shape) if isinstance(size, str) and varying[size])

    def _window_start(self, start: Any, index: int, side: Side) -> Node:
        """The input with the start of a growing cache's window.

        Layers of equal length share this input, unless their histories differ.
        """
        return self._counter("window_start", (start, side.window_rule), index)

    def _counter(self, name: str, key: Any, index: int) -> Node:
        if (name, key) not in self.counters or self.windows_apart:
            self.counters[name, key] = self.input(f"{name}_{index}", Counter((), name))
        node = self.counters[name, key]
        self.inputs[node] = Counter((*self.inputs[node].indices, index), name)
        return node

    def span(self, site: CacheSite, new: Node, *, joined: bool = False) -> Span:
        """The span of a later call with rows ``new``; ``joined``: with all joined rows, also unread ones."""
        if site.fixed:
            columns = site.keys.size(TOKEN) if joined else site.keys.extent
            return Span(self._fixed_start(site, new), 0, self.number(columns))
        tokens = self._tokens(site, new)
        end, first = self._joined_rows(site) if site.in_rolling_buffer else self._growing_start(site)
        start, oldest = end, first
        if site.in_rolling_buffer:
            counters = self._part(site, site.past[0], COUNTERS_PART)
            start, oldest = (self.call(rolled, counters, row) for row in (end, first))
        columns = self.sum(self.sum(end, first, operator.sub), tokens)
        span = Span(start, oldest, columns, rolling=site.in_rolling_buffer)
        read = None if joined or site.window is None else self.number(site.window.read)
        if read is None:
            return span
        oldest = self.sum(self.sum(span.start, tokens), read, operator.sub)
        return span._replace(oldest=oldest, columns=read)

    def start(self, site: CacheSite) -> Any:
        """The first position of a call on a cache of fixed size: a 0-d tensor or a number."""
        join = site.keys.join
        start = self.at(join.start)
        if isinstance(join.start, Node) and isinstance(join.start.meta["val"], torch.Tensor):
            return self.call(arrange.start_of, start, join.consecutive)
        return start

    def _fixed_start(self, site: CacheSite, new: Node) -> Node:
        start = self.start(site)
        if isinstance(start, Node) and start.target is arrange.start_of:
            return start
        return self.call(arrange.device_start, start, new)

    def _tokens(self, site: CacheSite, new: Node) -> Any:
        """Number of new tokens of the call."""
        if isinstance(site.query_tokens, int):
            return site.query_tokens
        return self.call(aten.sym_size.int, new, TOKEN)

    def sum(self, a: Any, b: Any, operation: Callable[[Any, Any], Any] = operator.add) -> Any:
        """``operation`` on numbers or nodes."""
        if isinstance(b, int) and b == 0:
            return a
        known = not (isinstance(a, Node) or isinstance(b, Node))
        return operation(a, b) if known else self.call(operation, a, b)

    def _growing_start(self, site: CacheSite) -> tuple[Any, Any]:
        """(first new position, lowest joined position) of a growing cache."""
        assert site.past is not None
        if site.past not in self.starts:
            length = self.past_length(site)
            self.starts[site.past] = (0, length) if site.window is None else self._bounded(length, site.past)
        first, start = self.starts[site.past]
        if site.window is not None and site.window.joined is not None:
            return start, self.sum(start, self.number(site.window.joined), operator.sub)
        return start, first

    def _past_rows(self, site: CacheSite) -> Any:
        """Number of rows of the past, as a size of the caller's graph."""
        layout = site.keys.join.past_layout
        assert site.past is not None and layout is not None
        return self.caller_inputs[site.past[0]].meta["val"].shape[token_axis(layout)]

    def _joined_rows(self, site: CacheSite) -> tuple[Any, Any]:
        """(number of tokens, first joined token) of a rolling buffer."""
        join = site.keys.join
        if join.past_prefix is not None:
            return self.number(join.past_prefix), 0
        rows = self.number(self._past_rows(site))
        if join.past_suffix is None or join.past_suffix.size is None:
            return rows, 0
        return rows, self.sum(rows, self.number(join.past_suffix.size), operator.sub)

    def _bounded(self, length: Any, past: tuple[int, ...]) -> tuple[Node, Node]:
        """(first row, next free row) of bounded caches with a past of ``length`` tokens."""
        if length not in self.firsts:
            first = self.input(f"oldest_{past[0]}", Counter((), "oldest"))
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                self.firsts[length] = first, self.call(operator.add, first, length)
        first, start = self.firsts[length]
        before = self.inputs[first]
        assert isinstance(before, Counter)
        self.inputs[first] = Counter((*before.indices, *past), "oldest")
        return first, start

    def size(self, size: Any) -> Any:
        """A size as an argument: a number, a node of the graph, or the input with this symbol."""
        if isinstance(size, (int, Node)):
            return self.at(size)
        for node in self.caller_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
        raise RuntimeError(f"no input of the graph carries the size {size}")

    def number(self, size: Any) -> Any:
        """Any size of the caller's graph as an argument; None stays None."""
        if size is None:
            return None
        try:
            return self.size(size)
        except RuntimeError:
            known = size.node.expr
            if known not in self.sizes:
                self.sizes[known] = self.input(f"size_{len(self.sizes)}", Size(size))
            return self.sizes[known]

    def past_length(self, site: CacheSite) -> Any:
        """The past's token count: a number, an input of the caller, or one more input."""
        try:
            return self.size(self._past_rows(site))
        except RuntimeError:
            return self.input(f"past_length_{site.past[0]}", Counter((site.past[0],), "length"))
