"""Plain and compiled generation with one architecture: the rewritten layers, and the error of every logit.

The compiled model runs first. Its caches show the kept channels. The plain model's dense keys are then zero-filled by
the rules after each call, with these channels, so that only rounding may differ. (`oracle.py` tests the choice of
channels independently, on some models.)
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from oracle import CACHE, worst
from torch import Tensor, nn
from transformers import LogitsProcessor

from think_compile import Report, report, think_compile
from think_compile.api import _backends
from think_compile.cache.handle import Handle
from think_compile.cache.packed import Packed

BATCH, PROMPT, NEW = 2, 24, 8
Kept = dict[int, Tensor]  # layer -> [B, H, D] bool, of the layers whose keys are packed
RULES = {"recent": 4, "observe": 8, "channel_multiple": 1}


@dataclass
class Run:
    """A generation with forced tokens."""

    logits: Tensor  # [steps, B, V]
    cache: object


@dataclass
class Outcome:
    """The result of one architecture with one kind of cache.

    Attributes:
        expected: layers that keep a key for every token of the text, in the plain model's cache.
        latent: layers that keep a latent instead of a key for every token (multi-head latent attention).
        packed: layers whose keys were stored packed.
        found: the report.
        error: largest difference of a logit to the zero-filled plain model (to the plain model at ratio 0).
        natural: the same between the plain model in its precision and in float64 (nan: it has no float64).
        scale: largest logit.
    """

    expected: int
    latent: int
    packed: int
    found: Report
    error: float
    natural: float
    scale: float

    @property
    def right(self) -> bool:
        """Whether the logits differ by no more than rounding."""
        budget = 64 * torch.finfo(torch.float32).eps * max(1.0, self.scale)
        natural = self.natural if self.natural == self.natural else 16 * budget
        return self.error <= 4 * natural + budget

    @property
    def unexplained(self) -> int:
        """Layers that keep a key or latent for every token and are neither rewritten nor refused by name."""
        return max(0, self.expected + self.latent - self.packed - len(self.found.refused))

    @property
    def fault(self) -> str:
        """What is wrong, or ""."""
        if not self.right:
            return f"logits off by {self.error:.1e}, {self.natural:.1e} is natural"
        return f"{self.unexplained} layers are neither rewritten nor refused" if self.unexplained else ""


class Forced(LogitsProcessor):
    """The next token is the given one, whatever the logits say."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, float("-inf")).scatter_(1, self.ids[:, self.step, None], 0.0)
        self.step += 1
        return forced


def prompt(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, the tokens forced after them); the second sequence is padded on the left."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    ids = torch.randint(3, 120, (BATCH, PROMPT + NEW), generator=generator)
    mask = torch.ones(BATCH, PROMPT, dtype=torch.long)
    mask[1, :5] = 0
    return ids[:, :PROMPT], mask, ids[:, PROMPT:]


def generate(model: nn.Module, static: bool = False) -> Run:
    """Generation of NEW tokens from a padded batch."""
    ids, mask, forced = prompt()
    model_inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        model_inputs["decoder_input_ids"] = ids[:, :6].flip(1)
    out = model.generate(
        **model_inputs,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        use_cache=True,
        pad_token_id=0,
        logits_processor=[Forced(forced)],
        output_logits=True,
        return_dict_in_generate=True,
        **({"cache_implementation": "static"} if static else {}),
    )
    return Run(torch.stack(out.logits), getattr(out, CACHE, None))


def cache_layers(cache: object) -> list[object]:
    """The layers of a transformers cache; if it has two parts, those of self-attention first."""
    parts = [getattr(cache, part, None) for part in ("self_attention_cache", "cross_attention_cache")]
    return [layer for part in (parts if parts != [None, None] else [cache]) for layer in getattr(part, "layers", ())]


def full_layers(cache: object) -> dict[int, Tensor]:
    """The cached tensors with an entry for every token of the text, by layer: [B, H, S, D].

    A compressed memory is shorter than the text. The keys of an encoder's output have their own length; but a model may
    keep a second self-attention in that part of its cache.
    """
    found = {}
    for i, layer in enumerate(cache_layers(cache)):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() == 4 and not getattr(layer, "is_sliding", False):
            found[i] = keys
    own = len(cache_layers(getattr(cache, "self_attention_cache", cache)))
    longest = max((keys.shape[2] for i, keys in found.items() if i < own), default=0)
    return {i: keys for i, keys in found.items() if keys.shape[2] == longest}


def latent_widths(config: object) -> set[int]:
    """Widths of the latents cached instead of keys, from the configuration."""
    if not isinstance(config, dict):
        return set()
    below = [latent_widths(part) for part in config.values()]
    return {config.get("kv_lora_rank") or 0}.union(*below) - {0}


def kept_channels(cache: object) -> Kept:
    """The channels kept in each packed layer of a cache."""
    kept = {}
    for i, layer in enumerate(cache_layers(cache)):
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Handle) and isinstance(keys.store, Packed):
            store = keys.store
            mask = torch.zeros(*store.logical_shape[:2], store.width, dtype=torch.bool)
            kept[i] = mask.scatter_(-1, store.own["channels"].long(), True)
    return kept


@contextmanager
def before_each_call(model: nn.Module, do: Callable[[object], None]) -> Iterator[None]:
    """``do`` gets the cache before each call of a generation."""
    plain = model.prepare_inputs_for_generation

    @functools.wraps(plain)
    def prepare(*args, **kwargs):
        do(kwargs.get(CACHE))
        return plain(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Kept]]:
    """The packed layers before each call of a generation."""
    seen: list[Kept] = []
    with before_each_call(model, lambda cache: seen.append(kept_channels(cache))):
        yield seen


@contextmanager
def zero_filled(model: nn.Module, kept_before: list[Kept]) -> Iterator[None]:
    """The plain model; before each call, keys that have left the window lose their dropped channels."""
    calls = iter(kept_before)

    def zero_fill(cache: object) -> None:
        layers = cache_layers(cache)
        for i, mask in next(calls).items():
            count = min(int(layers[i].get_seq_length()), layers[i].keys.shape[2])  # a window holds the last of them
            old = max(0, count - RULES["recent"])
            layers[i].keys[:, :, :old].masked_fill_(~mask[:, :, None], 0)

    with before_each_call(model, zero_fill):
        yield


def compiled(model: nn.Module, *, sliding: bool = False) -> nn.Module:
    """A copy of the model, compiled at ratio 0.5."""
    torch._dynamo.reset()
    return think_compile(copy.deepcopy(model), 0.5, lowering="eager", sliding=sliding, **RULES)


def nothing_pruned(ours: nn.Module) -> nn.Module:
    """The model as if compiled at ratio 0: its traces do not depend on the ratio, and are rewritten again."""
    backend = _backends[ours]
    backend.config = dataclasses.replace(backend.config, ratio=0.0)
    for graph in backend.graphs:
        graph.programs.clear()
        graph.latest = None
    return ours


@torch.no_grad()
def compare(model: nn.Module, ours: nn.Module, *, static: bool = False) -> Outcome:
    """Generation with the model plain and compiled."""
    with watched(ours) as kept:
        got = generate(ours, static)
    with zero_filled(model, kept):
        same = generate(model, static)
    natural = _natural(model, kept, same, static)
    whole = full_layers(same.cache)
    widths = latent_widths(model.config.to_dict())
    latent = sum(keys.shape[-1] in widths for keys in whole.values())
    return Outcome(
        len(whole) - latent,
        latent,
        len(whole.keys() & kept_channels(got.cache).keys()),
        report(ours),
        worst(got.logits, same.logits),
        natural,
        same.logits.abs().max().item(),
    )


@torch.no_grad()
def runs(model: nn.Module, static: bool) -> bool:
    """Whether the plain model generates with a cache of this kind."""
    try:
        generate(copy.deepcopy(model), static)
    except Exception:
        return False
    return True


@dataclass
class Trial:
    """One architecture with both kinds of cache, at ratio 0.5 and at 0.

    ``static`` is None if the plain model cannot use such a cache; outcomes at ratio 0 are None if nothing is rewritten.
    """

    dynamic: Outcome
    dynamic_exact: Outcome | None
    static: Outcome | None
    static_exact: Outcome | None

    @property
    def fault(self) -> str:
        """What is wrong, or ""."""
        outcomes = {name.replace("_", " "): value for name, value in vars(self).items() if value is not None}
        return "; ".join(f"{name}: {outcome.fault}" for name, outcome in outcomes.items() if outcome.fault)


def try_out(model: nn.Module, *, static: bool = False, sliding: bool = False) -> tuple[Outcome, Outcome | None]:
    """The results of one kind of cache at ratio 0.5, and at 0 if something is rewritten."""
    ours = compiled(model, sliding=sliding)
    outcome = compare(copy.deepcopy(model), ours, static=static)
    exact = compare(copy.deepcopy(model), nothing_pruned(ours), static=static) if outcome.found.rewritten else None
    return outcome, exact


def try_all(model: nn.Module) -> Trial:
    """The results of both kinds of cache."""
    return Trial(*try_out(model), *(try_out(model, static=True) if runs(model, True) else (None, None)))


def _natural(model: nn.Module, kept: list[Kept], same: Run, static: bool) -> float:
    try:
        wide = copy.deepcopy(model).double()
        if hasattr(wide, "set_experts_implementation"):
            wide.set_experts_implementation("batched_mm")  # the default has no float64
        with zero_filled(wide, kept):
            exact = generate(wide, static)
    except Exception:
        return float("nan")
    return worst(same.logits, exact.logits)
