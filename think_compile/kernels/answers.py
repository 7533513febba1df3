"""Questions about the rows that a call writes and reads, answered from its masks and positions before it runs.

The passes put these functions into separate small graphs (:mod:`think_compile.passes.rewrite.question`). N is the
number of new tokens, S the rows of a cache. An answer is a bool, or a 0-d tensor if only the device knows it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hides_other_rows(mask: Tensor) -> Tensor:
    """0-d bool: whether a first call's mask [..., N, S] fully hides every key after the first N.

    False if a float mask hides all of the first N keys from some query: such a query weighs all S keys alike, unwritten
    ones too.
    """
    own, others = mask.split([mask.shape[-2], mask.shape[-1] - mask.shape[-2]], -1)
    if mask.dtype == torch.bool:
        return others.logical_not().all()
    hidden = torch.finfo(mask.dtype).min / 2
    return (others <= hidden).all() & (own > hidden).any(-1).all()


def sees_later_rows(mask: Tensor, start: Tensor | int, n_new: int) -> Tensor:
    """0-d bool: whether a mask [..., S] over a cache's rows shows any row after the ``n_new`` rows from ``start`` on.

    ``start``: a number, or a tensor whose first element counts.
    """
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    end = torch.as_tensor(highest_start([start]) + n_new).to(mask.device)
    return (shown & (torch.arange(mask.shape[-1], device=mask.device) >= end)).any()


def reads_later_rows(rows: int, start: Tensor | int, n_new: int) -> Tensor | bool:
    """As :func:`sees_later_rows`, for an unmasked attention to the first ``rows`` rows."""
    return highest_start([start]) + n_new < rows


def any_holds(answers: list[Tensor | bool]) -> Tensor | bool:
    """Whether any answer is true."""
    tensors = [answer for answer in answers if isinstance(answer, Tensor)]
    numbers = any(answer for answer in answers if not isinstance(answer, Tensor))
    return _stacked(tensors).any() if tensors and not numbers else numbers


def begins_at_first_row(start: Tensor | int, consecutive: bool) -> Tensor | bool:
    """Whether a call writes rows 0, 1, ...; ``start``: its first row, or the tensor of all its rows."""
    if not isinstance(start, Tensor) or start.dim() == 0:
        return start == 0
    return start[0] == 0 if consecutive else (start == torch.arange(start.shape[0], device=start.device)).all()


def highest_start(starts: list[Tensor | int]) -> Tensor | int:
    """The highest first row among ``starts``: numbers, or tensors whose first element counts."""
    first = [start.flatten()[0] if isinstance(start, Tensor) else start for start in starts]
    if all(isinstance(start, int) for start in first):
        return max(first)
    device = next(start.device for start in first if isinstance(start, Tensor))
    return torch.stack([torch.as_tensor(start, device=device) for start in first]).max()


def all_hold(answers: list[Tensor | bool]) -> Tensor | bool:
    """Whether all answers are true."""
    tensors = [answer for answer in answers if isinstance(answer, Tensor)]
    numbers = all(answer for answer in answers if not isinstance(answer, Tensor))
    return _stacked(tensors).all() if tensors and numbers else numbers


def _stacked(answers: list[Tensor]) -> Tensor:
    """Stack the answers of layers, which may be on different devices."""
    return torch.stack([answer.to(answers[0].device) for answer in answers])
