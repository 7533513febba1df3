"""The user's functions: wrap a model, report, explain, undo."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from think_compile import adapter
from think_compile.backend import Backend
from think_compile.config import ThinkConfig
from think_compile.report import Report
from think_compile.runtime.frames import compiled_call

M = TypeVar("M", bound=nn.Module)

_backends: weakref.WeakKeyDictionary[nn.Module, Backend] = weakref.WeakKeyDictionary()


def think_compile(
    model: M,
    ratio: float | None = None,
    *,
    keys: Any = None,
    values: Any = None,
    group: int = ThinkConfig.group,
    sinks: int | None = None,
    recent: int = ThinkConfig.recent,
    observe: int = ThinkConfig.observe,
    channel_multiple: int = ThinkConfig.channel_multiple,
    prune_generated: bool = ThinkConfig.prune_generated,
    tokens: Any = None,
    decode: bool = ThinkConfig.decode,
    sliding: bool = ThinkConfig.sliding,
    strict: bool = ThinkConfig.strict,
    lowering: str = ThinkConfig.lowering,
    cuda_graphs: bool = ThinkConfig.cuda_graphs,
    static_cache: bool = ThinkConfig.static_cache,
    **inductor_options: Any,
) -> M:
    """Compile ``model`` in place so that its key cache is pruned (ThinK, arXiv 2407.21018); returns the same object.

    Args:
        model: any ``nn.Module`` decoder that keeps a key/value cache, or a module around one (of peft, for example).
        ratio: share of the key channels to drop, in [0, 1); 0 keeps all. None: 0.5, or 0 if ``keys`` or ``tokens`` is
            given.
        keys, values: how keys and values are stored: a bit plan (``{8: 0.25, 4: 0.75}``, ``4``, ``"8:0.25+4:0.75"``,
            ``"balanced"``) or a codec (docs/formats.md). None: keys pruned by ``ratio``, values whole.
        group: number of tokens that are encoded together in plans with codes (fewer than 16 bits).
        sinks: number of first tokens of each sequence that stay whole; None: 4 in plans with codes, else 0.
        recent: number of latest tokens whose rows stay whole.
        observe: number of latest queries that score the channels.
        channel_multiple: kept channels are rounded up to a multiple of this.
        prune_generated: also prune generated tokens when they leave the window.
        tokens: which tokens of a first call are stored: a rule, such as ``SnapKV(1024)`` or ``KVCrush(0.25)``, its text
            (``"snapkv:1024"``), or a rule of your own. None: all.
        decode: also store caches that attention does not read as they are stored, such as latents, in codes. Each
            step decodes them, which takes time. Needs ``keys`` and ``values`` with one number of bits for all channels.
        sliding: also prune layers with a bounded window of tokens, if it is larger than ``recent``.
        strict: raise if a layer with a cache cannot be rewritten, and on internal failure.
        lowering: "inductor" or "eager".
        cuda_graphs: on a GPU, replay steps on caches of fixed size from a captured CUDA graph.
        static_cache: on a GPU, ``generate`` uses a cache of fixed size by default.
        **inductor_options: options of ``torch._inductor.config`` for the lowering.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an argument has the wrong type.
        ValueError: an argument is out of range, or the model is already wrapped or compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    config = ThinkConfig(
        ratio=ratio,  # type: ignore[arg-type]
        keys=keys,
        values=values,
        group=group,
        sinks=sinks,  # type: ignore[arg-type]
        recent=recent,
        observe=observe,
        channel_multiple=channel_multiple,
        prune_generated=prune_generated,
        tokens=tokens,
        decode=decode,
        sliding=sliding,
        strict=strict,
        lowering=lowering,
        cuda_graphs=cuda_graphs,
        static_cache=static_cache,
        inductor_options=inductor_options,
    )
    parts = adapter.called_by_generate(model)
    for part in parts:
        which = "this model" if part is model else f"the {type(part).__name__} inside this model"
        if part in _backends:
            raise ValueError(
                f"{which} is wrapped by think_compile already; think_compile.restore(model) undoes it, "
                "then wrap it again with the new arguments."
            )
        if part._compiled_call_impl is not None:
            raise ValueError(f"{which} is compiled already (model.compile()); wrap it before, or a fresh copy of it.")
    backend = Backend(model, config)
    for part in parts:
        _backends[part] = _install(part, backend)
    return model


def _install(model: nn.Module, backend: Backend) -> Backend:
    """Compile the model's call in place."""
    compiled, reference = compiled_call(model, backend), weakref.ref(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(reference(), args, kwargs)

    model._compiled_call_impl = call
    config = backend.config
    # pruned windows need growing caches: a window in a buffer moves its rows with each token
    static = config.static_cache and not config.sliding
    adapter.on_wrap(model, static_cache=static, latents=config.decode)
    return backend


def _backend_of(model: nn.Module) -> Backend:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if model not in _backends:
        raise ValueError("this model is not wrapped by think_compile; call think_compile(model, ...) first.")
    return _backends[model]


def report(model: nn.Module) -> Report:
    """The layers rewritten and refused so far, and the bytes of the live caches.

    Raises:
        ValueError: the model is not wrapped.
    """
    return _backend_of(model).report()


def restore(model: M) -> M:
    """Undo :func:`think_compile`; returns the same object.

    Existing caches keep working and stay packed.

    Raises:
        ValueError: the model is not wrapped.
    """
    backend = _backend_of(model)
    for part in [part for part, its in _backends.items() if its is backend]:
        del _backends[part]
        part._compiled_call_impl = None
        adapter.on_restore(part)
    return model


Inputs = Mapping[str, Any] | tuple[Any, ...]


def explain(
    model: nn.Module, example_inputs: Inputs, next_inputs: Callable[[Any], Inputs | None] | None = None, **options: Any
) -> Report:
    """Report what :func:`think_compile` would do to ``model``, from one call with ``example_inputs``.

    The call is traced and run once as the model wrote it; nothing is generated, and the model is not wrapped.
    A growing cache has no past in its first call. Only a second call shows where it lives and what later calls do to
    it.

    Args:
        model: an ``nn.Module``, wrapped or not.
        example_inputs: keyword arguments (a mapping) or positional ones (a tuple) of one call that fills a cache.
        next_inputs: from that call's output, the arguments of a second call, or None for no second call.
        **options: as for :func:`think_compile`.
    """
    wrapped = _backends.get(model)
    config = ThinkConfig(**options) if options or wrapped is None else wrapped.config
    backend = Backend(model, dataclasses.replace(config, strict=False), dry=True)  # it reports instead of raising
    call = compiled_call(model, backend)
    with torch.no_grad():
        output = call(model, *_arguments(example_inputs))
        following = None if next_inputs is None else next_inputs(output)
        if following is not None:
            call(model, *_arguments(following))
    return backend.report()


def _arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
