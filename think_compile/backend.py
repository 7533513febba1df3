"""The Dynamo backend of one model: runs the passes in order, and records refusals."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from think_compile.cache.cell import Cell
from think_compile.cache.handle import Handle
from think_compile.cache.holders import Place, holders, owns_its_storage
from think_compile.cache.rows import writable
from think_compile.config import ThinkConfig, fallback_allowed
from think_compile.formats.base import FormatError
from think_compile.passes.find.attention import Attention, find_attention, module_path
from think_compile.passes.find.broken import broken_attention
from think_compile.passes.find.naming import full_path, told_apart
from think_compile.passes.normalize import Normalized, normalize
from think_compile.passes.prove.kv_cache import Findings, find_caches
from think_compile.passes.prove.readers import reads_any
from think_compile.passes.prove.site import CacheSite
from think_compile.passes.refusal import UNDECIDED, Reason, Refused, where
from think_compile.report import Ledger, Report, refused_graph, refused_record, rewritten_record, sentence
from think_compile.runtime.graph import CompiledGraph, FailedGraph
from think_compile.runtime.pending import Pending
from think_compile.runtime.running import RUNNING

log = logging.getLogger(__name__)

ISSUES = "please report it with this message and the model's name"


class ThinkWarning(UserWarning):
    """A part of a model was left unchanged, although pruning was requested."""


class NothingRewritten(RuntimeError):
    """``strict=True``, and a layer could not be rewritten."""


OF_THE_USER = (NothingRewritten, FormatError)  # raised while compiling, and no failure of ours


class _LeaveAlone(Exception):
    """A graph is left unchanged; the reason was already reported."""


@dataclass
class _Work:
    """A graph on its way through the passes, with their findings so far."""

    gm: GraphModule
    example_inputs: Sequence[Any]
    normalized: Normalized = field(init=False)
    sites: Sequence[Attention] = ()
    findings: Findings = field(default_factory=Findings)
    frame: str = ""  # the module whose code was compiled


class Backend:
    """Compiles the graphs of one model, and keeps a record."""

    def __init__(self, model: torch.nn.Module, config: ThinkConfig, *, dry: bool = False) -> None:
        self.model, self.config, self.dry = weakref.ref(model), config, dry
        self.lock = threading.RLock()  # a graph remembers its last step: threads take turns
        self.ledger = Ledger()
        self.cells: weakref.WeakSet[Cell] = weakref.WeakSet()
        self.graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
        self.pending = Pending()
        self.warned: set[str] = set()
        self.paths: dict[int, str] = {}  # of the model's modules, by identity
        self.given_up: set[str] = set()  # layers that a later call could not read packed: new caches stay dense
        self.checked = self.graphs_refused_for_gradients = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.ledger.graphs += 1
        try:
            return self._compile(gm, example_inputs)
        except OF_THE_USER:
            raise
        except Exception as error:
            return FailedGraph(self, gm, error)

    @property
    def lowered(self) -> list[Any]:
        """The lowerings of the live graphs."""
        return [program.lowered for graph in self.graphs for program in graph.programs.values()]

    def report(self) -> Report:
        """The layers and graphs recorded so far, and the live caches."""
        return Report.of(self.config, self.ledger, self.cells)

    # ------------------------------------------------------------------------------------------------ compiling

    @property
    def passes(self) -> tuple[Callable[[_Work], None], ...]:
        """The passes, in order. Rewriting comes last, at call time: the result depends on the packed caches."""
        return (
            self._leave_gradients,
            self._normalize,
            self._find_attention,
            self._find_caches,
            self._refuse_unswappable,
            self._refuse_in_order,
            self._refuse_given_up,
            self._record_findings,
            self._give_up_what_is_read_densely,
        )

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        work = _Work(gm, example_inputs)
        try:
            for one in self.passes:
                one(work)
        except _LeaveAlone:
            return self._plain(gm, example_inputs)
        if self.dry or not (work.findings.sites or work.findings.pending):
            return self._plain(gm, example_inputs)
        own = self._own_tensors(example_inputs)
        return CompiledGraph(self, gm, work.normalized, work.findings, own, work.frame)

    def _leave_gradients(self, work: _Work) -> None:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in work.example_inputs):
            reason = Reason.REQUIRES_GRAD.value
            self.graphs_refused_for_gradients = True
            self.warn_once(f"called with gradients enabled: {reason}. The call runs exactly, unpruned.")
            raise _LeaveAlone

    def _normalize(self, work: _Work) -> None:
        try:
            work.normalized = normalize(work.gm, work.example_inputs)
        except Refused as refused:
            self._refuse_graph(refused)
            raise _LeaveAlone from None

    def _find_attention(self, work: _Work) -> None:
        names = self._parameter_names(work.normalized, work.example_inputs)
        running, model = RUNNING.get(), self.model()
        self.paths = {} if model is None else {id(module): path for path, module in model.named_modules()}
        work.frame = "" if running is None else self.innermost_module(running.names)
        found = find_attention(work.normalized.graph_module)
        paths = [full_path(site.path, site.q, names) or work.frame for site in found]
        work.sites = told_apart([replace(site, path=path) for site, path in zip(found, paths, strict=True)])
        if work.sites:
            return
        for part, why in broken_attention(work.normalized):
            layer = full_path(module_path(part), part, names) or work.frame
            self._refuse_graph(Refused(why, where(part)), layer)
        raise _LeaveAlone

    def _find_caches(self, work: _Work) -> None:
        work.findings = find_caches(work.normalized, work.sites, self.config.smallest_window, decode=self.config.decode)

    def _parameter_names(self, normalized: Normalized, example_inputs: Sequence[Any]) -> dict[Node, str]:
        """The parameters of the model among the graph's inputs, with their names in the model."""
        model = self.model()
        names = {} if model is None else {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        inputs = zip(normalized.placeholders, example_inputs, strict=True)
        return {node: names[id(value)] for node, value in inputs if id(value) in names}

    def innermost_module(self, variables: Mapping[str, Any]) -> str:
        """The path in the model of the innermost module among a frame's ``variables``; "" for none."""
        held = [self.paths.get(id(value), "") for value in variables.values() if isinstance(value, torch.nn.Module)]
        return max(held, key=lambda path: path.count("."), default="")

    def _own_tensors(self, example_inputs: Sequence[Any]) -> frozenset[int]:
        """The model's parameters and buffers among the graph's inputs."""
        model = self.model()
        own = set() if model is None else {id(x) for x in (*model.parameters(), *model.buffers())}
        return frozenset(i for i, x in enumerate(example_inputs) if id(x) in own)

    def _give_up_what_is_read_densely(self, work: _Work) -> None:
        """Give up layers whose cache an earlier graph packed and this one cannot read packed."""
        findings, placeholders = work.findings, work.normalized.placeholders
        packed = {i for i, x in enumerate(work.example_inputs) if isinstance(x, Handle) and not x.is_dense}
        read = packed.difference(*(site.past for site in findings.sites if site.past is not None))
        read = {i for i in read if _is_read(placeholders[i])}
        if read:
            self.warn_once(f"{len(read)} compressed caches are read densely from now on: {sentence(findings.refused)}")
            inputs = {placeholders[i] for i in read}
            given_up = [refused for refused in findings.refused if reads_any(refused[0], inputs)]
            self.given_up |= {site.path for site, _ in given_up}
            self.ledger.give_up(refused_record(*refused) for refused in given_up)

    def _refuse_unswappable(self, work: _Work) -> None:
        """Refuse dense caches written in place whose holder is unknown: a handle could not replace them."""

        def is_unswappable(site: CacheSite) -> bool:
            held = site.past if site.in_buffer and site.past is not None else ()
            return not all(self._is_swappable(work.example_inputs[i]) for i in held)

        work.findings.refuse(is_unswappable, Refused(Reason.HELD_OUTSIDE))

    def _refuse_in_order(self, work: _Work) -> None:
        """Refuse attentions whose logits or values are read in order of position, if some tokens are not stored."""
        if self.config.tokens is None:
            return
        work.findings.pending.clear()  # their rows stay whole, so a choice made now could not evict any

        def is_in_order(site: CacheSite) -> bool:
            return site.attention.region is not None or any(tensor.read_elsewhere for tensor in site.tensors)

        work.findings.refuse(is_in_order, Refused(Reason.IN_ORDER))

    def _is_swappable(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Handle) or (owns_its_storage(tensor) and bool(self._holders(tensor)))

    def _refuse_given_up(self, work: _Work) -> None:
        def is_given_up(site: CacheSite) -> bool:
            is_packed = site.past is not None and all(isinstance(work.example_inputs[i], Handle) for i in site.past)
            return site.attention.path in self.given_up and not is_packed

        work.findings.refuse(is_given_up, Refused(Reason.GIVEN_UP))

    def _holders(self, tensor: Tensor) -> list[Place]:
        running = RUNNING.get()
        return holders(tensor, self.model(), running and running.arguments)

    def replace(self, tensor: Tensor, handle: Handle) -> None:
        """Put a handle in the place of a written dense cache tensor."""
        self.adopt([handle])
        if isinstance(tensor, Handle):
            tensor.pack_anew(handle.cell)
            return
        places = self._holders(tensor)
        for place, name in places:
            place[name] = handle
        if not places:  # this call's holder is unknown: write to the tensor, as the model would
            writable(tensor).copy_(handle.dense())

    def _plain(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph as the model wrote it; with handles among its inputs, operation by operation."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        has_handles = any(isinstance(node.meta.get("example_value"), Handle) for node in placeholders)
        if self.config.lowering == "eager" or has_handles or self.dry:
            return gm.forward
        from torch._inductor.compile_fx import compile_fx

        options = dict(self.config.inductor_options) or None
        return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=options))

    def adopt(self, values: Iterable[Any]) -> None:
        """Count the caches among ``values`` in the report."""
        for value in values:
            if isinstance(value, Handle) and value.cell is not None and value.cell.family is not self.cells:
                value.cell.join(self.cells)

    # ----------------------------------------------------------------------------------------------- failures

    def excuse(self, error: Exception, scope: str, layers: Sequence[Attention] = ()) -> None:
        """Record our failure on calls of a ``scope`` ("graph", "kind"), run plain now; raises if that is forbidden."""
        if self.config.strict or not fallback_allowed():
            raise error
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        refused = Refused(Reason.FAILED, said)
        records = [refused_record(site, refused) for site in layers]
        self.ledger.give_up(records or [refused_graph(refused)])
        self.warn_once(
            f"an internal failure, {said}. Calls of this {scope} run as the model wrote them, with no saving; {ISSUES}."
        )
        log.debug("internal failure", exc_info=error)

    # ---------------------------------------------------------------------------------------------- reporting

    def _refuse_graph(self, refused: Refused, layer: str = "") -> None:
        self.ledger.add([refused_graph(refused, layer)])
        self._complain(f"a graph of the model was left as it was: {refused.reason.value} [{refused.detail}]")

    def _complain(self, text: str) -> None:
        """Warn, or raise if strict."""
        if self.config.strict:
            raise NothingRewritten(f"strict=True, and {text}")
        self.warn_once(text)

    def record(self, normalized: Normalized, sites: Sequence[CacheSite]) -> None:
        """Note the layers compressed by a graph."""
        self.ledger.add(rewritten_record(site, normalized.sources, self.config) for site in sites)

    def _record_findings(self, work: _Work) -> None:
        findings = work.findings
        self.record(work.normalized, findings.sites)
        pending = {site.attention.node for site in findings.pending}  # a later call decides
        refused = [r for r in findings.refused if r[0].node not in pending]
        known = {path for path, record in self.ledger.layers.items() if record.reason is None}
        unknown = [r for r in findings.refused if r[0].node in pending and r[0].path not in known]
        self.ledger.add(refused_record(*one) for one in (*refused, *unknown))
        problems = [r for r in refused if r[1].reason not in UNDECIDED]
        waits = pending or any(why.reason is Reason.AWAITS_JOIN for _, why in refused)
        nothing = not (findings.sites or waits or any(r.reason is None for r in self.ledger.layers.values()))
        if self.config.strict and (problems or nothing):
            raise NothingRewritten(f"strict=True, and {sentence(problems or findings.refused)}")
        if nothing and not self.given_up:
            self.warn_once(f"nothing was rewritten: {sentence(findings.refused)}")

    def check_attention_was_seen(self) -> None:
        """After a whole call: warn, or raise if strict, if the model has nothing to rewrite."""
        if self.checked or self.graphs_refused_for_gradients:
            return
        self.checked = True
        if not self.ledger.layers:
            self._complain("nothing was rewritten: no attention with a cache was found in the graphs of the first call")

    def warn_once(self, text: str) -> None:
        """Warn once for each text; ``explain`` does not warn: the reasons are in its report."""
        if text not in self.warned and not self.dry:
            self.warned.add(text)
            warnings.warn(f"think_compile: {text}", ThinkWarning, stacklevel=2)


def _is_read(node: Node) -> bool:
    """Whether an input is read, and not only overwritten completely."""
    return any(user.target is not torch.ops.aten.copy.default or user.args[1] is node for user in node.users)
