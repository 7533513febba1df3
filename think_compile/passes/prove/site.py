"""The caches of a graph to be stored: of attentions that read them as they are stored, or decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from think_compile.cache.canonical import CHANNEL, Layout, token_axis
from think_compile.formats.base import CacheFormat
from think_compile.passes import layout
from think_compile.passes.find.attention import Attention
from think_compile.passes.find.region import Order
from think_compile.passes.prove.join import Join
from think_compile.passes.prove.roles import QueryLayout, to_product_order
from think_compile.passes.prove.window import Window

FormatOf = Callable[[int, int], CacheFormat]  # a site's format, by the widths of keys and values


@dataclass(frozen=True)
class CacheTensor:
    """The keys or the values of a site.

    Attributes:
        root: the joined tensor.
        layout: the canonical axes in each of its axes.
        shape: its canonical shape [B, H, S, D].
        join: how ``root`` is joined.
        outputs: indices of its graph outputs, with the layout of each.
        extent: number of positions read by the attention.
        chain: the operations between ``root`` and the attention, in execution order.
        interleaved: whether query head i reads KV head i % H; if not, neighbouring query heads share a KV head.
        window: the joined, read and kept tokens; None: all.
        in_rolling_buffer: whether its window fills a buffer of fixed size.
        read_elsewhere: whether operations other than attention also read the values (such keys are refused).
    """

    root: Node
    layout: Layout
    shape: tuple[Any, ...]
    join: Join
    outputs: dict[int, Layout]
    extent: Any
    chain: tuple[Node, ...]
    interleaved: bool
    window: Window | None = None
    in_rolling_buffer: bool = False
    read_elsewhere: bool = False

    @property
    def scales(self) -> list[Node]:
        """The operations of ``chain`` that multiply or divide by one number."""
        return [
            node for node in self.chain if layout.layout_input(node) is None and layout.scaled_input(node) is not None
        ]

    @property
    def new_tokens(self) -> Any:
        """Number of new tokens of the call."""
        new = self.root if self.join.new is None else self.join.new
        return new.meta["val"].shape[token_axis(self.layout)]

    def size(self, axis: int) -> Any:
        """Size of a canonical axis."""
        return self.shape[axis]


@dataclass(frozen=True)
class CacheSite:
    """An attention and its cache tensors, to be stored.

    Attributes:
        attention: the attention that reads them; it names the layer.
        tensors: the keys and the values, or one tensor of which the model makes both.
    """

    attention: Attention
    tensors: tuple[CacheTensor, ...]

    @property
    def keys(self) -> CacheTensor:
        """The first tensor."""
        return self.tensors[0]

    @property
    def sides(self) -> list[tuple[str, CacheTensor]]:
        """The tensors with their names in a format."""
        return list(zip(("keys", "values"), self.tensors, strict=False))

    @property
    def fixed(self) -> bool:
        return self.keys.join.fixed

    @property
    def window(self) -> Window | None:
        return self.keys.window

    @property
    def in_rolling_buffer(self) -> bool:
        return self.keys.in_rolling_buffer

    @property
    def in_buffer(self) -> bool:
        """Whether the stored cache has a fixed size: a cache of fixed size, or a window in a rolling buffer."""
        return self.fixed or self.in_rolling_buffer

    @property
    def past(self) -> tuple[int, ...] | None:
        """The index of each tensor's past among the inputs; None: there is no past yet."""
        found = tuple(tensor.join.past for tensor in self.tensors if tensor.join.past is not None)
        return found if len(found) == len(self.tensors) else None

    @property
    def query_tokens(self) -> Any:
        """Number of new tokens of the call, N."""
        return self.keys.new_tokens

    def format(self, format_of: FormatOf) -> CacheFormat:
        """The format of the cache."""
        return format_of(int(self.keys.size(CHANNEL)), int(self.tensors[-1].size(CHANNEL)))


@dataclass(frozen=True)
class DecodedCache(CacheSite):
    """A cache that the attention does not read as it is stored: each read gets the decoded tensor."""


@dataclass(frozen=True)
class CachedAttention(CacheSite):
    """An attention that reads its stored keys and values.

    ``queries``: the layout of queries and logits of a written-out attention; else None.
    """

    queries: QueryLayout | None = None

    @property
    def values(self) -> CacheTensor:
        """The second tensor."""
        return self.tensors[1]

    @property
    def query_tokens(self) -> Any:
        """Number of queries of the call, N."""
        return self._query_shape()[2]

    @property
    def query_heads(self) -> int:
        """Number of query heads, Hq."""
        return int(self._query_shape()[1])

    def is_canonical(self, shape: Sequence[Any], axes: Order) -> bool:
        """Whether logits of ``shape``, with the product's ``axes`` up to views, already are [B, Hq, N, *]."""
        assert self.queries is not None
        in_order = self.queries.logits == tuple(range(len(self.queries.logits)))
        in_order = in_order and to_product_order(axes) == tuple(range(len(axes)))
        ours = self._query_shape()[:3]
        return in_order and len(shape) == 4 and all(map(layout.same_size, shape[:3], ours))

    def _query_shape(self) -> list[Any]:
        shape = self.attention.q.meta["val"].shape
        if self.queries is None:
            return [shape[self.attention.layout.index((axis,))] for axis in range(4)]
        *others, tokens, width = (shape[axis] for axis in self.queries.queries)
        every_head = math.prod(others) // self.keys.size(0)
        return [self.keys.size(0), every_head, tokens, width]
