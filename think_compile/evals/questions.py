"""Contexts in two halves: a text, prefilled and pruned, and a question that reads the pruned cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from think_compile.evals.calls import Ids, TwoCalls


def tails(tokenizer: Any, strings: Sequence[str], text: str) -> list[Ids]:
    """The last tokens of each string, from the last occurrence of ``text`` on.

    The whole string is tokenized: its ids are those of both halves. A token on the border belongs to the second half.
    Fast tokenizers tell the places of tokens. With another tokenizer, the first half is the common beginning of the ids
    of the string and of the text before ``text``.
    """
    return [_tail(tokenizer, string, string.rindex(text)) for string in strings]


def _tail(tokenizer: Any, string: str, position: int) -> Ids:
    if tokenizer.is_fast:
        encoded = tokenizer(string, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return tuple(token for token, (_, end) in pairs if end > position)
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    before = tokenizer(string[:position], add_special_tokens=False)["input_ids"]
    common = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
    return tuple(ids[common:])


@dataclass(frozen=True)
class Halves:
    """A batch of contexts, each in two halves of at least one token."""

    heads: list[Ids]
    tails: list[Ids]

    @classmethod
    def of(cls, context: Tensor, mask: Tensor, tails: list[Ids], text: str) -> Halves:
        """From a batch [B, S], padded on the left, and the second halves.

        Raises:
            ValueError: truncation to the model's length has left nothing of a first half, or the tokenizer puts
                tokens after a text.
        """
        rows = [tuple(ids[real.bool()].tolist()) for ids, real in zip(context, mask, strict=True)]
        for row, tail in zip(rows, tails, strict=True):
            if len(tail) >= len(row):
                raise ValueError(
                    f"prune_before={text!r}: of a context {len(row)} tokens fit the model's length, and {len(tail)} "
                    "stand at or after that text: nothing is left to prefill."
                )
            if row[-len(tail) :] != tail:
                raise ValueError(f"prune_before={text!r}: the tokenizer puts tokens of its own after a text.")
        return cls([row[: -len(tail)] for row, tail in zip(rows, tails, strict=True)], tails)

    def of_equal_tails(self) -> Iterable[list[int]]:
        """Rows for common calls. Second halves of different lengths would need gaps, and tokens after a gap would find
        fewer tokens in the recent window."""
        rows: dict[int, list[int]] = {}
        for row, tail in enumerate(self.tails):
            rows.setdefault(len(tail), []).append(row)
        return rows.values()

    def filled(self, rows: Sequence[int], calls: TwoCalls) -> tuple[Tensor, Tensor, Any]:
        """Ids and mask [B, P + N] of some rows, and the cache of their heads, as arguments of ``generate``."""
        filled = calls.fill([self.heads[row] for row in rows])
        ids = torch.tensor([self.tails[row] for row in rows], device=filled.ids.device)
        mask = torch.cat([filled.mask, torch.ones_like(ids)], 1)
        return torch.cat([filled.ids, ids], 1), mask, filled.cache
