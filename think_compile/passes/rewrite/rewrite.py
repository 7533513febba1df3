"""The rewriting: first calls keep their attention and store their caches; later calls attend to the stored caches.

The result tells the runtime the source of each input of the new graph, and how to make each output of the caller's
graph. Each rewriting works on a copy of the graph, for one choice of packed handles; the others are dense.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from think_compile.cache.canonical import BATCH, CANONICAL, HEAD, TOKEN, from_canonical
from think_compile.cache.state import Call, Prompt, Span
from think_compile.kernels import arrange, lse, written_out
from think_compile.passes.layout import arranged, same_size, stride_order
from think_compile.passes.normalize import Normalized
from think_compile.passes.observe import observed
from think_compile.passes.prove.site import CachedAttention, CacheSite, CacheTensor, DecodedCache, FormatOf
from think_compile.passes.rewrite import plan
from think_compile.passes.rewrite.outputs import Outputs, length_kept
from think_compile.passes.rewrite.plan import Positions
from think_compile.passes.rewrite.prompt_only import passes_heads_once

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}


def rewrite(
    normalized: Normalized,
    sites: Sequence[CacheSite],
    packed: frozenset[int],
    format_of: FormatOf,
    prompt_only: frozenset[Node] = frozenset(),
    windows_apart: bool = False,
    pending: Sequence[CachedAttention] = (),
) -> plan.Rewritten:
    """Rewrite ``sites``.

    ``packed``: inputs with handles on packed stores. ``prompt_only``: key caches whose first call reads only its own
    rows. ``windows_apart``: as in :class:`.draft.Draft`. ``pending``: attentions that need only a first call's choice.
    """
    with observed("rewrite", normalized.graph_module.graph) as count:
        rewriter = _Rewriter(normalized, packed, format_of, windows_apart, prompt_only=prompt_only)
        rewriter.choose(pending)
        rewritten = rewriter.run(sites)
        count.matches, count.graph = len(sites), rewritten.graph_module.graph
    return rewritten


class _Rewriter(Outputs):
    """One rewriting."""

    def __init__(self, *draft: Any, prompt_only: frozenset[Node]) -> None:
        """``draft``: as of :class:`.outputs.Outputs`."""
        super().__init__(*draft)
        self.prompt_only = prompt_only

    def choose(self, pending: Sequence[CachedAttention]) -> None:
        """Make the first call's choice, after the attentions; attentions, keys and values stay unchanged."""
        for readers in _by_cache(pending):
            site, format = readers[0], self.format(readers[0])
            with self.after(self.at(readers[-1].attention.node)):
                chosen = self.call(format.choose, self._as_one(readers, *self._joined(site)), Prompt())
                for i, (of, tensor) in enumerate(site.sides):
                    names = [p.name for p in format.side(of).parts(fixed=False) if not (p.is_rows or p.replaced)]
                    positions = self.results_of(chosen, i, names)
                    index = self.normalized.placeholders.index(tensor.root)
                    self.rewritten.chosen.append(plan.Chosen(index, of, format, positions))

    def run(self, sites: Sequence[CacheSite]) -> plan.Rewritten:
        decoded = [site for site in sites if isinstance(site, DecodedCache)]
        for site in {site.keys.root: site for site in decoded}.values():
            if self.is_packed(site):
                self.leave(site, [self._join(site, of) for of, _ in site.sides])
            else:
                self._keep_to_decode(site)
        for readers in _by_cache([site for site in sites if isinstance(site, CachedAttention)]):
            if self.is_packed(readers[0]):
                self._later_call(readers)
            elif readers[0].keys.root in self.prompt_only:
                self._first_call_of_prompt(readers)
            else:
                self._first_call(readers)
        return self.finish()

    def _joined(self, site: CachedAttention) -> list[Node]:
        """The joined keys and values [B, H, S, D]."""
        return [self.canonical(self.at(tensor.root), tensor) for _, tensor in site.sides]

    def _new(self, site: CachedAttention) -> list[Node]:
        """The call's own keys and values [B, H, N, D]."""
        return [self._new_rows(tensor) for _, tensor in site.sides]

    def _new_rows(self, tensor: CacheTensor) -> Node:
        return self.canonical(self.at(tensor.join.new), tensor)

    def _as_one(self, readers: Sequence[CachedAttention], k: Node, v: Node, *, log_sums: Node | None = None) -> Call:
        """All attentions to one cache as one attention with larger groups."""
        queries: Any = [self.queries(site, k) for site in readers]
        if len(queries) > 1:
            queries = [self.call(arrange.joined_queries, queries, int(readers[0].keys.size(HEAD)))]
        return Call(queries[0], k, v, self.mask(readers[0], k), self.at(readers[0].attention.scale), lse=log_sums)

    # ------------------------------------------------------------------------------------------- first calls

    def _first_call(self, readers: Sequence[CachedAttention]) -> None:
        """Store the kept keys and values, after the unchanged attentions."""
        site = readers[0]
        log_sums = self._with_lse(site) if self._gives_lse(readers) else None
        with self.after(self.at(readers[-1].attention.node)):
            call = self._as_one(readers, *self._joined(site), log_sums=log_sums)
            self._keep(site, call, self._prompt(site), length_kept(site.keys) if site.in_rolling_buffer else None)

    def _gives_lse(self, readers: Sequence[CachedAttention], *, own_rows: bool = False) -> bool:
        """Whether the format wants the log-sum-exp of a cache's only attention, and it is known of which keys it is.

        ``own_rows``: the attention reads the call's own rows alone.
        """
        site, attention = readers[0], readers[0].attention
        if not self.format(site).wants_lse or len(readers) > 1 or site.keys.interleaved:
            return False
        if attention.operation.target is not aten.scaled_dot_product_attention.default or attention.dropout:
            return False
        if attention.mask is not None:
            return True
        is_square = not site.fixed and same_size(site.query_tokens, site.keys.size(TOKEN))
        return attention.is_causal and (own_rows or is_square)

    def _with_lse(self, site: CachedAttention) -> Node:
        """Replace an attention by the same one with a second result, the log-sum-exp of its logits."""
        node = self.at(site.attention.node)
        with self.graph.inserting_before(node):
            both = self.graph.call_function(lse.attend, node.args, node.kwargs)
            out, log_sums = (self.call(operator.getitem, both, i) for i in range(2))
            out = self._as(out, site.attention.node)
        self.replace(site.attention.node, out)
        return log_sums

    def _prompt(self, site: CacheSite) -> Prompt:
        if site.fixed:
            return Prompt(start=self.start(site), capacity=self.number(site.keys.size(TOKEN)))
        if site.window is None:
            return Prompt()
        read, kept = self.number(site.window.read), self.number(site.window.kept)
        return Prompt(None, read, kept, self.number(length_kept(site.keys)) if site.in_rolling_buffer else None)

    def _first_call_of_prompt(self, readers: Sequence[CachedAttention]) -> None:
        """Replace the attentions by attentions to the call's own rows; only these rows are stored."""
        site, log_sums = readers[0], None
        gives_lse = self._gives_lse(readers, own_rows=True)
        for reader in readers:
            with self.graph.inserting_before(self.at(reader.attention.node)):
                attention = reader.attention
                operands = self.at(attention.q), *self._new(reader), self.at(attention.mask)
                options = self.at(attention.scale), attention.is_causal, passes_heads_once(reader)
                out = self.call(lse.attend_prompt if gives_lse else arrange.attend_prompt, *operands, *options)
                if gives_lse:
                    out, log_sums = (self.call(operator.getitem, out, i) for i in range(2))
                out = self._as(out, attention.node)
            self.replace(attention.node, out)
        with self.after(self.at(readers[-1].attention.node)):
            call = self._as_one(readers, *self._new(site), log_sums=log_sums)
            call = call._replace(mask=self.call(arrange.prompt_columns, call.mask, call.k))
            self._keep(site, call, Prompt(capacity=self.number(site.keys.size(TOKEN))), site.query_tokens)

    def _keep(self, site: CachedAttention, call: Call, prompt: Prompt, written: Any = None) -> None:
        """Make the caller's caches from the stores of a first call; ``written``: rows with tokens, if known."""
        stored = self.call(self.format(site).first_call, call, prompt)
        states = [self.call(operator.getitem, stored, i) for i in range(len(site.sides))]
        self.keep(site, states, written)

    def _keep_to_decode(self, site: DecodedCache) -> None:
        """Store tensors that later calls decode."""
        with self.after(self.at(site.attention.node)):
            prompt, mask = self._prompt(site), self._padding(site)
            keep, states = self.format(site).keep, []
            for of, tensor in site.sides:
                rows = self.canonical(self.at(tensor.root), tensor)
                states.append(self.call(keep, of, self._new_rows(tensor), rows, mask, prompt))
            self.keep(site, states)

    def _padding(self, site: DecodedCache) -> Node | None:
        """The mask of the attention, if it tells which rows of the cache are padding."""
        mask = site.attention.mask
        if mask is None or mask.meta["val"].dim() != 4:
            return None
        batch, columns = (mask.meta["val"].shape[axis] for axis in (0, 3))
        fits = same_size(batch, 1) or same_size(batch, site.keys.size(BATCH))
        return self.at(mask) if fits and same_size(columns, site.keys.size(TOKEN)) else None

    # ------------------------------------------------------------------------------------------- later calls

    def _later_call(self, readers: Sequence[CachedAttention]) -> None:
        """Attend to the stored cache; then append to it."""
        site = readers[0]
        is_written_out = any(reader.attention.region is not None for reader in readers)
        if site.values.read_elsewhere or is_written_out:
            values_left = self._join(site, "values")
        elif len(readers) == 1:
            self.leave(site, self._step(site))
            return
        else:
            values_left = None
        for reader in readers:
            attend = self._attend if reader.attention.region is None else self._attend_written_out
            attend(reader)
        with self.after(self.at(readers[-1].attention.node)):
            left = self._append(readers, with_values=values_left is None)
        self.leave(site, (left[0], values_left or left[1]))

    def _arguments(self, site: CachedAttention) -> tuple[Any, ...]:
        """The arguments of a later call's attention, made at the current insertion point."""
        k_new, v_new = self._new(site)
        span, attention = self.span(site, k_new), site.attention
        mask = self._causal_to_end(site, k_new, span) if attention.causal_to_end else self.mask(site, k_new)
        call = Call(self.queries(site, k_new), k_new, v_new, mask, self.at(attention.scale), attention.is_causal)
        return call, *(self.stored(site, of, span.start) for of, _ in site.sides), span

    def _causal_to_end(self, site: CachedAttention, k_new: Node, span: Span) -> Node | None:
        if site.query_tokens == 1 and isinstance(site.query_tokens, int):
            return None
        return self.call(arrange.causal_to_end, k_new, span.columns)

    def _step(self, site: CachedAttention) -> tuple[Positions, Positions]:
        """Replace the only attention to a cache: attend and append."""
        with self.graph.inserting_before(self.at(site.attention.node)):
            step = self.call(self.format(site).step, *self._arguments(site))
            out, left = (self.call(operator.getitem, step, i) for i in range(2))
            positions = self._left(site, left)
            out = self._as_attention(site, out)
        self.replace(site.attention.node, out)
        return positions

    def _attend(self, site: CachedAttention) -> None:
        """Replace one of several attentions to a cache."""
        with self.graph.inserting_before(self.at(site.attention.node)):
            out = self.call(self.format(site).attend, *self._arguments(site))
            out = self._as_attention(site, out)
        self.replace(site.attention.node, out)

    def _as_attention(self, site: CachedAttention, out: Node) -> Node:
        """A result [B, Hq, N, Dv] in the layout of the attention's own."""
        out = self.interleaved(site, out)
        if site.attention.layout != CANONICAL:
            out = self.call(from_canonical, out, site.attention.layout)
        return self._as(out, site.attention.node)

    def _as(self, out: Node, old: Node) -> Node:
        """``out`` with the memory order of ``old``: later views rely on this order."""
        value = old.meta["val"]
        out = self.call(arrange.laid_out, out, stride_order(value))
        out.meta["val"] = value
        return out

    def _attend_written_out(self, site: CachedAttention) -> None:
        """Replace the product with the keys by one with the stored keys."""
        region = site.attention.region
        assert region is not None
        with self.graph.inserting_before(self.at(region.logits.node)):
            k_new = self._new_rows(site.keys)
            span = self.span(site, k_new)
            q, stored = self.queries(site, k_new), self.stored(site, "keys", span.start)
            logits = self.call(self.format(site).logits, q, k_new, stored, span)
            logits = self._as_product(site, self.interleaved(site, logits))
        self.replace(region.logits.node, logits)

    def _as_product(self, site: CachedAttention, logits: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        product, layout = site.attention.region.logits, site.queries
        formula = (self.at(product.alpha), self.at(product.bias), self.at(product.beta))
        dtype = product.node.meta["val"].dtype
        arguments = (logits, self.at(product.left), layout.queries, layout.logits, *formula, dtype)
        return self._as(self.call(written_out.as_product, *arguments), product.node)

    def _join(self, site: CacheSite, of: str) -> Positions:
        """Replace the model's join of a tensor: append the new rows, and continue with all rows, decoded."""
        tensor = dict(site.sides)[of]
        root = self.at(tensor.root)
        for node in arranged(tensor.root):
            if node.target in _VIEWS:  # a view of a buffer with spare rows may have to copy
                self.at(node).target = aten.reshape.default
            if node.target is aten.copy.default:  # would bring back the overwritten tensor
                self.at(node).replace_all_uses_with(self.at(node).args[1])
        with self.graph.inserting_before(root):
            new = self._new_rows(tensor)
            span = self.span(site, new, joined=True)
            joined = self.call(self.format(site).join, of, new, self.stored(site, of, span.start), span)
            rows = self.call(operator.getitem, joined, 0)
            left = self.results_of(joined, 1, self.replaced_parts(site, of))
            rows = self.call(from_canonical, rows, tensor.layout)
        rows.meta["val"] = tensor.root.meta["val"]
        self.replace(tensor.root, rows)
        return left

    def _append(self, readers: Sequence[CachedAttention], *, with_values: bool) -> tuple[Positions, Positions]:
        """Append the new rows, after all attentions to a cache."""
        site = readers[0]
        call = self._as_one(readers, *self._new(site))
        span = self.span(site, call.k)
        values = self.stored(site, "values", span.start) if with_values else None
        left = self.call(self.format(site).append, call, self.stored(site, "keys", span.start), values, span)
        return self._left(site, left, with_values)

    def _left(self, site: CachedAttention, left: Node, with_values: bool = True) -> tuple[Positions, Positions]:
        keys = self.results_of(left, 0, self.replaced_parts(site, "keys"))
        return keys, self.results_of(left, 1, self.replaced_parts(site, "values") if with_values else [])


def _by_cache(sites: Sequence[CachedAttention]) -> list[list[CachedAttention]]:
    """The sites in graph order, grouped by their cache."""
    groups: dict[Node, list[CachedAttention]] = {}
    for site in sites:
        groups.setdefault(site.keys.root, []).append(site)
    return list(groups.values())
