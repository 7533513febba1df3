"""The independent oracle: a plain eager model whose dense cache holds a format's stored rows, decoded.

Nothing here shares code with the package. `Oracle` runs an untouched copy of a model with its ordinary cache.
In the first call on a cache it sees, through `scaled_dot_product_attention`, the queries, keys and mask of
every layer and chooses the channels to keep; after every call it zeroes the dropped channels of each token
that is older than the last `recent` ones. Another format is given by two functions, `keys` and `values`, which turn
rows [B, H, n, D] that leave the window into their decoded form. `Yardstick` runs the oracle twice, in the model's
precision and in float64, so that errors can be compared with that precision's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
import transformers
from torch import Tensor, nn

# Name of the cache in transformers' arguments and outputs; 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"

# ---------------------------------------------------------------- the rules, each a function of plain tensors


def allowed_pairs(mask: Tensor | None, is_causal: bool, batch: int, queries: int, keys: int) -> Tensor:
    """[B, queries, keys], true where some head lets the query attend to the key."""
    if mask is None:
        pairs = torch.ones(queries, keys, dtype=torch.bool)
        return (pairs.tril() if is_causal else pairs).expand(batch, queries, keys)
    if mask.dtype != torch.bool:
        mask = mask > torch.finfo(mask.dtype).min / 2
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return mask.any(1).expand(batch, queries, keys)


def valid_keys(pairs: Tensor) -> Tensor:
    """[B, keys]: a key is valid if some query of the call may attend to it."""
    return pairs.any(1)


def observed_queries(valid: Tensor, queries: int, observe: int) -> Tensor:
    """[B, queries]: the last `observe` queries whose own position, one of the last, is a valid key.

    A query is not valid if no query attends to its own key any more.
    """
    gone = max(0, queries - valid.shape[1])
    own = torch.nn.functional.pad(valid, (gone, 0))[:, -queries:]
    later = own.flip(1).long().cumsum(1).flip(1)  # valid queries from here on, this one included
    return own & (later <= observe)


def mean_of_squares(x: Tensor, chosen: Tensor) -> Tensor:
    """[B, H, S, D], [B, S] -> [B, H, D]: mean of x^2 over the chosen positions, zero if there are none."""
    chosen = chosen[:, None, :, None]
    total = x.float().square().masked_fill(~chosen, 0).sum(2)
    return total / chosen.sum(2).clamp(min=1)


def channel_scores(q: Tensor, k: Tensor, valid: Tensor, observed: Tensor) -> Tensor:
    """[B, KV heads, D]. Query head h reads KV head h // G."""
    batch, kv_heads, _, dim = k.shape
    per_query_head = mean_of_squares(q, observed)
    grouped = per_query_head.view(batch, kv_heads, -1, dim).mean(2)
    return grouped * mean_of_squares(k, valid)


def kept_count(dim: int, ratio: float, multiple: int) -> int:
    """T: channels left by the ratio, rounded up to the multiple, at most all."""
    keep = dim - int(dim * ratio)
    return min(dim, -(-keep // multiple) * multiple)


def kept_mask(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` highest scores; among equal scores the lower channel wins."""
    order = scores.neg().argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


# ------------------------------------------------------------------ where a model keeps its keys


@dataclass
class Slot:
    """One layer's dense key cache: `keys` is a [B, H, S, D] view of it with `count` tokens written."""

    holder: object  # an object that lives as long as the cache and is copied with it: carries the pruning state
    keys: Tensor | None
    count: int
    bounded: bool = False  # a window: holds the latest tokens, `count` of them
    fixed: bool = False  # of fixed size: rows after the tokens hold nothing
    values: Tensor | None = None  # a [B, H, S, Dv] view of the values, if a format changes them too


def hf_slots(model: nn.Module, arguments: dict, output: object) -> list[Slot]:
    """Transformers caches, dynamic or static."""
    cache = arguments.get(CACHE) if output is None else output[CACHE]
    return [_hf_slot(layer) for layer in cache.layers] if cache is not None else []


def _hf_slot(layer: object) -> Slot:
    count = int(layer.get_seq_length())
    keys, values = (layer.keys, layer.values) if count else (None, None)
    bounded, static = getattr(layer, "is_sliding", False), hasattr(layer, "max_cache_len")
    if bounded and count:
        count = min(count, keys.shape[2])
    return Slot(layer, keys, count, bounded, static, values)


def tuple_slots(canonical: Callable[[Tensor], Tensor], *, bounded: bool = False) -> Callable:
    """`forward(ids, past, mask) -> (logits, past)`, past a tuple of (keys, values) per layer.

    `canonical` gives a [B, H, S, D] view of a cache tensor.
    """

    def slots(model: nn.Module, arguments: dict, output: object) -> list[Slot]:
        past = arguments.get("past") if output is None else output[1]
        return [_tensor_slot(keys, canonical(keys), bounded) for keys, _ in past or ()]

    return slots


def _tensor_slot(holder: Tensor, keys: Tensor, bounded: bool) -> Slot:
    return Slot(holder, keys, keys.shape[2], bounded)


def buffer_slots(canonical: Callable[[Tensor], Tensor]) -> Callable:
    """Buffers named `cache_k` in the attention modules, written at `pos` (a tensor, or the first as int)."""

    def slots(model: nn.Module, arguments: dict, output: object) -> list[Slot]:
        pos, length = arguments["pos"], arguments["ids"].shape[1]
        start = int(pos if isinstance(pos, int) else pos[0])
        count = start if output is None else start + length
        owners = [m for m in model.modules() if hasattr(m, "cache_k")]
        rows = arguments["ids"].shape[0]
        return [Slot(m, canonical(m.cache_k)[:rows], count) for m in owners]

    return slots


# ------------------------------------------------------------------ the oracle


@dataclass
class State:
    """State attached to a layer's cache: the kept channels, and how many tokens may ever be pruned."""

    kept: Tensor  # [B, KV heads, D]
    limit: int | None
    done: int = 0  # tokens that have left the window, if a format is given


@dataclass
class Seen:
    """The arguments of one attention call."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    is_causal: bool

    def by_position(self, queries: int) -> Seen:
        """Undoes the packing of query groups into the query axis (transformers' one-token calls)."""
        if self.q.shape[2] == queries:
            return self
        q, mask = self.q, self.mask
        q = q.reshape(q.shape[0], -1, queries, q.shape[3])
        if mask is not None and mask.shape[-2] != queries:
            mask = mask.reshape(mask.shape[0], -1, queries, mask.shape[-1])
        return Seen(q, self.k, mask, self.is_causal and queries > 1)


@dataclass
class Oracle:
    """Runs a copy of `model` densely; the caches it leaves behind are zero-filled.

    `slots` finds the keys (default: a transformers cache). `replay` is the list of another oracle's decisions, used
    in order instead of new ones.
    """

    model: nn.Module
    ratio: float
    recent: int
    observe: int
    channel_multiple: int
    prune_generated: bool = True
    sliding: bool = False
    slots: Callable = hf_slots
    keys: Callable[[Tensor], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None
    replay: list[Tensor] | None = None
    decisions: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.model)
        plain = self.model.forward

        @functools.wraps(plain)
        def forward(*args, **kwargs):
            return self._call(plain, *args, **kwargs)

        self.model.forward = forward  # an instance attribute: generate() and __call__ both use it

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def kept(self, holder: object) -> Tensor:
        return holder.oracle_state.kept

    def select(self, cache: object, index: Tensor) -> None:
        """Selects sequences of a transformers cache, with their pruning state."""
        cache.batch_select_indices(index)
        for layer in cache.layers:
            if hasattr(layer, "oracle_state"):
                layer.oracle_state.kept = layer.oracle_state.kept[index]

    def _call(self, plain: Callable, *args, **kwargs):
        arguments = inspect.signature(plain).bind(*args, **kwargs).arguments
        before = self.slots(self.model, arguments, None)
        states = [_state_of(slot) for slot in before]
        seen: list[Seen] = []
        with _watch_attention(seen):
            output = plain(*args, **kwargs)
        after = self.slots(self.model, arguments, output)
        if len(after) != len(seen):
            raise AssertionError(f"{len(seen)} attention calls for {len(after)} cached layers")
        new = _new_tokens(arguments, before, after)
        for i, (slot, call) in enumerate(zip(after, seen, strict=True)):
            past = before[i].count if before else 0
            state = states[i] if before else None
            if not slot.bounded or self.sliding:
                self._settle(slot, state, call.by_position(new), past + new - slot.count)
        return output

    def _settle(self, slot: Slot, state: State | None, call: Seen, gone: int) -> None:
        """`gone` tokens have left the cache with this call."""
        if state is not None and state.limit is not None:
            state.limit = max(0, state.limit - gone)
        if state is None:
            limit = None if self.prune_generated else max(0, slot.count - self.recent)
            state = State(self._decide(slot, call), limit)
        slot.holder.oracle_state = state
        old = max(0, slot.count - self.recent)
        if state.limit is not None:
            old = min(old, state.limit)
        new = slice(max(0, state.done - gone), old)
        for rows, stored in ((slot.keys, self.keys), (slot.values, self.values)):
            if stored is not None and new.start < old:
                rows[:, :, new] = stored(rows[:, :, new])
        state.done = max(new.start, old)
        if self.keys is None:
            slot.keys[:, :, :old].masked_fill_(~state.kept[:, :, None], 0)

    def _decide(self, slot: Slot, call: Seen) -> Tensor:
        if self.replay is not None:
            kept = self.replay[len(self.decisions)]
        else:
            kept = choose(call, slot, self.observe, self.ratio, self.channel_multiple)
        self.decisions.append(kept)
        return kept


def choose(call: Seen, slot: Slot, observe: int, ratio: float, multiple: int) -> Tensor:
    """The kept channels of one layer, from its attention call and the cache after the call."""
    batch, kv_heads, _, dim = slot.keys.shape
    # the keys attended to, even if the cache does not keep them all
    beyond = slot.bounded and (not slot.fixed or call.k.shape[2] > slot.keys.shape[2])
    count = call.k.shape[2] if beyond else slot.count
    k = call.k[:, :, :count]
    k = k[:, :: k.shape[1] // kv_heads]
    pairs = allowed_pairs(call.mask, call.is_causal, batch, call.q.shape[2], call.k.shape[2])
    valid = valid_keys(pairs)[:, :count]
    queries = call.q.shape[2]
    scores = channel_scores(call.q, k, valid, observed_queries(valid, queries, observe))
    return kept_mask(scores, kept_count(dim, ratio, multiple))


def _new_tokens(arguments: dict, before: list[Slot], after: list[Slot]) -> int:
    """Number of tokens of a call; if windows forget some, the counts do not show it."""
    for name in ("ids", "input_ids"):
        if arguments.get(name) is not None:
            return arguments[name].shape[1]
    return after[0].count - (before[0].count if before else 0)


def _state_of(slot: Slot) -> State | None:
    return getattr(slot.holder, "oracle_state", None) if slot.count else None


def tell(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """For attention written out in the tests: passes its operands to the oracle, if one watches.

    q [B, Hq, N, D], k [B, H, S, D], mask true where attended.
    """


@contextmanager
def _watch_attention(seen: list[Seen]) -> Iterator[None]:
    attention = torch.nn.functional.scaled_dot_product_attention

    def watch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        seen.append(Seen(query.clone(), key.clone(), attn_mask, is_causal))
        return attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)

    def told(q, k, mask):
        seen.append(Seen(q.clone(), k.clone(), mask, False))

    ours = mock.patch.object(sys.modules[__name__], "tell", told)
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watch), ours:
        yield


# ------------------------------------------------------------------ comparing


class Yardstick:
    """The oracle in the model's precision (`same`) and in float64 (`exact`), with the same channels."""

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        self.same = Oracle(model, *args, **kwargs)
        wide = copy.deepcopy(model).double()
        if hasattr(wide, "set_experts_implementation"):
            wide.set_experts_implementation("batched_mm")  # the default has no float64
        self.exact = Oracle(wide, *args, replay=self.same.decisions, **kwargs)


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, in float64."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def assert_close_to(same: Tensor, got: Tensor, exact: Tensor, factor: float = 4.0, what: str = "") -> None:
    """`got` may be off the float64 reference by a few times the error of plain eager code in its precision."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == same.dtype, f"{what}: {got.dtype}, expected {same.dtype}"
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    budget = 32 * torch.finfo(same.dtype).eps * scale
    error, natural = worst(got, exact), worst(same, exact)
    assert error <= factor * natural + budget, f"{what}: off by {error:.2e}; {natural:.2e} is natural"
