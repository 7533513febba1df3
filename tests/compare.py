"""Drives a compiled model and its oracle through the same calls and compares logits and caches at each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import VOCAB, Session, build, causal_mask, session, slots_of
from oracle import Yardstick, assert_close_to, kept_count
from torch import Tensor, nn

from think_compile import think_compile
from think_compile.cache.handle import Handle

HEAD_DIM = 32  # the vocabulary of every model here

__all__ = ["HEAD_DIM", "Rules", "Trio", "causal_mask", "padding", "tokens"]


@dataclass(frozen=True)
class Rules:
    """The pruning arguments; windows small enough to move in a short test."""

    ratio: float = 0.5
    recent: int = 4
    observe: int = 8
    channel_multiple: int = 1
    prune_generated: bool = True
    sliding: bool = False

    @property
    def kept(self) -> int:
        return kept_count(HEAD_DIM, self.ratio, self.channel_multiple)


def tokens(batch: int, length: int) -> Tensor:
    """Random ids, without special ones."""
    return torch.randint(3, VOCAB, (batch, length))


def padding(side: str, batch: int, length: int) -> Tensor | None:
    """1 where a token is real; each sequence of the batch, except the first, has its own amount of padding."""
    if side == "none":
        return None
    real = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        pad = min(7 * row - 2, length - 1)
        real[row, slice(0, pad) if side == "left" else slice(length - pad, length)] = 0
    return real


class Trio:
    """Three sessions: compiled model `got`, oracle in its precision `same`, oracle in float64 `exact`."""

    def __init__(
        self,
        name: str = "llama",
        rules: Rules = Rules(),
        *,
        model: nn.Module | None = None,
        rows: int = 2,
        lowering: str = "eager",
        cache: Callable | None = None,
    ) -> None:
        self.name, self.rules = name, rules
        self.plain = build(name, rows=rows) if model is None else model
        self.pair = Yardstick(self.plain, **vars(rules), slots=slots_of(name))
        self.model = think_compile(copy.deepcopy(self.plain), lowering=lowering, **vars(rules))
        self.begin(cache)

    def begin(self, cache: Callable | None = None) -> Trio:
        """A new conversation; `cache()` makes the cache that each of the three starts with."""
        models = (self.model, self.pair.same, self.pair.exact)
        self.got, self.same, self.exact = self.sessions = [session(self.name, m) for m in models]
        if cache is not None:
            for talk in self.sessions:
                talk.cache = cache()
        return self

    def branch(self) -> Trio:
        """A new conversation that continues from here, on deep copies of the caches."""
        other = copy.copy(self)
        other.sessions = [self._fork(talk) for talk in self.sessions]
        other.got, other.same, other.exact = other.sessions
        return other

    @staticmethod
    def _fork(talk: Session) -> Session:
        twin = copy.copy(talk)
        twin.cache = copy.deepcopy(talk.cache)
        return twin

    def step(self, ids: Tensor, real: Tensor | None = None, what: str = "") -> Tensor:
        """One call of all three; the logits of real tokens must agree."""
        what = what or f"{ids.shape[1]} new after {self.got.length}"
        outputs = [talk.step(ids, real) for talk in self.sessions]
        chosen = real.bool() if real is not None else torch.ones_like(ids, dtype=torch.bool)
        got, same, exact = (logits[chosen] for logits in outputs)
        assert_close_to(same, got, exact, what=f"logits, {what}")
        return outputs[0]

    def run(self, ids: Tensor, calls: list[int], real: Tensor | None = None) -> None:
        """Runs the ids in calls of the given sizes, and compares caches after each."""
        for part, marks in self._parts(ids, calls, real):
            self.step(part, marks)
            self.check_caches()

    @staticmethod
    def _parts(ids: Tensor, calls: list[int], real: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        ids_parts = ids.split(calls, dim=1)
        if real is None:
            return [(part, None) for part in ids_parts]
        real = torch.cat([real, real.new_ones(ids.shape[0], ids.shape[1] - real.shape[1])], dim=1)
        return list(zip(ids_parts, real.split(calls, dim=1), strict=True))

    def edit(self, change: Callable[[object], None]) -> None:
        """Does the same to each of the three transformers caches."""
        for talk in self.sessions:
            change(talk.cache)

    def crop(self, tokens_to_remove: int) -> None:
        self.edit(lambda cache: cache.crop(-tokens_to_remove))
        for talk in self.sessions:
            talk.length -= tokens_to_remove
            talk.real = None if talk.real is None else talk.real[:, : talk.length]

    def select(self, index: Tensor) -> None:
        """Takes sequences of the batch."""
        self.got.cache.batch_select_indices(index)
        self.pair.same.select(self.same.cache, index)
        self.pair.exact.select(self.exact.cache, index)
        for talk in self.sessions:
            talk.rows = len(index)
            talk.real = None if talk.real is None else talk.real[index]

    def check_caches(self) -> None:
        """Stored keys of real tokens equal the oracle's, and are zero in the same places."""
        layers = zip(*(talk.stored() for talk in self.sessions), strict=True)
        for i, keys in enumerate(layers):
            got, same, exact = (self._real_tokens(k) for k in keys)
            what = f"keys of layer {i} after {self.got.length}"
            assert_close_to(same, got, exact, what=what)
            dropped = exact == 0  # exact: in float64 no other number is zero
            assert not got[dropped].any(), f"{what}: what should be pruned is not"
            stray = (got[~dropped] == 0).sum().item()
            allowed = 0 if got.dtype == torch.float32 else got.numel() // 100
            assert stray <= allowed, f"{what}: {stray} numbers pruned that should not be"

    def _real_tokens(self, keys: Tensor) -> Tensor:
        """[real tokens, ...]: sequences and positions flattened, without padding."""
        keys = keys.movedim(self.got.sequence_dim, 1)
        if self.got.real is None:
            return keys.flatten(0, 1)
        return keys[self.got.real[:, -keys.shape[1] :].bool()]

    def check_handles(self, rewritten: int) -> None:
        """This many layers keep their keys packed, with the width given by the rules."""
        handles = [keys for keys in self.got.raw() if isinstance(keys, Handle)]
        assert len(handles) == rewritten
