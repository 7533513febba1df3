"""The Dynamo backend: the pass list, in order, and what happens when a graph is not to be rewritten."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from think_compile.config import ThinkConfig, fallback_allowed
from think_compile.handle import RUNNING, Handle, LostWrite
from think_compile.holders import Place, holders, owns_its_storage
from think_compile.kernels.steps import LayerSpec
from think_compile.lower import CompilationFailed
from think_compile.passes.attention import Attention, find_attention, module_path
from think_compile.passes.broken import broken_attention
from think_compile.passes.kv_cache import CachedAttention, Findings, find_caches
from think_compile.passes.naming import full_path, with_full_path
from think_compile.passes.normalize import Normalized, normalize
from think_compile.passes.own_rows import find_own_rows
from think_compile.passes.readers import reads_any
from think_compile.passes.refusal import Reason, Refused, where
from think_compile.passes.rewrite import layer_spec, rewrite
from think_compile.passes.room import find_starts
from think_compile.pending import Pending
from think_compile.report import Ledger, Report, refused_graph, refused_record, rewritten_record
from think_compile.runtime import BeginsAgain, CacheFull, PackedInputs, Program
from think_compile.store import Store, writable

log = logging.getLogger(__name__)

ISSUES = "please report it with this message and the model's name"


class ThinkWarning(UserWarning):
    """Something of a model was left as it was, although pruning was asked for."""


class NothingRewritten(RuntimeError):
    """``strict=True``, and a layer could not be rewritten."""


class Backend:
    """Compiles the graphs of one model, and remembers what it did."""

    def __init__(self, model: torch.nn.Module, config: ThinkConfig, *, dry: bool = False) -> None:
        self.model, self.config, self.dry = weakref.ref(model), config, dry
        self.lock = threading.RLock()  # a graph remembers its last step: threads take turns
        self.ledger = Ledger()
        self.stores: weakref.WeakSet[Store] = weakref.WeakSet()
        self.graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
        self.pending = Pending()
        self.warned: set[str] = set()
        self.given_up: set[str] = set()  # layers that a later call could not read packed: new caches stay dense
        self.checked = self.graphs_refused_for_gradients = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.ledger.graphs += 1
        try:
            return self._compile(gm, example_inputs)
        except NothingRewritten:
            raise
        except Exception as error:
            return self._fall_back(gm, error)

    @property
    def may_fall_back(self) -> bool:
        """Whether an internal failure leaves a graph as the model wrote it, instead of raising."""
        return not self.config.strict and fallback_allowed()

    @property
    def lowered(self) -> list[Any]:
        """The lowerings that the live graphs hold."""
        return [program.lowered for graph in self.graphs for program in graph.programs.values()]

    def report(self) -> Report:
        """What was done so far, and the caches that live now."""
        return Report.of(self.config, self.ledger, self.stores)

    # ------------------------------------------------------------------------------------------------ compiling

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
            reason = Reason.REQUIRES_GRAD.value
            self.graphs_refused_for_gradients = True
            self.warn_once(f"called with gradients enabled: {reason}. The call runs exactly, unpruned.")
            return self._plain(gm, example_inputs)
        try:
            normalized = normalize(gm, example_inputs)
        except Refused as refused:
            self._refuse_graph(refused)
            return self._plain(gm, example_inputs)
        names = self._parameter_names(normalized, example_inputs)
        sites = [with_full_path(site, names) for site in find_attention(normalized.graph_module)]
        if not sites:
            for part, why in broken_attention(normalized):
                layer = full_path(module_path(part), part, names)
                self._refuse_graph(Refused(why, where(part)), layer)
            return self._plain(gm, example_inputs)
        findings = find_caches(normalized, sites, self.config.recent if self.config.sliding else None)
        self._refuse_unswappable(findings, example_inputs)
        self._refuse_given_up(findings, example_inputs)
        self._record(normalized, findings)
        self._give_up_what_is_read_densely(normalized, findings, example_inputs)
        if self.dry or not (findings.cached or findings.pending):
            return self._plain(gm, example_inputs)
        return CompiledGraph(self, gm, normalized, findings, self._own_tensors(example_inputs))

    def _parameter_names(self, normalized: Normalized, example_inputs: Sequence[Any]) -> dict[Node, str]:
        """The names, in the model, of the graph's inputs that are its parameters."""
        model = self.model()
        names = {} if model is None else {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        inputs = zip(normalized.placeholders, example_inputs, strict=True)
        return {node: names[id(value)] for node, value in inputs if id(value) in names}

    def _own_tensors(self, example_inputs: Sequence[Any]) -> frozenset[int]:
        """The graph's inputs that are the model's parameters and buffers."""
        model = self.model()
        own = set() if model is None else {id(x) for x in (*model.parameters(), *model.buffers())}
        return frozenset(i for i, x in enumerate(example_inputs) if id(x) in own)

    def _give_up_what_is_read_densely(
        self, normalized: Normalized, findings: Findings, example_inputs: Sequence[Any]
    ) -> None:
        """A layer whose cache an earlier graph packed, and that this one cannot read packed: it is left alone now."""
        packed = {i for i, x in enumerate(example_inputs) if isinstance(x, Handle) and not x.is_dense}
        read = packed.difference(*(site.past for site in findings.cached if site.past is not None))
        read = {i for i in read if _is_read(normalized.placeholders[i])}
        if read:
            self.warn_once(f"{len(read)} pruned caches are read densely from now on: {_sentence(findings.refused)}")
            inputs = {normalized.placeholders[i] for i in read}
            given_up = [refused for refused in findings.refused if refused[0].path and reads_any(refused[0], inputs)]
            self.given_up |= {site.path for site, _ in given_up}
            self.ledger.give_up(refused_record(*refused) for refused in given_up)

    def _refuse_unswappable(self, findings: Findings, example_inputs: Sequence[Any]) -> None:
        """A dense tensor that is written in place can become a handle only where its holder is known."""
        for site in list(findings.cached):
            held = site.past if site.in_buffer and site.past is not None else ()
            if not all(self._is_swappable(example_inputs[i]) for i in held):
                findings.cached.remove(site)
                findings.refused.append((site.attention, Refused(Reason.HELD_OUTSIDE)))

    def _is_swappable(self, tensor: Tensor) -> bool:
        return isinstance(tensor, Handle) or (owns_its_storage(tensor) and bool(self._holders(tensor)))

    def _refuse_given_up(self, findings: Findings, example_inputs: Sequence[Any]) -> None:
        for site in list(findings.cached):
            is_packed = site.past is not None and all(isinstance(example_inputs[i], Handle) for i in site.past)
            if site.attention.path in self.given_up and not is_packed:
                findings.cached.remove(site)
                findings.refused.append((site.attention, Refused(Reason.GIVEN_UP)))

    def _holders(self, tensor: Tensor) -> list[Place]:
        running = RUNNING.get()
        return holders(tensor, self.model(), running and running.arguments)

    def replace(self, tensor: Tensor, handle: Handle) -> None:
        """Put a handle where a written dense cache tensor stood."""
        if isinstance(tensor, Handle):
            tensor.pack_anew(handle.cell)
            return
        places = self._holders(tensor)
        for place, name in places:
            place[name] = handle
        if not places:  # it is held elsewhere in this call: written as the model would have
            writable(tensor).copy_(handle.dense())

    def _plain(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The graph as the model wrote it; handles that reach it see its operations one by one."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        has_handles = any(isinstance(node.meta.get("example_value"), Handle) for node in placeholders)
        if self.config.lowering == "eager" or has_handles or self.dry:
            return gm.forward
        from torch._inductor.compile_fx import compile_fx

        options = dict(self.config.inductor_options) or None
        return cast(Callable[..., Any], compile_fx(gm, list(example_inputs), config_patches=options))

    def _fall_back(self, gm: GraphModule, error: Exception) -> Callable[..., Any]:
        self.excuse(error)
        return gm.forward

    def excuse(self, error: Exception) -> None:
        """Warn of an internal failure, or raise it where falling back is not wanted."""
        if not self.may_fall_back:
            raise error
        self.warn_once(
            f"an internal failure, {type(error).__name__}: {error}. This graph runs as the model wrote it, with no "
            f"saving; {ISSUES}."
        )
        log.debug("internal failure", exc_info=error)

    # ---------------------------------------------------------------------------------------------- reporting

    def _refuse_graph(self, refused: Refused, layer: str = "") -> None:
        self.ledger.add([refused_graph(refused, layer)])
        text = f"a graph of the model was left as it was: {refused.reason.value} [{refused.detail}]"
        if self.config.strict:
            raise NothingRewritten(f"strict=True, and {text}")
        self.warn_once(text)

    def _record(self, normalized: Normalized, findings: Findings) -> None:
        records = [rewritten_record(site, normalized.sources, self.config) for site in findings.cached]
        pending = {site.attention.node for site in findings.pending}  # a later call tells
        refused = [r for r in findings.refused if r[0].node not in pending]
        known = {path for path, record in self.ledger.layers.items() if record.reason is None}
        unknown = [r for r in findings.refused if r[0].node in pending and r[0].path not in known]
        records += [refused_record(*one) for one in (*refused, *unknown)]
        self.ledger.add(records)
        problems = [r for r in refused if r[1].reason is not Reason.NOT_CACHED]
        nothing = not pending and not any(record.reason is None for record in self.ledger.layers.values())
        if self.config.strict and (problems or nothing):
            raise NothingRewritten(f"strict=True, and {_sentence(problems or findings.refused)}")
        if nothing and not self.given_up:
            self.warn_once(f"nothing was rewritten: {_sentence(findings.refused)}")

    def check_attention_was_seen(self) -> None:
        """After a whole call: a model in which there is nothing to rewrite."""
        if self.checked or self.graphs_refused_for_gradients:
            return
        self.checked = True
        if self.ledger.layers:
            return
        text = "nothing was rewritten: no attention with a cache was found in the graphs of the first call"
        if self.config.strict:
            raise NothingRewritten(f"strict=True, and {text}")
        self.warn_once(text)

    def warn_once(self, text: str) -> None:
        """Once for each text; ``explain`` does not warn, its report is what was asked for."""
        if text not in self.warned and not self.dry:
            self.warned.add(text)
            warnings.warn(f"think_compile: {text}", ThinkWarning, stacklevel=2)


def _is_read(node: Node) -> bool:
    """Whether something reads an input, and does not only write over all of it."""
    return any(user.target is not torch.ops.aten.copy.default or user.args[1] is node for user in node.users)


def _sentence(refused: Sequence[tuple[Attention, Refused]]) -> str:
    """The refusals for people: layers of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for site, why in refused:
        detail = f" [{why.detail}]" if why.detail else ""
        by_reason.setdefault(why.reason.value + detail, []).append(site.path or "an attention")
    return "; ".join(f"{len(paths)} layers ({paths[0]}, ...): {reason}" for reason, paths in by_reason.items())


class CompiledGraph:
    """A graph with rewritten layers, as Dynamo calls it."""

    def __init__(
        self,
        backend: Backend,
        gm: GraphModule,
        normalized: Normalized,
        findings: Findings,
        own: frozenset[int],
    ) -> None:
        self.backend, self.gm, self.normalized, self.own = backend, gm, normalized, own
        sites = self.sites = findings.cached
        self.pending = findings.pending
        self.own_rows, self.starts = find_own_rows(normalized, sites), find_starts(normalized, sites)
        self.packed_inputs = PackedInputs(sites)
        self.programs: dict[tuple[frozenset[int], int, bool], Program] = {}
        self.latest: tuple[frozenset[int], int, bool] | None = None  # the program that ran last
        backend.graphs.add(self)
        self.plain: Callable[..., Any] | None = None  # after an internal failure: the graph as the model wrote it

    def __call__(self, *args: Any) -> Any:
        if self.plain is None:
            try:
                with self.backend.lock:
                    return self._run_or_give_up(args)
            except (CacheFull, LostWrite, torch.OutOfMemoryError):
                raise  # the caller's own, and nothing that the plain graph would do better
            except Exception as error:
                self.backend.excuse(error.error if isinstance(error, CompilationFailed) else error)
                self.plain = self.gm.forward
        return self.plain(*args)

    def _run_or_give_up(self, args: Sequence[Any]) -> Any:
        try:
            return self._run(args)
        except BeginsAgain:
            self._give_up_rings(args)
            return self._run(args)

    def _give_up_rings(self, args: Sequence[Any]) -> None:
        """Caches whose positions turn out to begin again while all rows are read: dense from now on."""
        why = Refused(Reason.UNKNOWN_WINDOW, "its first row is written again while the others are read")
        rings = [site for site in self.sites if site.fixed and site.past is not None]
        for handle in (args[i] for site in rings for i in site.past or ()):
            if isinstance(handle, Handle):
                handle.densify()
        refused = [(site.attention, why) for site in rings]
        self.backend.given_up |= {site.attention.path for site in rings}
        self.backend.ledger.give_up(refused_record(*one) for one in refused)
        self.backend.warn_once(f"pruned caches are read densely from now on: {_sentence(refused)}")

    def _run(self, args: Sequence[Any]) -> Any:
        again = self._run_again(args)
        if again is not None:
            return again
        args = self.backend.pending.take_up(args, self.sites, self._spec)
        packed = self.packed_inputs.of(args, self.backend.config)
        own_rows = self.own_rows is not None and self.own_rows.suffice(args)
        key = packed, len(self.backend.given_up), own_rows
        if key not in self.programs:
            self._warn_of_unusable(packed, args)
            self.programs[key] = self._program(packed, own_rows)
        self.latest = key if self.own_rows is None else None
        outputs = self.programs[key].run(args, self.backend.replace, self.backend.pending.note)
        for output in outputs:
            if isinstance(output, Handle) and output.store is not None:
                self.backend.stores.add(output.store)
        return outputs

    def _run_again(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """The outputs, if the call is a step like the last one."""
        if self.latest is None or self.latest[1] != len(self.backend.given_up):
            return None
        program = self.programs.get(self.latest)
        return None if program is None else program.run_again(args)

    def _warn_of_unusable(self, packed: frozenset[int], args: Sequence[Any]) -> None:
        past = {index for site in self.sites if site.past is not None for index in site.past}
        unusable = [args[i] for i in past - packed if isinstance(args[i], Handle) and not args[i].is_dense]
        if unusable:
            self.backend.warn_once(
                f"{len(unusable)} pruned caches were made with other settings or do not fit this call, for example "
                f"{unusable[0]}; they are read densely and pruned anew"
            )

    def _program(self, packed: frozenset[int], own_rows: bool) -> Program:
        config = self.backend.config
        sites = [site for site in self.sites if self._is_wanted(site, packed)]
        roots = self.own_rows.roots if self.own_rows is not None and own_rows else frozenset()
        rewritten = rewrite(self.normalized, sites, packed, config, roots, self.pending)
        return Program(self.normalized, rewritten, config, self.own, self.starts)

    def _spec(self, site: CachedAttention) -> LayerSpec:
        return layer_spec(site, self.backend.config)

    def _is_wanted(self, site: CachedAttention, packed: frozenset[int]) -> bool:
        """Whether a layer is to be rewritten: it was not given up, or what it reads is packed already."""
        is_packed = site.past is not None and packed.issuperset(site.past)
        return is_packed or site.attention.path not in self.backend.given_up
