"""The one place that knows of Hugging Face's ``generate``: what wrapping a model changes there, and gives back.

``generate`` would compile the model's call again for static caches, and makes a growing cache unless told otherwise,
whose steps no CUDA graph can replay. On a GPU it makes a cache of fixed size here, in one of a few sizes, so that a
second prompt finds everything compiled.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_static: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that get a static cache where the user chose none

PREPARE, MAKE_STATIC = "_prepare_cache_for_generation", "_prepare_static_cache"
COMPILES = "_valid_auto_compile_criteria"
SMALLEST = 256  # tokens


def called_by_generate(model: nn.Module) -> list[nn.Module]:
    """``model``, and the modules inside it that its ``generate`` calls, as far as its class tells.

    The stock ``generate`` calls the model. Another one, of a wrapper or of a decoder behind an encoder of images, may
    hand on to the ``generate`` of a model inside.
    """
    if _owner(type(model), "generate") is _owner(type(model), PREPARE) is not None:
        return [model]
    return [part for part in model.modules() if part is model or _owner(type(part), PREPARE) is not None]


def on_wrap(model: nn.Module, *, static_cache: bool) -> None:
    """Change what ``generate`` does; ``static_cache``: also which cache it makes on a GPU.

    The model's own settings stay as they are: they are saved, copied and pickled with it.
    """
    _wrapped.add(model)
    _around(type(model), COMPILES, _whether_to_compile)
    _around(type(model), MAKE_STATIC, _make_static)
    if static_cache:
        _static.add(model)
        _around(type(model), PREPARE, _prepare)


def on_restore(model: nn.Module) -> None:
    """Give ``generate`` back what :func:`on_wrap` took."""
    _wrapped.discard(model)
    _static.discard(model)


def _around(cls: type, name: str, ours: Callable[..., Any]) -> None:
    """Have ``ours`` called with a method and its arguments, once, where the method is defined.

    Not on the model, whose attributes are copied and pickled with it.
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
    """The class that defines a method of ``cls``."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def rounded(tokens: int) -> int:
    """The size of cache that ``tokens`` get: a multiple of 256, beyond 2,048 of no more than an eighth of them.

    So sizes, and what they compile, are few.
    """
    step = max(SMALLEST, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


def _whether_to_compile(plain: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model not in _wrapped and plain(model, *args, **kwargs)


def _make_static(plain: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if model in _wrapped and "max_cache_len" in kwargs and _on_gpu(model) and _has_plain_keys(model):
        kwargs["max_cache_len"] = rounded(kwargs["max_cache_len"])
    return plain(model, *args, **kwargs)


def _prepare(
    plain: Callable[..., Any], model: nn.Module, settings: Any, model_kwargs: Any, mode: Any, *args: Any, **kwargs: Any
) -> Any:
    if model in _static and _is_open(model, settings, model_kwargs, mode):
        settings.cache_implementation = "static"  # of this call: it has settings of its own
    return plain(model, settings, model_kwargs, mode, *args, **kwargs)


def _is_open(model: Any, settings: Any, model_kwargs: Any, mode: Any) -> bool:
    """Whether the user left open which cache ``generate`` makes, and a static one does what a growing one would."""
    given = any(model_kwargs.get(name) is not None for name in ("cache", "past_key_values"))
    chosen = settings.cache_implementation is not None or settings.use_cache is False or given
    one_token_a_step = (
        getattr(mode, "value", mode) in ("greedy_search", "sample") and settings.num_return_sequences == 1
    )
    fits = getattr(model, "_can_compile_fullgraph", False) and not model.config.is_encoder_decoder
    return _on_gpu(model) and _has_plain_keys(model) and fits and one_token_a_step and not chosen and _is_whole(model)


def _on_gpu(model: Any) -> bool:
    return model.device.type == "cuda"


def _is_whole(model: Any) -> bool:
    """Whether this process runs all layers of the model.

    Under pipeline parallelism other processes run some, and identities stand in their places. The length of a static
    cache is that of its first layer, which a later stage never fills: its tokens would not be the model's.
    """
    return getattr(model, "_pp_stage", None) is None and not _misses_layers(model)


def _misses_layers(model: Any) -> bool:
    """Whether an identity stands where the model's configuration counts a layer."""
    n_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers)
    return any(isinstance(layer, nn.Identity) for one in lists for layer in one)


def _has_plain_keys(model: Any) -> bool:
    """Whether the cache holds keys, and not latents, or an index beside them.

    Those are not pruned, so that a static cache wins nothing; and what an index finds in a static cache depends, in
    transformers 5.24, on the size of that.
    """
    config = model.config.get_text_config(decoder=True)
    return not any(getattr(config, name, None) for name in ("kv_lora_rank", "index_topk"))
