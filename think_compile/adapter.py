"""The adapter to Hugging Face's ``generate``, used in no other file: what wrapping a model changes and restores.

For static caches, ``generate`` would compile the model's call again. By default ``generate`` makes a growing cache,
whose steps no CUDA graph can replay. On a GPU this adapter gives ``generate`` a cache of fixed size, in one of a few
sizes: a second prompt needs no compilation.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_static: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that get a static cache if the user chose none
_stores_latents: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose latents are compressed, too

PREPARE, MAKE_STATIC = "_prepare_cache_for_generation", "_prepare_static_cache"
COMPILES = "_valid_auto_compile_criteria"
SMALLEST = 256  # tokens


def called_by_generate(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's ``generate`` may call: ``model``, and models inside.

    The stock ``generate`` calls the model itself. The ``generate`` of a wrapper, or of a decoder after an image
    encoder, may call the ``generate`` of a model inside.
    """
    if _owner(type(model), "generate") is _owner(type(model), PREPARE) is not None:
        return [model]
    return [part for part in model.modules() if part is model or _owner(type(part), PREPARE) is not None]


def on_wrap(model: nn.Module, *, static_cache: bool, latents: bool = False) -> None:
    """Change ``generate``; ``static_cache``: also its choice of a cache on a GPU; ``latents``: for those as well.

    The model's own settings do not change: they are saved, copied and pickled with the model.
    """
    _wrapped.add(model)
    if latents:
        _stores_latents.add(model)
    _around(type(model), COMPILES, _whether_to_compile)
    _around(type(model), MAKE_STATIC, _make_static)
    if static_cache:
        _static.add(model)
        _around(type(model), PREPARE, _prepare)


def on_restore(model: nn.Module) -> None:
    """Undo :func:`on_wrap`."""
    _wrapped.discard(model)
    _static.discard(model)
    _stores_latents.discard(model)


def _around(cls: type, name: str, ours: Callable[..., Any]) -> None:
    """Wrap a method with ``ours``, once, in its defining class.

    The model itself is not changed: its attributes are copied and pickled with the model.
    """
    owner = _owner(cls, name)
    if owner is None or hasattr(vars(owner)[name], "think_compile"):
        return
    plain = vars(owner)[name]

    @functools.wraps(plain)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return ours(plain, self, *args, **kwargs)

    method.think_compile = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _owner(cls: type, name: str) -> type | None:
    """The defining class of a method of ``cls``; None: there is none."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def rounded(tokens: int) -> int:
    """``tokens`` rounded up to a cache size, in steps of 256, above 2,048 of at most an eighth of ``tokens``.

    This keeps the sizes, and so the compilations, few.
    """
    step = max(SMALLEST, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _whether_to_compile(plain: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model not in _wrapped and plain(model, *args, **kwargs)


def _make_static(plain: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if model in _wrapped and "max_cache_len" in kwargs and _on_gpu(model) and _holds_what_is_stored(model):
        kwargs["max_cache_len"] = rounded(kwargs["max_cache_len"])
    return plain(model, *args, **kwargs)


def _prepare(
    plain: Callable[..., Any], model: nn.Module, settings: Any, model_kwargs: Any, mode: Any, *args: Any, **kwargs: Any
) -> Any:
    if model in _static and _is_open(model, settings, model_kwargs, mode):
        settings.cache_implementation = "static"  # only this call's settings
    return plain(model, settings, model_kwargs, mode, *args, **kwargs)


def _is_open(model: Any, settings: Any, model_kwargs: Any, mode: Any) -> bool:
    """Whether the user did not choose a cache, and a static one gives the same result as a growing one."""
    given = any(model_kwargs.get(name) is not None for name in ("cache", "past_key_values"))
    chosen = settings.cache_implementation is not None or settings.use_cache is False or given
    mode = getattr(mode, "value", mode)
    one_token_a_step = mode in ("greedy_search", "sample") and settings.num_return_sequences == 1
    fits = getattr(model, "_can_compile_fullgraph", False) and not model.config.is_encoder_decoder
    return (
        _on_gpu(model)
        and _holds_what_is_stored(model)
        and fits
        and one_token_a_step
        and not chosen
        and _is_whole(model)
    )


def _on_gpu(model: Any) -> bool:
    return model.device.type == "cuda"


def _is_whole(model: Any) -> bool:
    """Whether this process runs all layers of the model.

    Under pipeline parallelism other processes run some of them, and identities take their places. A static cache gets
    its length from its first layer. A later stage never fills this layer, so its tokens would be wrong.
    """
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers)
    misses_layers = any(isinstance(layer, nn.Identity) for one in lists for layer in one)
    return getattr(model, "_pp_stage", None) is None and not misses_layers


def _holds_what_is_stored(model: Any) -> bool:
    """Whether the cache holds what is compressed: no latents, unless those are, and no index besides the keys.

    For others a static cache gains nothing. Also, in transformers 5.24, the results of an index depend on the size of a
    static cache.
    """
    config = model.config.get_text_config(decoder=True)
    others = ("index_topk",) if model in _stores_latents else ("kv_lora_rank", "index_topk")
    return not any(getattr(config, name, None) for name in others)
