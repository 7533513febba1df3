"""A compiled graph as Dynamo calls it: choose the program for each call, and handle failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import GraphModule

from think_compile.cache.handle import Handle, LostWrite
from think_compile.cache.store import NoDenseForm
from think_compile.formats.base import RuleError
from think_compile.passes.find.attention import Attention
from think_compile.passes.normalize import Normalized
from think_compile.passes.prove.kv_cache import Findings
from think_compile.passes.prove.site import CacheSite
from think_compile.passes.refusal import Reason, Refused
from think_compile.passes.rewrite.capacity_check import find_starts
from think_compile.passes.rewrite.prompt_only import find_prompt_only
from think_compile.passes.rewrite.rewrite import rewrite
from think_compile.report import refused_record, sentence
from think_compile.runtime.lower import CompilationFailed
from think_compile.runtime.program import BeginsAgain, CacheFull, PackedInputs, Program

if TYPE_CHECKING:
    from think_compile.backend import Backend


class _Graph:
    """A graph of the model, and its plain form."""

    def __init__(self, backend: Backend, gm: GraphModule) -> None:
        self.backend, self.gm = backend, gm
        self.is_plain = False  # after an internal failure

    def _plain_instead(self, error: Exception, args: Sequence[Any], layers: Sequence[Attention] = ()) -> Any:
        """The plain graph's outputs for a call, after a failure of our code.

        An error of the plain graph is the caller's: the error is passed on, and the next call is tried again.
        Otherwise the failure is ours, and the graph stays plain.
        """
        with _restored_on_error(args):
            try:
                outputs = self.gm.forward(*args)
            except NoDenseForm:  # the plain graph cannot stand in
                raise error from None
            self.backend.excuse(error, "graph", layers)
        self.is_plain = True
        return outputs


@contextmanager
def _restored_on_error(args: Sequence[Any]) -> Iterator[None]:
    """Keep packed caches packed if a plain graph raises: its writes make them dense."""
    handles = [x for x in args if isinstance(x, Handle) and x.cell is not None]
    before = [handle.store for handle in handles]
    try:
        yield
    except BaseException:
        for handle, store in zip(handles, before, strict=True):
            handle.put_back(store)
        raise


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator failed; the plain graph would need even more memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class FailedGraph(_Graph):
    """A graph after a failure of our passes."""

    def __init__(self, backend: Backend, gm: GraphModule, error: Exception) -> None:
        super().__init__(backend, gm)
        self.error = error

    def __call__(self, *args: Any) -> Any:
        return self.gm.forward(*args) if self.is_plain else self._plain_instead(self.error, args)


class Key(NamedTuple):
    """The facts that decide, besides the graph, on the program of a call.

    Attributes:
        packed: the inputs read packed.
        given_up: how many layers were given up so far.
        prompt_only: whether first calls on caches of fixed size read only their own rows.
        windows_apart: whether growing caches of equal length have different windows.
    """

    packed: frozenset[int]
    given_up: int
    prompt_only: bool
    windows_apart: bool


class CompiledGraph(_Graph):
    """A graph with rewritten layers."""

    def __init__(
        self,
        backend: Backend,
        gm: GraphModule,
        normalized: Normalized,
        findings: Findings,
        own: frozenset[int],
        frame: str,
    ) -> None:
        """``own``: the inputs with the model's own tensors; ``frame``: the module whose code was compiled."""
        super().__init__(backend, gm)
        self.normalized, self.own = normalized, own
        sites = self.sites = findings.sites
        self.pending = findings.pending
        self.prompt_only, self.starts = find_prompt_only(normalized, findings.cached), find_starts(normalized, sites)
        self.packed_inputs = PackedInputs(sites)
        self.programs: dict[Key, Program] = {}
        self.frame = frame if any(site.attention.path.startswith(frame) for site in sites) else ""
        self.layers: set[str] = set()  # the modules served so far; layers of one kind share a graph
        self.latest: Key | None = None  # the program that ran last
        backend.graphs.add(self)

    def __call__(self, *args: Any) -> Any:
        if self.is_plain:
            return self.gm.forward(*args)
        try:
            with self.backend.lock:
                return self._run_or_give_up(args)
        except (CacheFull, LostWrite):
            raise
        except Exception as error:
            failure = error.error if isinstance(error, CompilationFailed) else error
        if _is_out_of_memory(failure) or isinstance(failure, RuleError):
            raise failure
        return self._plain_instead(failure, args, [site.attention for site in self.sites])

    def _run_or_give_up(self, args: Sequence[Any]) -> Any:
        try:
            return self._run(args)
        except BeginsAgain:
            self._give_up_rings(args)
            return self._run(args)

    def _give_up_rings(self, args: Sequence[Any]) -> None:
        """Make caches dense for good: their positions restart while all rows are read."""
        rings = [site for site in self.sites if site.fixed and site.past is not None]
        for handle in (args[i] for site in rings for i in site.past or ()):
            if isinstance(handle, Handle):
                handle.densify()
        why = Refused(Reason.UNKNOWN_WINDOW, "its rows are written again while those behind are read")
        self._leave(rings, why, "compressed caches are read densely from now on")

    def _leave_filled(self, args: Sequence[Any], packed: frozenset[int]) -> None:
        """Leave caches of fixed size alone that hold tokens already, if a token rule would evict from them."""
        fixed = [site for site in self.sites if site.fixed and site.attention.path not in self.backend.given_up]
        found = [site for site in fixed if site.past is not None and not packed.issuperset(site.past)]
        if found and (self.starts is None or int(self.starts(*args)[0]) > 0):
            self._leave(found, Refused(Reason.FILLED), "caches are left as they are from now on")

    def _leave(self, sites: Sequence[CacheSite], why: Refused, what: str) -> None:
        """Rewrite these layers no more, and say so."""
        refused = [(site.attention, why) for site in sites]
        self.backend.given_up |= {site.attention.path for site in sites}
        self.backend.ledger.give_up(refused_record(*one) for one in refused)
        self.backend.warn_once(f"{what}: {sentence(refused)}")

    def _run(self, args: Sequence[Any]) -> Any:
        again = self._run_again(args)
        if again is not None:
            return again
        format_of = self.backend.config.format_for
        args = self.backend.pending.take_up(args, self.sites, format_of)
        packed = self.packed_inputs.of(args, format_of)
        if self.backend.config.tokens is not None:
            self._leave_filled(args, packed)
        prompt_only = self.prompt_only is not None and self.prompt_only.suffice(args)
        key = Key(packed, len(self.backend.given_up), prompt_only, self.packed_inputs.windows_apart(args, packed))
        if key not in self.programs:
            self._warn_of_unusable(packed, args)
            self.programs[key] = self._program(key)
        self.latest = key if self.prompt_only is None else None
        self.backend.adopt(args)
        if self.frame:
            self._record_layer()
        outputs = self.programs[key].run(args, self.backend.replace, self.backend.pending.note)
        self.backend.adopt(outputs)
        return outputs

    def _run_again(self, args: Sequence[Any]) -> tuple[Any, ...] | None:
        """The outputs, if the call is a step like the last one; else None."""
        if self.latest is None or self.latest.given_up != len(self.backend.given_up):
            return None
        return self.programs[self.latest].run_again(args)

    def _record_layer(self) -> None:
        """Record the layer of this call: after graph breaks, layers of one kind share a graph."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and not (path := self.backend.innermost_module(frame.f_locals)):
            frame = frame.f_back
        if frame is None or path in self.layers:
            return
        self.layers.add(path)
        named = [replace(site.attention, path=site.attention.path.replace(self.frame, path, 1)) for site in self.sites]
        sites = [replace(site, attention=attention) for site, attention in zip(self.sites, named, strict=True)]
        self.backend.record(self.normalized, sites)

    def _warn_of_unusable(self, packed: frozenset[int], args: Sequence[Any]) -> None:
        past = {index for site in self.sites if site.past is not None for index in site.past}
        unusable = [args[i] for i in past - packed if isinstance(args[i], Handle) and not args[i].is_dense]
        if unusable:
            self.backend.warn_once(
                f"{len(unusable)} compressed caches were made with other settings or do not fit this call, for example "
                f"{unusable[0]}; they are read densely and compressed anew"
            )

    def _program(self, key: Key) -> Program:
        config = self.backend.config
        sites = [site for site in self.sites if self._is_wanted(site, key.packed)]
        roots = self.prompt_only.roots if self.prompt_only is not None and key.prompt_only else frozenset()
        about = roots, key.windows_apart, self.pending
        rewritten = rewrite(self.normalized, sites, key.packed, config.format_for, *about)
        return Program(self.normalized, rewritten, config, self.own, self.starts)

    def _is_wanted(self, site: CacheSite, packed: frozenset[int]) -> bool:
        """Whether to rewrite a layer: it was not given up, or its past is already packed."""
        is_packed = site.past is not None and packed.issuperset(site.past)
        return is_packed or site.attention.path not in self.backend.given_up
