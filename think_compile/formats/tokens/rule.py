"""The interface of token rules, and what most rules share; each rule is a file.

A rule's rows are stored in order, but padding comes first: so the tokens of a sequence begin at one row in all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from think_compile.formats.seen import Seen
from think_compile.formats.think import observed_attention


class RuleError(ValueError):
    """A token rule of the user's own failed, or selected what is not there."""


class TokenRule(Protocol):
    """Selects the tokens of a first call that are stored; later tokens all are.

    With ``wants_lse = True``, ``seen.lse`` comes from the model's attention, if this gives one.
    """

    def positions(self, seen: Seen) -> Tensor:
        """[B, H, K] int64: the rows of the stored tokens among the S rows of ``seen``, K <= S, without duplicates."""

    def describe(self) -> str:
        """A phrase for the report."""


@dataclass(frozen=True)
class Budget:
    """A number of tokens, or a share of the prompt; padding on the left counts as prompt.

    Attributes:
        budget: tokens of the first call that each KV head stores: a count (int), or a share in (0, 1) (float) that
            comes to at least :attr:`least` tokens.
    """

    budget: int | float

    def __post_init__(self) -> None:
        what, given = type(self).__name__, self.budget
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise TypeError(
                f"{what}: budget must be a number of tokens (int) or a share of the prompt (float); got {given!r} "
                f"({type(given).__name__})."
            )
        if isinstance(given, int) and given < self.least:
            raise ValueError(f"{what}: a budget of {given} tokens is less than the {self.least} that always stay.")
        if isinstance(given, float) and not 0 < given < 1:
            raise ValueError(f"{what}: a budget as a share of the prompt must be in (0, 1), got {given}.")

    @property
    def least(self) -> int:
        """The smallest budget: the tokens that always stay."""
        return 1

    def count(self, tokens: Any) -> Any:
        """Stored tokens of a prompt of ``tokens`` tokens."""
        if isinstance(self.budget, int):
            return torch.sym_min(self.budget, tokens)
        share = Fraction(self.budget).limit_denominator(1000)
        return torch.sym_min(torch.sym_max(self.least, tokens * share.numerator // share.denominator), tokens)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()}:{self.budget}"

    def describe(self) -> str:
        """For the report."""
        what = f"{self.budget} tokens" if isinstance(self.budget, int) else f"{self.budget:g} of the prompt"
        return f"{type(self).__name__} keeps {what}"


def selected(rule: TokenRule, seen: Seen) -> Tensor:
    """The rule's positions [B, H, K] for a first call.

    Raises:
        RuleError: the rule raises, or its result is no tensor of this kind.
    """
    try:
        rows = rule.positions(seen)
    except Exception as error:
        if isinstance(rule, Budget):  # ours
            raise
        raise RuleError(f"the token rule {rule!r} failed: {type(error).__name__}: {error}") from error
    wanted = *seen.k.shape[:2], "K"
    if not isinstance(rows, Tensor) or rows.is_floating_point() or rows.dtype == torch.bool or rows.dim() != 3:
        kind = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise RuleError(f"the token rule {rule!r} must give rows {wanted} as integers, got {kind}.")
    return _padding_first(rows.to(torch.int64), seen)


def _padding_first(rows: Tensor, seen: Seen) -> Tensor:
    """``rows`` [B, H, K], ascending, padding first."""
    if seen.key_valid is None:
        return rows.sort(-1).values
    size = seen.key_valid.shape[1]
    inside = rows.clamp(min=0, max=size - 1)
    is_token = seen.key_valid[:, None].expand(-1, rows.shape[1], -1).gather(2, inside)
    return rows.gather(2, (inside + is_token * size).argsort(-1))


def check(rule: TokenRule, positions: Tensor, tokens: int) -> None:
    """Raise if a rule of the user's own has selected rows outside of ``tokens``, or one twice; waits for the device.

    Raises:
        RuleError: it has.
    """
    if isinstance(rule, Budget):
        return
    ordered = positions.sort(-1).values
    if bool(((ordered < 0) | (ordered >= tokens)).any()):
        raise RuleError(f"the token rule {rule!r} gave positions outside of the call's {tokens} tokens.")
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise RuleError(f"the token rule {rule!r} gave a position twice.")


def attention_of_last(seen: Seen, observe: int) -> tuple[Tensor, Tensor]:
    """[B, H, S]: each key's probability, mean over a group's last ``observe`` queries.

    Then [B, S]: which rows are those queries' own.
    """
    probabilities, rows, counts = observed_attention(seen, observe)
    counted = torch.where(counts[:, None, None, :, None], probabilities, 0)
    mean = counted.mean(2).sum(2) / counts.sum(1).clamp(min=1)[:, None, None]
    at = torch.arange(seen.k.shape[2], device=rows.device)
    return mean, ((at == rows[:, :, None]) & counts[:, :, None]).any(1)


def highest(score: Tensor, valid: Tensor | None, count: Any) -> Tensor:
    """[B, H, count]: the rows with the highest ``score`` [B, H, S]; ties go to the lower row.

    Rows that are not ``valid`` [B, S] come last.
    """
    score = torch.where(score.isnan(), float("inf"), score)
    if valid is not None:
        score = torch.where(valid[:, None], score, float("-inf"))
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]
