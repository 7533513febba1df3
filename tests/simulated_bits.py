"""An independent simulation of bit plans: a plain eager model whose dense cache is edited after each call.

Nothing here shares code with the package. Channels get bits by the first call's scores; rows that leave the window
are replaced by their decoded form, a group at a time.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from oracle import CACHE, allowed_pairs, channel_scores, kept_count, observed_queries, valid_keys
from torch import Tensor, nn

WHOLE = 16  # bits that stand for the model's own dtype
BLOCK = 64  # value channels with one scale
SIDES = ("keys", "values")
Plan = Mapping[int, float]


@dataclass(frozen=True)
class BitRules:
    """The arguments of `think_compile`; windows small enough to move in a short test."""

    keys: Plan | int | None = None
    values: Plan | int | None = None
    ratio: float | None = None
    group: int = 8
    sinks: int | None = None
    recent: int = 8
    observe: int = 8
    channel_multiple: int = 1

    def plan(self, side: str) -> Plan:
        """Shares of the channels by number of bits."""
        given = getattr(self, side)
        if given is None:
            return {WHOLE: 1 - (0.5 if self.ratio is None else self.ratio) if side == "keys" else 1.0}
        return {given: 1.0} if isinstance(given, int) else given

    @property
    def whole_first(self) -> int:
        """Number of sinks: 4 by default if a plan has codes."""
        return self.sinks if self.sinks is not None else 4 * self.has_codes

    def sizes(self, side: str, dim: int) -> list[tuple[int, int]]:
        return tier_sizes(self.plan(side), dim, self.channel_multiple)

    @property
    def together(self) -> int:
        """Tokens that leave the window at once, of both sides: 1 if no plan has codes."""
        return self.group if self.has_codes else 1

    @property
    def has_codes(self) -> bool:
        return any(bits < WHOLE for side in SIDES for bits in self.plan(side))


def tier_sizes(plan: Plan, dim: int, multiple: int) -> list[tuple[int, int]]:
    """(bits, channels) of each tier, most bits first."""
    left = kept_count(dim, 1 - sum(plan.values()), multiple)
    tiers = sorted(plan.items(), reverse=True)
    sizes = []
    for place, (bits, share) in enumerate(tiers):
        wanted = -(-round(dim * share, 6) // multiple) * multiple
        size = left if place == len(tiers) - 1 else min(left, int(wanted))
        sizes.append((bits, size))
        left -= size
    return sizes


def deal(sizes: list[tuple[int, int]], scores: Tensor) -> Tensor:
    """Bits of each channel [B, H, D]: the highest scores get the most; 0 for a dropped channel."""
    order = scores.neg().argsort(dim=-1, stable=True)
    in_order = [bits for bits, size in sizes for _ in range(size)]
    in_order += [0] * (scores.shape[-1] - len(in_order))
    return torch.zeros_like(order).scatter_(-1, order, torch.tensor(in_order).expand_as(order))


def value_scores(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, observed: Tensor, scale: float) -> Tensor:
    """[B, KV heads, D]: squared norm of each channel of the attention's output at the observed queries."""
    heads = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(heads, 1).transpose(2, 3) * scale
    weights = logits.masked_fill(~pairs[:, None], float("-inf")).softmax(-1)
    output = weights.masked_fill(~observed[:, None, :, None], 0) @ v.repeat_interleave(heads, 1)
    return output.square().sum(2).unflatten(1, (-1, heads)).sum(2)


def stored_range(low: Tensor, high: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(zero, step) in fp16, each the nearest that covers low to high: the codes depend on that."""
    zero = neighbour(low, -np.inf)
    return zero, neighbour((high - zero) / levels, np.inf)


def neighbour(x: Tensor, towards: float) -> Tensor:
    """The nearest number of fp16 that is not on the other side of `x`."""
    near = x.numpy().astype(np.float16)
    beyond = near.astype(x.numpy().dtype) > x.numpy() if towards < 0 else near.astype(x.numpy().dtype) < x.numpy()
    return torch.from_numpy(np.where(beyond, np.nextafter(near, np.float16(towards)), near)).to(x.dtype)


def unrounded_range(low: Tensor, high: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The same without rounding: in place of `stored_range` it measures the cost of the rounding."""
    return low, (high - low) / levels


def coded(x: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`x` rounded to levels + 1 equidistant numbers that cover low to high, and their distance."""
    zero, step = stored_range(low, high, levels)
    codes = torch.where(step > 0, (x - zero) / step, 0).round().clamp(min=0).minimum(levels)
    return zero + codes * step, step


def extremes(x: Tensor, counts: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the entries that count, 0 if none does."""
    low = x.masked_fill(~counts, float("inf")).amin(axis, keepdim=True)
    high = x.masked_fill(~counts, float("-inf")).amax(axis, keepdim=True)
    return torch.where(low > high, 0, low), torch.where(low > high, 0, high)


def code_keys(rows: Tensor, bits: Tensor, counts: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, n, D] decoded, and each number's code step; one scale for each channel and group of tokens."""
    levels = (2.0 ** bits.clamp(1, 8) - 1)[:, :, None, None]
    grouped = rows.unflatten(2, (-1, group))
    low, high = extremes(grouped, counts[:, None, :, None].expand_as(rows).unflatten(2, (-1, group)), 3)
    decoded, step = coded(grouped, low, high, levels)
    return decoded.flatten(2, 3), step.expand_as(grouped).flatten(2, 3)


def code_values(rows: Tensor, bits: Tensor, counts: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Values the same; one scale for each token and block of at most 64 channels of a tier."""
    decoded, steps = rows.clone(), torch.zeros_like(rows)
    for tier in {int(b) for b in bits.unique()} - {0, WHOLE}:
        block = ((bits == tier).cumsum(-1) - 1) // BLOCK
        for number in range(int(block.max()) + 1):
            mine = ((bits == tier) & (block == number))[:, :, None].expand_as(rows)
            low, high = extremes(rows, mine, 3)
            new, step = coded(rows, low, high, torch.tensor(2.0**tier - 1))
            decoded, steps = torch.where(mine, new, decoded), torch.where(mine, step, steps)
    return decoded, steps


def encode(side: str, rows: Tensor, bits: Tensor, counts: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows as they are read after they left the window, and each number's code step (0 if it is no code)."""
    decoded, steps = (code_keys if side == "keys" else code_values)(rows, bits, counts, group)
    bits = bits[:, :, None]
    decoded = torch.where(bits == WHOLE, rows, decoded).masked_fill(bits == 0, 0)
    counts = counts[:, None, :, None]  # sinks stay whole; nobody reads padding
    return torch.where(counts, decoded, rows), steps.masked_fill((bits == WHOLE) | (bits == 0) | ~counts, 0)


@dataclass
class State:
    """What is known about one layer's cache."""

    bits: dict[str, Tensor]  # [B, H, D] for each side
    coded_from: Tensor  # [B]: the first position after padding and sinks
    start: dict[str, int]  # first position of the window
    steps: dict[str, Tensor]  # [B, H, tokens, D]: sum of the code steps of each number's encodings


@dataclass
class Call:
    """The arguments of one attention call."""

    q: Tensor
    mask: Tensor | None
    is_causal: bool
    keys: int
    scale: float


class Simulation:
    """Runs a copy of `model` densely; its transformers caches hold decoded numbers after each call."""

    def __init__(self, model: nn.Module, rules: BitRules) -> None:
        self.model, self.rules = copy.deepcopy(model), rules
        plain = self.model.forward

        @functools.wraps(plain)
        def forward(*args, **kwargs):
            return self._call(plain, *args, **kwargs)

        self.model.forward = forward  # an instance attribute: generate() uses it too

    def _call(self, plain: Callable, *args, **kwargs):
        cache = inspect.signature(plain).bind(*args, **kwargs).arguments.get(CACHE)
        past = int(cache.get_seq_length()) if cache is not None else 0
        with watched() as calls:
            output = plain(*args, **kwargs)
        for layer, call in zip(output[CACHE].layers, calls, strict=True):
            self._settle(layer, past, call)
        return output

    def _settle(self, layer: object, past: int, call: Call) -> None:
        """Encodes what leaves the window with this call."""
        count = int(layer.get_seq_length())
        if not past:
            layer.simulated = self._first(layer, count, call)
        for side in SIDES:
            self._flush(layer.simulated, side, getattr(layer, side)[:, :, :count], past)

    def _first(self, layer: object, count: int, call: Call) -> State:
        keys, values = layer.keys[:, :, :count], layer.values[:, :, :count]
        queries = call.q.shape[2]
        pairs = allowed_pairs(call.mask, call.is_causal, keys.shape[0], queries, call.keys)[:, :, :count]
        valid = valid_keys(pairs)
        observed = observed_queries(valid, queries, self.rules.observe)
        scores = {
            "keys": channel_scores(call.q, keys, valid, observed),
            "values": value_scores(call.q, keys, values, pairs, observed, call.scale),
        }
        bits = {side: deal(self.rules.sizes(side, x.shape[-1]), x) for side, x in scores.items()}
        coded_from = valid.int().argmax(1) + self.rules.whole_first
        return State(bits, coded_from, dict.fromkeys(SIDES, 0), {"keys": keys[:, :, :0], "values": values[:, :, :0]})

    def _flush(self, state: State, side: str, rows: Tensor, past: int) -> None:
        count, group, bits = rows.shape[2], self.rules.together, state.bits[side]
        old = state.steps[side][:, :, :past]
        state.steps[side] = steps = torch.cat([old, torch.zeros_like(rows[:, :, old.shape[2] :])], 2)
        start = min(state.start[side], past // group * group)  # after a crop
        end = state.start[side] = max(start, (count - self.rules.recent) // group * group)
        if start < end and (bits != WHOLE).any():
            counts = torch.arange(start, end) >= state.coded_from[:, None]
            rows[:, :, start:end], step = encode(side, rows[:, :, start:end].clone(), bits, counts, group)
            steps[:, :, start:end] += step


def select(cache: object, index: Tensor) -> None:
    """Selects sequences of a simulated cache, with what is known about them."""
    cache.batch_select_indices(index)
    for state in (layer.simulated for layer in cache.layers):
        state.coded_from = state.coded_from[index]
        state.bits = {side: bits[index] for side, bits in state.bits.items()}
        state.steps = {side: steps[index] for side, steps in state.steps.items()}


@contextmanager
def watched() -> Iterator[list[Call]]:
    """The attention calls of a block of code, one for each layer."""
    attention, calls = torch.nn.functional.scaled_dot_product_attention, []

    def watch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        known = query.shape[-1] ** -0.5 if scale is None else scale
        calls.append(Call(query.clone(), attn_mask, is_causal, key.shape[2], known))
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", watch):
        yield calls
