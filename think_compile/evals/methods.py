"""The methods side by side: the compiled one, the plain model, and rules simulated on the plain model.

A simulated method keeps a dense cache, and sees the queries and keys of each layer through transformers' registry of
attention functions. A call without a past chooses the kept channels by a rule. Later calls attend to keys with zeros in
the dropped channels of pruned tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import think_compile
from think_compile import hf
from think_compile.cache.handle import Handle
from think_compile.cache.packed import Packed
from think_compile.evals.rules import RULES, Observed, Seen, best, last_valid, valid_keys
from think_compile.evals.settings import THINK_OPTIONS, Settings

# ----------------------------------------------------------------------------------------------- methods in force


class Dense:
    """The plain model: method "dense", and the base class of the others."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings

    def new_cache(self) -> DynamicCache:
        """An empty cache for the model."""
        return DynamicCache(config=self.model.config)

    def prunes(self, cache: DynamicCache) -> bool:
        """Whether a layer of a filled cache has dropped channels."""
        return False

    def narrow_tokens(self, first: int, past: int) -> int:
        """Number of narrow keys for a call after ``past`` tokens, ``first`` of them from the first call."""
        config = self.settings.config
        return max(0, (past if config.prune_generated else first) - config.recent)

    def effective_ratio(self) -> float:
        """Actual share of dropped key channels, mean over the layers seen so far."""
        return 0.0

    def note(self, cache: DynamicCache) -> None:
        """Take note of a newly filled cache, for :meth:`told`."""

    def told(self) -> dict[str, Any]:
        """An account of the actual work, for the results."""
        return {"effective_ratio": self.effective_ratio()}

    def close(self) -> None:
        """Restore the model."""


class Compiled(Dense):
    """Method "think": the model is wrapped by think_compile."""

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__(model, settings)
        think_compile.think_compile(model, **{name: getattr(settings.config, name) for name in THINK_OPTIONS})
        self.largest = self.report()

    def prunes(self, cache: DynamicCache) -> bool:
        """As of :class:`Dense`; judged by the stored caches."""
        stores = [layer.keys.store for layer in cache.layers if isinstance(layer.keys, Handle)]
        return any(isinstance(store, Packed) and (store.is_lossy or store.evicted) for store in stores)

    def narrow_tokens(self, first: int, past: int) -> int:
        """As of :class:`Dense`; with a token rule, all that a call reads depends on it."""
        return past if self.settings.config.tokens is not None else super().narrow_tokens(first, past)

    def effective_ratio(self) -> float:
        """As of :class:`Dense`; layers left alone count as 0 if they keep a cache."""
        report = self.report()
        kept = [record.kept / record.head_dim for record in report.rewritten if record.kept and record.head_dim]
        layers = len(report.rewritten) + len(report.problems)
        return (len(kept) - sum(kept)) / layers if layers else 0.0

    def report(self) -> think_compile.Report:
        """The current report on the model."""
        return think_compile.report(self.model)

    def note(self, cache: DynamicCache) -> None:
        """As of :class:`Dense`."""
        self.largest = max(self.largest, self.report(), key=lambda report: report.dense_bytes)

    def told(self) -> dict[str, Any]:
        """As of :class:`Dense`; bytes are those of the largest caches alive at one time."""
        report = self.report()
        sizes = ("stored_key_bytes", "dense_key_bytes", "stored_value_bytes", "dense_value_bytes")
        return {
            "effective_ratio": self.effective_ratio(),
            "layers_rewritten": len(report.rewritten),
            "layers_left_dense": [record.sentence for record in report.problems],
            **{name: getattr(self.largest, name) for name in sizes},
        }

    def close(self) -> None:
        """As of :class:`Dense`."""
        think_compile.restore(self.model)


class SimulatedLayer(DynamicLayer):
    """A layer's dense cache with a mask of the kept channels for each of its sequences."""

    kept: Tensor | None = None  # [B, Hkv or Hq, D], once the first call has chosen them
    first = 0  # tokens of that call

    def batch_select_indices(self, indices: Tensor) -> None:
        """As of ``DynamicLayer``."""
        super().batch_select_indices(indices)
        self.kept = None if self.kept is None else self.kept[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As of ``DynamicLayer``."""
        super().batch_repeat_interleave(repeats)
        self.kept = None if self.kept is None else self.kept.repeat_interleave(repeats, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As of ``DynamicLayer``."""
        super().reorder_cache(beam_idx)
        self.kept = None if self.kept is None else self.kept[beam_idx]

    def reset(self) -> None:
        """As of ``DynamicLayer``."""
        super().reset()
        self.kept, self.first = None, 0


class Simulation(Dense):
    """A rule of ``RULES`` in force on a plain model, until :meth:`close`. Layers with a bounded window stay dense.

    Raises:
        ValueError: the model's attention does not go through transformers' registry, or not through
            ``scaled_dot_product_attention``.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        super().__init__(model, settings)
        if not getattr(model, "_supports_sdpa", False):
            raise ValueError(
                f"method {settings.method!r} is simulated in transformers' scaled_dot_product_attention, which "
                f"{type(model).__name__} does not support; methods think and dense need no such thing."
            )
        self.cache: DynamicCache | None = None  # of the call that runs
        self.before = model.config._attn_implementation
        names = (f"think_compile_simulated_{number}" for number in itertools.count())
        self.name = next(name for name in names if name not in ALL_ATTENTION_FUNCTIONS)
        ALL_ATTENTION_FUNCTIONS[self.name] = self._attend
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.name, sdpa_mask)  # stays, and serves the next of this name
        model.set_attn_implementation(self.name)
        if model.config._attn_implementation != self.name:
            del ALL_ATTENTION_FUNCTIONS[self.name]
            raise ValueError(
                f"method {settings.method!r} is simulated through transformers' registry of attention functions, "
                f"which {type(model).__name__} does not use; methods think and dense need no such thing."
            )
        self.hook = model.register_forward_pre_hook(self._before_call, with_kwargs=True)

    def new_cache(self) -> DynamicCache:
        """As of :class:`Dense`."""
        cache = super().new_cache()
        cache.layers = [SimulatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        return cache

    def prunes(self, cache: DynamicCache) -> bool:
        """As of :class:`Dense`."""
        return any(not kept.all() for kept in _decided(cache))

    def narrow_tokens(self, first: int, past: int) -> int:
        """As of :class:`Dense`; kvpress prunes the whole first call, and nothing later."""
        return first if self.settings.method == "kvpress" else super().narrow_tokens(first, past)

    def effective_ratio(self) -> float:
        """As of :class:`Dense`; of the last read cache."""
        if self.cache is None:
            return 0.0
        dropped = [1 - kept.float().mean().item() for kept in _decided(self.cache)]
        return sum(dropped) / len(self.cache.layers)

    def close(self) -> None:
        """As of :class:`Dense`."""
        self.hook.remove()
        self.model.set_attn_implementation(self.before)
        del ALL_ATTENTION_FUNCTIONS[self.name]

    def _before_call(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Takes note of the call's cache."""
        cache = next((kwargs[name] for name in hf.CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None and any(type(layer) is DynamicLayer for layer in cache.layers):
            raise ValueError(
                f"method {self.settings.method!r} needs a cache that it made: pass {hf.CACHE_NAMES[0]}=new_cache()."
            )
        self.cache = cache

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = self._layer(module)
        past = key.shape[2] - query.shape[2]
        if layer is not None and past == 0:
            seen = Seen(query, key, valid_keys(attention_mask, key), module.layer_idx)
            layer.kept, layer.first = self.choose(seen), key.shape[2]
        elif layer is not None:
            key, value, module = self._pruned(layer, key, value, past, module)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def _layer(self, module: Any) -> SimulatedLayer | None:
        """The cache of an attention module, if pruned; else None."""
        index = getattr(module, "layer_idx", None)
        if self.cache is None or index is None or index >= len(self.cache.layers):
            return None
        layer = self.cache.layers[index]
        return layer if isinstance(layer, SimulatedLayer) else None

    def observed(self, seen: Seen) -> Observed:
        """The rule's view of a layer's first call."""
        scored, length = seen.valid, seen.k.shape[2]
        if self.settings.score_over == "old":
            old = seen.valid & (torch.arange(length, device=seen.k.device) < self.narrow_tokens(length, length))
            scored = torch.where(old.any(1, keepdim=True), old, seen.valid)
        queries = last_valid(seen.valid, self.settings.config.observe)[:, -seen.q.shape[2] :]
        return Observed(seen.q, seen.k, queries, scored, seen.valid, self.settings.seed * 1000 + seen.layer)

    def choose(self, seen: Seen) -> Tensor:
        """Mask of the channels to keep, [B, Hkv or Hq, D]."""
        config, width = self.settings.config, seen.k.shape[3]
        exact = self.settings.method == "kvpress"
        keep = width - int(width * config.ratio) if exact else config.kept_channels(width)
        return best(RULES[self.settings.method](self.observed(seen)), keep)

    def of_recorded(self, cache: DynamicCache, layers: Sequence[Seen]) -> DynamicCache:
        """This method's cache after a first call seen by :class:`Recorder`; ``cache`` stays unchanged.

        Raises:
            ValueError: fewer queries were kept than score.
        """
        observe = self.settings.config.observe
        if any(seen.q.shape[2] < min(observe, seen.k.shape[2]) for seen in layers):
            raise ValueError(f"observe={observe} queries are to score, {layers[0].q.shape[2]} were kept.")
        own = copy.copy(cache)
        own.layers = [copy.copy(layer) for layer in cache.layers]
        for seen in layers:
            layer = own.layers[seen.layer]
            layer.kept, layer.first = self.choose(seen), seen.k.shape[2]
        return own

    def _pruned(
        self, layer: SimulatedLayer, key: Tensor, value: Tensor, past: int, module: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Keys with zeros in the dropped channels of old tokens, values, and the module to attend to them."""
        kept = layer.kept
        assert kept is not None
        if kept.shape[0] != key.shape[0]:
            raise ValueError(f"the channels of {kept.shape[0]} sequences were chosen, {key.shape[0]} are attended to.")
        groups = kept.shape[1] // key.shape[1]
        if groups > 1:  # each query head has keys of its own
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
            module = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
        old = torch.arange(key.shape[2], device=key.device) < self.narrow_tokens(layer.first, past)
        return key.masked_fill(old[:, None] & ~kept[:, :, None], 0), value, module


class Recorder(Simulation):
    """Prunes nothing, and keeps each layer's first call as a basis for the choices of many methods.

    Attributes:
        layers: of the latest first call.
        observe: number of kept queries.
    """

    def __init__(self, model: Any, observe: int) -> None:
        super().__init__(model, Settings(method="simulated"))
        self.layers: list[Seen] = []
        self.observe = observe

    def new_cache(self) -> DynamicCache:
        """As of :class:`Dense`."""
        self.layers = []
        return super().new_cache()

    def choose(self, seen: Seen) -> Tensor:
        """All channels."""
        self.layers.append(dataclasses.replace(seen, q=seen.q[:, :, -self.observe :]))
        return torch.ones_like(seen.k[:, :, 0], dtype=torch.bool)


def _decided(cache: DynamicCache) -> list[Tensor]:
    """The masks of kept channels of all layers with a choice."""
    layers = [layer for layer in cache.layers if isinstance(layer, SimulatedLayer)]
    return [layer.kept for layer in layers if layer.kept is not None]


def apply(model: Any, settings: Settings) -> Dense:
    """Puts a method in force on a Hugging Face causal LM, until ``close()`` of the returned object.

    Raises:
        ValueError: the model is wrapped by think_compile already, or does not support the simulation.
    """
    kinds = {"dense": Dense, "think": Compiled}
    return kinds.get(settings.method, Simulation)(model, settings)
