"""Two calls of a model: the first fills and prunes a cache, the second reads the pruned cache.

Every evaluation here is made of these calls. The first gets contexts padded on the left. The second gets their
continuations padded on the right, several of one context if need be. Both get an attention mask and position ids: the
kinds of calls, and so the compilations, stay few.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from think_compile import hf
from think_compile.evals.methods import Dense

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Tokens to be scored: ``first`` fills a cache, ``later`` reads the cache.

    ``targets`` are the expected next tokens after each of the last tokens of ``first + later``.
    """

    first: Ids
    later: Ids
    targets: Ids


@dataclass
class Filled:
    """The result of a first call: [B, P] each, and the cache of these tokens."""

    cache: Any
    mask: Tensor
    logits: Tensor  # [B, P or 1, V]
    ids: Tensor


@dataclass(frozen=True)
class Scored:
    """A piece's logits [len(targets), V], and the number of logits computed with narrow keys."""

    logits: Tensor
    narrow: int


@dataclass
class TwoCalls:
    """The two calls of one model under one method.

    Attributes:
        model: a Hugging Face causal LM.
        method: the method in force on the model.
        pad: token id for padding.
        around: the context of every call beside ``no_grad``; autocast for example.
    """

    model: Any
    method: Dense
    pad: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    cache_name: str = field(init=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        names = [name for name in hf.CACHE_NAMES if name in parameters]
        if not names:
            raise ValueError(
                f"{type(self.model).__name__} takes no cache: its forward has none of {', '.join(hf.CACHE_NAMES)}."
            )
        self.cache_name = names[0]
        self.can_keep_last = "logits_to_keep" in parameters

    def fill(self, contexts: Sequence[Ids], *, all_logits: bool = False) -> Filled:
        """The first call, on contexts of one token or more; logits of the last token, or of all."""
        ids, mask = _padded(contexts, self.pad, "left", self.model.device)
        cache = self.method.new_cache()
        last = {} if all_logits or not self.can_keep_last else {"logits_to_keep": 1}
        output = self._call(ids, mask, cache, **last)
        self.method.note(output[self.cache_name])
        return Filled(output[self.cache_name], mask, output.logits, ids)

    def read(self, filled: Filled, continuations: Sequence[Ids]) -> Tensor:
        """The second call, one continuation for each sequence of the cache; logits [B, N, V], padded on the right."""
        ids, mask = _padded(continuations, self.pad, "right", self.model.device)
        return self._call(ids, torch.cat([filled.mask, mask], 1), filled.cache).logits

    def _call(self, ids: Tensor, mask: Tensor, cache: Any, **options: Any) -> Any:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
        options |= {self.cache_name: cache, "use_cache": True}
        for tensor in (ids, mask, positions):
            _vary(tensor)
        with torch.no_grad(), self.around():
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)

    def score(self, pieces: Sequence[Piece], rows: int) -> list[Scored]:
        """The pieces' logits, in order. Equal ``first`` share a cache; ``rows`` is the largest batch of a second call.

        Either all pieces have ``later`` tokens, or none has.
        """
        return self.score_after(self.fill_for(pieces), pieces, rows)

    def fill_for(self, pieces: Sequence[Piece]) -> Filled:
        """The first call of :meth:`score`."""
        beyond = any(len(piece.targets) > len(piece.later) for piece in pieces)
        return self.fill(_contexts(pieces), all_logits=beyond)

    def score_after(self, filled: Filled, pieces: Sequence[Piece], rows: int) -> list[Scored]:
        """The rest of :meth:`score`, after :meth:`fill_for`."""
        contexts = _contexts(pieces)
        reads = list(dict.fromkeys((contexts.index(p.first), p.later) for p in pieces if p.later))
        logits = dict(zip(reads, self._read_all(filled, reads, rows), strict=True))
        pruned = self.method.prunes(filled.cache)
        scored = []
        for piece in pieces:
            row = contexts.index(piece.first)
            own = logits[row, piece.later][: len(piece.later)] if piece.later else filled.logits[row, :0]
            head = filled.logits[row, -len(piece.first) :]
            joined = own if len(own) >= len(piece.targets) else torch.cat([head, own])
            narrow = pruned and self.method.narrow_tokens(len(piece.first), len(piece.first)) > 0
            through_cache = min(len(piece.targets), len(piece.later))  # targets predicted by the second call
            scored.append(Scored(joined[-len(piece.targets) :], through_cache if narrow else 0))
        return scored

    def _read_all(self, filled: Filled, reads: Sequence[tuple[int, Ids]], rows: int) -> Iterable[Tensor]:
        """Logits [N, V] of each (sequence, continuation), in calls of at most ``rows``."""
        whole = [row for row, _ in reads] == list(range(len(filled.mask))) and len(reads) <= rows
        for start in range(0, len(reads), rows):
            part = reads[start : start + rows]
            source = filled if whole else _branch(filled, [row for row, _ in part])
            yield from self.read(source, [later for _, later in part])


def _vary(tensor: Tensor) -> None:
    """Announce other sizes in other calls to a compiler: one trace less for each kind of call."""
    for axis, size in enumerate(tensor.shape):
        if size > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)


def _contexts(pieces: Sequence[Piece]) -> list[Ids]:
    return list(dict.fromkeys(piece.first for piece in pieces))


def _branch(filled: Filled, rows: list[int]) -> Filled:
    """Some of the sequences of a first call, on a cache of their own.

    Raises:
        ValueError: a layer's cache cannot be divided by sequences.
    """
    stuck = sorted({type(la).__name__ for la in filled.cache.layers if not hasattr(la, "batch_select_indices")})
    if stuck:
        raise ValueError(
            f"requests that share a context cannot share a cache with {', '.join(stuck)}: use batch_size=1 "
            "and tasks of one continuation for each context."
        )
    index = torch.tensor(rows, device=filled.mask.device)
    cache = copy.copy(filled.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.batch_select_indices(index)
    return Filled(cache, filled.mask[index], filled.logits, filled.ids[index])


def _padded(rows: Sequence[Ids], pad: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, longest], padded on ``side``."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, padding_side=side)
    return pad_sequence(ids, True, pad, side).to(device), mask.to(device)


def batches(pieces: Sequence[Piece], size: int) -> Iterable[list[int]]:
    """Indices of pieces for each common pair of calls, the longest first.

    A batch holds whole groups of equal ``first``, at most ``size`` pieces unless one group is larger.
    """
    groups: dict[tuple[Ids, bool], list[int]] = {}
    for index, piece in enumerate(pieces):
        groups.setdefault((piece.first, bool(piece.later)), []).append(index)

    def length(group: list[int]) -> tuple[bool, int]:
        longest = max(len(pieces[index].later) for index in group)
        return longest > 0, len(pieces[group[0]].first) + longest

    batch: list[int] = []
    for group in sorted(groups.values(), key=length, reverse=True):
        mixed = batch and bool(pieces[batch[0]].later) != bool(pieces[group[0]].later)
        if batch and (mixed or len(batch) + len(group) > size):
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch
