"""Pass 4: the graph with packed caches. First calls keep their attention and store what they leave pruned; later
calls append to the packed store and attend to it.

The result tells for each input of the new graph where the runtime finds it, and for each output of the caller's
graph how the runtime makes it. A graph is rewritten on a copy, once with its handles packed and, if ever needed,
once with them dense.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from think_compile.config import ThinkConfig
from think_compile.kernels import filling, steps, written_out
from think_compile.kernels.canonical import CANONICAL, HEAD, TOKEN, from_canonical
from think_compile.passes.draft import Draft
from think_compile.passes.functional import ASSERTIONS
from think_compile.passes.kv_cache import CachedAttention, CacheTensor
from think_compile.passes.layout import arranged, stride_order
from think_compile.passes.normalize import AUTOCAST, Normalized
from think_compile.passes.observe import observed
from think_compile.passes.own_rows import passes_heads_once
from think_compile.passes.plan import (
    Constant,
    CopiedHandle,
    GrownKeys,
    GrownValues,
    NewKeys,
    NewValues,
    Output,
    Returned,
    Rewritten,
    SameHandle,
)

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_WRITE_IN_PLACE = {steps.step_fixed, steps.append_keys_fixed, filling.append_filling}


class _Later(NamedTuple):
    """What a later call does in the place of an attention, and of a written-out one's product with its keys."""

    attend: Callable[..., Any]
    logits: Callable[..., Any]


def _later(site: CachedAttention) -> _Later:
    if site.filling:
        return _Later(filling.attend_filling, filling.logits_filling)
    if site.fixed:
        return _Later(steps.attend_fixed, written_out.logits_fixed)
    return _Later(steps.attend_growing, written_out.logits_growing)


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
    normalized: Normalized,
    sites: Sequence[CachedAttention],
    packed: frozenset[int],
    config: ThinkConfig,
    own_rows: frozenset[Node] = frozenset(),
    floors_apart: bool = False,
    pending: Sequence[CachedAttention] = (),
) -> Rewritten:
    """Rewrite ``sites``.

    ``packed`` are the inputs that hold handles with packed stores, ``own_rows`` the key caches of which a first call
    needs to read its own rows only; ``floors_apart`` as in :class:`.draft.Draft`; of ``pending`` ones the channels are
    chosen, and nothing else is done.
    """
    with observed("rewrite", normalized.graph_module.graph) as count:
        rewriter = _Rewriter(normalized, packed, config, own_rows, floors_apart)
        rewriter.choose(pending)
        rewritten = rewriter.run(sites)
        count.matches, count.graph = len(sites), rewritten.graph_module.graph
    return rewritten


class _Rewriter(Draft):
    """One rewriting, and what is known of its outputs so far."""

    def __init__(
        self,
        normalized: Normalized,
        packed: frozenset[int],
        config: ThinkConfig,
        own_rows: frozenset[Node],
        floors_apart: bool,
    ) -> None:
        super().__init__(normalized, config, floors_apart)
        self.packed, self.own_rows = packed, own_rows
        self.results: list[Node] = []
        self.made: dict[int, Output] = {}  # output index of the normalized graph -> how it is made
        self.appended: list[tuple[int, Any]] = []
        self.copied: list[int] = []
        self.written_fixed: list[tuple[int, Any]] = []
        self.filled: list[int] = []
        self.chosen: list[tuple[int, int, steps.LayerSpec]] = []

    def choose(self, pending: Sequence[CachedAttention]) -> None:
        """Behind untouched attentions, whose keys stay what they are: choose the channels for a later call."""
        for readers in _by_cache(pending):
            site = readers[0]
            with self.behind(self.at(readers[-1].attention.node)):
                k = self.canonical(self.at(site.keys.root), site.keys)
                spec = layer_spec(site, self.config)
                arguments = (self._joined_queries(readers, k), k, self.mask(site, k), spec, None)
                position = self._result(self.graph.call_function(steps.choose_bounded, arguments))
            self.chosen.append((self.normalized.placeholders.index(site.keys.root), position, spec))

    def run(self, sites: Sequence[CachedAttention]) -> Rewritten:
        for readers in _by_cache(sites):
            past = readers[0].past
            if past is not None and self.packed.issuperset(past):
                self._later_call(readers)
            elif readers[0].keys.root in self.own_rows:
                self._first_call_of_own_rows(readers)
            else:
                self._first_call(readers)
        outputs, replaced = self._finish_outputs()
        self._drop_unused()
        graph_module = GraphModule(self.normalized.graph_module, self.graph)
        self.graph.lint()
        order = self.graph.find_nodes(op="placeholder")
        inputs = [self.inputs[n] for n in order]
        written = self.written_fixed, self.filled, self.chosen
        return Rewritten(graph_module, inputs, outputs, replaced, self.appended, self.copied, *written)

    def _result(self, node: Node) -> int:
        self.results.append(node)
        return len(self.results) - 1

    def _joined_queries(self, readers: Sequence[CachedAttention], k: Node) -> Node:
        """The queries of all attentions that read one cache, as one of larger groups."""
        queries = [self.queries(site, k) for site in readers]
        if len(queries) == 1:
            return queries[0]
        return self.graph.call_function(steps.joined_queries, (queries, int(readers[0].keys.size(HEAD))))

    # ------------------------------------------------------------------------------------------- first calls

    def _first_call(self, readers: Sequence[CachedAttention]) -> None:
        """Behind the untouched attentions: score, prune and store the keys; copy the values into their buffer."""
        site = readers[0]
        with self.behind(self.at(readers[-1].attention.node)):
            k = self.canonical(self.at(site.keys.root), site.keys)
            v = self.canonical(self.at(site.values.root), site.values)
            arguments = [self._joined_queries(readers, k), k, v, self.mask(site, k)]
            if site.fixed:
                arguments.append(self.start(site))
            step = steps.first_call_fixed if site.fixed else steps.first_call_growing
            arguments.append(layer_spec(site, self.config))
            if site.window is not None:
                step = filling.first_call_filling if site.filling else steps.first_call_bounded
                arguments += [self.number(site.window.read), self.number(site.window.kept)]
            self._keep(
                site,
                self.graph.call_function(step, tuple(arguments)),
                _length_kept(site.keys) if site.filling else None,
            )

    def _first_call_of_own_rows(self, readers: Sequence[CachedAttention]) -> None:
        """In the place of the attentions: the same to the new rows alone. They are all that is stored."""
        site = readers[0]
        for reader in readers:
            with self.graph.inserting_before(self.at(reader.attention.node)):
                k_new, v_new, attention = self._new_rows(reader.keys), self._new_rows(reader.values), reader.attention
                arguments = (self.at(attention.q), k_new, v_new, self.at(attention.mask), self.at(attention.scale))
                arguments += (attention.is_causal, passes_heads_once(reader))
                out = self._as(self.graph.call_function(steps.attend_own_rows, arguments), attention.node)
            self.replace(attention.node, out)
        with self.behind(self.at(readers[-1].attention.node)):
            k_new, v_new = self._new_rows(site.keys), self._new_rows(site.values)
            arguments = (self._joined_queries(readers, k_new), k_new, v_new, self.mask(site, k_new))
            arguments += (layer_spec(site, self.config), self.number(site.keys.size(TOKEN)))
            self._keep(site, self.graph.call_function(steps.first_call_own_rows, arguments), site.query_tokens)

    def _keep(self, site: CachedAttention, stored: Node, written: Any = None) -> None:
        """What a first call stores becomes the caches that the caller takes; ``written``: rows of tokens, if known."""
        spec = layer_spec(site, self.config)
        parts = [self.graph.call_function(operator.getitem, (stored, i)) for i in range(5 if site.in_buffer else 4)]
        positions = [self._result(part) for part in parts]
        for index, layout in site.keys.outputs.items():
            self.made[index] = NewKeys(positions[0], _length_kept(site.keys), site.in_buffer, layout, spec, written)
        for index, layout in site.values.outputs.items():
            self.made[index] = NewValues(positions[-1], _length_kept(site.values), site.in_buffer, layout)

    # ------------------------------------------------------------------------------------------- later calls

    def _later_call(self, readers: Sequence[CachedAttention]) -> None:
        """Attend to the packed store; then append the new keys to it."""
        site = readers[0]
        if site.values.read_elsewhere or any(reader.attention.region is not None for reader in readers):
            self._replace_values(site)
        if site.fixed and len(readers) == 1 and site.attention.region is None:
            self._attend(site, and_append=True)
            self._leave_fixed(site)
            return
        for reader in readers:
            attend = self._attend if reader.attention.region is None else self._attend_written_out
            attend(reader)
        with self.behind(self.at(readers[-1].attention.node)):
            if site.filling:
                self._append_filling(readers)
            elif site.fixed:
                self._append_fixed(readers)
            else:
                self._append_growing(readers)

    def _new_rows(self, tensor: CacheTensor) -> Node:
        return self.canonical(self.at(tensor.join.new), tensor)

    def _attend(self, site: CachedAttention, and_append: bool = False) -> None:
        """In the place of the attention operation; ``and_append``: to a fixed cache, which then holds the tokens."""
        attention = site.attention
        with self.graph.inserting_before(self.at(attention.node)):
            k_new, v_new = self._new_rows(site.keys), self._new_rows(site.values)
            mask = self._causal_to_end(site, k_new) if attention.causal_to_end else self.mask(site, k_new)
            arguments = [self.queries(site, k_new), k_new, v_new, mask]
            arguments += [*self.stored_keys(site), self.stored_values(site), *self.span(site)]
            arguments += [self.at(attention.scale), attention.is_causal, *self.part(site)]
            if and_append:
                arguments += [self.mask(site, k_new), layer_spec(site, self.config)]
            step = steps.step_fixed if and_append else _later(site).attend
            out = self.in_turn(site, self.graph.call_function(step, tuple(arguments)))
            if attention.layout != CANONICAL:
                out = self.graph.call_function(from_canonical, (out, attention.layout))
            out = self._as(out, attention.node)
        self.replace(attention.node, out)

    def _causal_to_end(self, site: CachedAttention, k_new: Node) -> Node | None:
        if site.query_tokens == 1 and isinstance(site.query_tokens, int):
            return None
        past, extent = self.span(site)[0], self.span(site)[1]
        if site.filling:
            joined = self.graph.call_function(operator.sub, self.span(site))
            return self.graph.call_function(steps.causal_behind, (k_new, joined))
        if site.fixed:
            return self.graph.call_function(steps.causal_to_end, (k_new, extent))
        if site.window is not None:
            first, read = self.part(site)
            if read is not None:
                return self.graph.call_function(steps.causal_to_end, (k_new, read))
            past = self.graph.call_function(operator.sub, (past, first))
        return self.graph.call_function(steps.causal_behind, (k_new, past))

    def _as(self, out: Node, old: Node) -> Node:
        """``out`` as ``old`` lies in memory, which later views rely on."""
        value = old.meta["val"]
        out = self.graph.call_function(steps.laid_out, (out, stride_order(value)))
        out.meta["val"] = value
        return out

    def _attend_written_out(self, site: CachedAttention) -> None:
        """The product with the keys becomes one with the packed ones."""
        region = site.attention.region
        assert region is not None
        with self.graph.inserting_before(self.at(region.logits.node)):
            k_new = self._new_rows(site.keys)
            arguments = (self.queries(site, k_new), k_new, *self.stored_keys(site), *self.span(site), *self.part(site))
            logits = self._as_product(
                site, self.in_turn(site, self.graph.call_function(_later(site).logits, arguments))
            )
        self.replace(region.logits.node, logits)

    def _as_product(self, site: CachedAttention, logits: Node) -> Node:
        assert site.attention.region is not None and site.queries is not None
        product, layout = site.attention.region.logits, site.queries
        formula = (self.at(product.alpha), self.at(product.bias), self.at(product.beta))
        dtype = product.node.meta["val"].dtype
        arguments = (logits, self.at(product.left), layout.queries, layout.logits, *formula, dtype)
        return self._as(self.graph.call_function(written_out.as_product, arguments), product.node)

    def _replace_values(self, site: CachedAttention) -> None:
        """Where the model joins its values: append the new ones in place, and go on with the buffer."""
        tensor = site.values
        root = self.at(tensor.root)
        for node in arranged(tensor.root):
            if node.target in _VIEWS:  # of a buffer with room to grow, a view may have to copy
                self.at(node).target = aten.reshape.default
            if node.target is aten.copy.default:  # would bring back the tensor that is written over
                self.at(node).replace_all_uses_with(self.at(node).args[1])
        with self.graph.inserting_before(root):
            arguments = (self._new_rows(tensor), self.stored_values(site))
            if site.filling:
                values = self.graph.call_function(filling.joined_values, (*arguments, *self.span(site)))
            else:
                arguments += (self.span(site)[0], not site.fixed, *self.part(site)[:1])
                values = self.graph.call_function(steps.append_values, arguments)
            values = self.graph.call_function(from_canonical, (values, tensor.layout))
        values.meta["val"] = tensor.root.meta["val"]
        self.replace(tensor.root, values)

    def _append_growing(self, readers: Sequence[CachedAttention]) -> None:
        site = readers[0]
        assert site.past is not None
        arguments = (self._new_rows(site.keys), *self.stored_keys(site), self.span(site)[0])
        ring = self._result(self.graph.call_function(steps.append_keys_growing, arguments))
        self.appended += [(index, site.query_tokens) for index in site.past]
        for index, layout in site.keys.outputs.items():
            self.made[index] = GrownKeys(site.past[0], ring, layout, site.window and _length_kept(site.keys))
        for index, layout in site.values.outputs.items():
            self.made[index] = GrownValues(site.past[1], layout, site.window and _length_kept(site.values))

    def _append_fixed(self, readers: Sequence[CachedAttention]) -> None:
        site = readers[0]
        k_new = self._new_rows(site.keys)
        arguments = [self._joined_queries(readers, k_new), k_new, self.mask(site, k_new)]
        arguments += [*self.stored_keys(site), *self.span(site), layer_spec(site, self.config)]
        self.graph.call_function(steps.append_keys_fixed, tuple(arguments))
        self._leave_fixed(site)

    def _append_filling(self, readers: Sequence[CachedAttention]) -> None:
        site = readers[0]
        new = self._new_rows(site.keys), self._new_rows(site.values)
        stored = *self.stored_keys(site), self.stored_values(site)
        arguments = (*new, *stored, self.span(site)[0], layer_spec(site, self.config))
        self.graph.call_function(filling.append_filling, arguments)
        self._leave_fixed(site)

    def _leave_fixed(self, site: CachedAttention) -> None:
        assert site.past is not None
        if site.filling:
            self.filled.append(site.past[0])
        else:
            self.written_fixed.append((site.past[0], site.query_tokens))
        for tensor, index in zip((site.keys, site.values), site.past, strict=True):
            in_place = index in self.normalized.written
            if not in_place:
                self.copied.append(index)
            for output in tensor.outputs:
                self.made[output] = SameHandle(index) if in_place else CopiedHandle(index)

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
                user.replace_all_uses_with(self.size(user.meta["val"]))
                self.graph.erase_node(user)


def _length_kept(tensor: CacheTensor) -> Any:
    """How many tokens a call leaves in a growing cache, or in a window's buffer."""
    kept = None if tensor.window is None else tensor.window.kept
    return tensor.size(TOKEN) if kept is None else kept


def _must_stay(node: Node) -> bool:
    if node.op in ("placeholder", "output") or node.target in _WRITE_IN_PLACE | AUTOCAST | ASSERTIONS:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _by_cache(sites: Sequence[CachedAttention]) -> list[list[CachedAttention]]:
    """The sites, those that read one cache together, in graph order."""
    groups: dict[Node, list[CachedAttention]] = {}
    for site in sites:
        groups.setdefault(site.keys.root, []).append(site)
    return list(groups.values())
