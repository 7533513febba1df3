"""The outputs of a rewritten graph: new stores, written ones, and what the caller's graph returned."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from think_compile.cache.canonical import TOKEN
from think_compile.formats.base import CacheFormat
from think_compile.passes.functional import ASSERTIONS
from think_compile.passes.normalize import AUTOCAST, Normalized
from think_compile.passes.prove.site import CacheSite, CacheTensor, FormatOf
from think_compile.passes.rewrite import plan
from think_compile.passes.rewrite.draft import Draft
from think_compile.passes.rewrite.plan import Positions

aten = torch.ops.aten
_WRITE = {CacheFormat.step, CacheFormat.append, CacheFormat.join}  # these write in place


class Outputs(Draft):
    """A draft, and its outputs so far.

    Attributes:
        packed: the inputs with handles on packed stores.
        results: the outputs of the new graph.
        made: by output of the caller's graph, how it is made.
    """

    def __init__(
        self, normalized: Normalized, packed: frozenset[int], format_of: FormatOf, windows_apart: bool
    ) -> None:
        super().__init__(normalized, format_of, windows_apart)
        self.packed = packed
        self.results: list[Node] = []
        self.made: dict[int, plan.Output] = {}
        self.rewritten = plan.Rewritten()

    def is_packed(self, site: CacheSite) -> bool:
        return site.past is not None and self.packed.issuperset(site.past)

    def result(self, node: Node) -> int:
        """Add an output; returns its position."""
        self.results.append(node)
        return len(self.results) - 1

    def results_of(self, states: Node, side: int, names: Sequence[str]) -> Positions:
        """Add outputs for the parts ``names`` of one of two sides, in that order."""
        return self.parts_of(self.call(operator.getitem, states, side), names)

    def parts_of(self, state: Node, names: Sequence[str]) -> Positions:
        """Add outputs for the parts ``names`` of a side."""
        parts = [(name, self.call(operator.getitem, state, name)) for name in names]
        return tuple((name, self.result(part)) for name, part in parts)

    def keep(self, site: CacheSite, states: Sequence[Node], written: Any = None) -> None:
        """Make the caller's caches from their stored form."""
        format = self.format(site)
        for (of, tensor), state in zip(site.sides, states, strict=True):
            positions = self.parts_of(state, [p.name for p in format.side(of).parts(fixed=site.in_buffer)])
            length, dtype = length_kept(tensor), tensor.root.meta["val"].dtype
            n_written = written if of == "keys" else None
            for index, layout in tensor.outputs.items():
                self.made[index] = plan.NewStore(
                    of, format, positions, length, site.in_buffer, layout, dtype, n_written
                )

    def replaced_parts(self, site: CacheSite, of: str) -> list[str]:
        """The parts to be replaced by new tensors in each call: only growing caches have such parts."""
        parts = self.format(site).side(of).parts(fixed=site.in_buffer)
        return [] if site.in_buffer else [part.name for part in parts if part.replaced]

    def leave(self, site: CacheSite, left_of: Sequence[Positions]) -> None:
        """Give the caller the written caches."""
        assert site.past is not None
        for (of, tensor), index, left in zip(site.sides, site.past, left_of, strict=True):
            if site.in_buffer:
                self._leave_fixed(site, of, tensor, index)
                continue
            self.rewritten.appended.append((index, site.query_tokens))
            kept = None if site.window is None else length_kept(tensor)
            for output, layout in tensor.outputs.items():
                self.made[output] = plan.GrownStore(index, left, layout, kept)

    def _leave_fixed(self, site: CacheSite, of: str, tensor: CacheTensor, index: int) -> None:
        self.rewritten.sides.append((index, site.in_rolling_buffer))
        if of == "keys":
            self.rewritten.written.append(plan.Written(index, site.query_tokens, site.in_rolling_buffer))
        in_place = index in self.normalized.written
        if not in_place:
            self.rewritten.copied.append(index)
        for output in tensor.outputs:
            self.made[output] = plan.SameHandle(index) if in_place else plan.CopiedHandle(index)

    def finish(self) -> plan.Rewritten:
        """Close the graph."""
        self._finish_outputs()
        self._drop_unused()
        self.graph.lint()
        self.rewritten.graph_module = GraphModule(self.normalized.graph_module, self.graph)
        self.rewritten.inputs = [self.inputs[n] for n in self.graph.find_nodes(op="placeholder")]
        return self.rewritten

    def _finish_outputs(self) -> None:
        output = self.graph.output_node()
        values, written = list(output.args[0]), self.normalized.written
        with self.graph.inserting_before(output):
            for position, index in enumerate(written):
                made = self.made.get(position)
                if made is None:  # no cache: copied back, as the model wrote it
                    self.call(aten.copy_.default, self.caller_inputs[index], values[position])
                elif not isinstance(made, plan.SameHandle | plan.CopiedHandle):
                    self.rewritten.replaced.append((index, made))
        self.rewritten.outputs = [self._finish_output(i, values[i]) for i in range(len(written), len(values))]
        output.args = (tuple(self.results),)

    def _finish_output(self, index: int, value: Any) -> plan.Output:
        if index in self.made:
            return self.made[index]
        return plan.Returned(self.result(value)) if isinstance(value, Node) else plan.Constant(value)

    def _drop_unused(self) -> None:
        """Drop dead nodes, then unread inputs: above all the packed handles, which have no dense value."""
        self.graph.eliminate_dead_code(is_impure_node=_must_stay)
        for index in self.packed:
            self._drop_shape_readers(self.caller_inputs[index])
        for node in self.graph.find_nodes(op="placeholder"):
            if not node.users:
                del self.inputs[node]
                self.graph.erase_node(node)

    def _drop_shape_readers(self, node: Node) -> None:
        for user in list(node.users):
            if user.target is aten.sym_size.int:
                user.replace_all_uses_with(self.size(user.meta["val"]))
                self.graph.erase_node(user)


def length_kept(tensor: CacheTensor) -> Any:
    """Number of tokens left by a call in a growing cache, or in a window's buffer."""
    kept = None if tensor.window is None else tensor.window.kept
    return tensor.size(TOKEN) if kept is None else kept


def _must_stay(node: Node) -> bool:
    if node.op in ("placeholder", "output") or node.target in AUTOCAST | ASSERTIONS:
        return True
    if getattr(node.target, "__func__", None) in _WRITE:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
