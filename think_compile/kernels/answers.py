"""Questions about a call, answered from its masks and positions before it runs: which rows it writes and reads.

The passes put these functions into small graphs of their own (:mod:`think_compile.passes.rewrite.question`). N new
tokens, S rows of a cache; an answer is a bool, or a 0-d tensor where only the device knows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hides_other_rows(mask: Tensor) -> Tensor:
    """0-d bool: whether a mask [..., N, S] of a first call hides all keys but the first N, as if they were not there.

    A query from which a float mask hides all keys sees all of them alike, those that were not written too.
    """
    own, others = mask.split([mask.shape[-2], mask.shape[-1] - mask.shape[-2]], -1)
    if mask.dtype == torch.bool:
        return others.logical_not().all()
    hidden = torch.finfo(mask.dtype).min / 2
    return (others <= hidden).all() & (own > hidden).any(-1).all()


def sees_later_rows(mask: Tensor, start: Tensor | int, n_new: int) -> Tensor:
    """0-d bool: whether a mask [..., S] over a cache's rows shows some query a row behind the ``n_new`` from ``start``.

    ``start`` as in :func:`.steps.start_of`, or its first element.
    """
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    end = torch.as_tensor(highest_start([start]) + n_new).to(mask.device)
    return (shown & (torch.arange(mask.shape[-1], device=mask.device) >= end)).any()


def reads_later_rows(rows: int, start: Tensor | int, n_new: int) -> Tensor | bool:
    """As :func:`sees_later_rows`, of an attention to all the first ``rows``."""
    return highest_start([start]) + n_new < rows


def any_holds(answers: list[Tensor | bool]) -> Tensor | bool:
    """Whether one is true."""
    tensors = [answer for answer in answers if isinstance(answer, Tensor)]
    numbers = any(answer for answer in answers if not isinstance(answer, Tensor))
    return _stacked(tensors).any() if tensors and not numbers else numbers


def begins_at_first_row(start: Tensor | int, consecutive: bool) -> Tensor | bool:
    """Whether a call writes rows 0, 1, ...; ``start`` as in :func:`.steps.start_of`, or its first element."""
    if not isinstance(start, Tensor) or start.dim() == 0:
        return start == 0
    return start[0] == 0 if consecutive else (start == torch.arange(start.shape[0], device=start.device)).all()


def highest_start(starts: list[Tensor | int]) -> Tensor | int:
    """The highest first row of several calls; each as in :func:`.steps.start_of`, or its first element."""
    first = [start.flatten()[0] if isinstance(start, Tensor) else start for start in starts]
    if all(isinstance(start, int) for start in first):
        return max(first)
    device = next(start.device for start in first if isinstance(start, Tensor))
    return torch.stack([torch.as_tensor(start, device=device) for start in first]).max()


def all_hold(answers: list[Tensor | bool]) -> Tensor | bool:
    """Whether all are true."""
    tensors = [answer for answer in answers if isinstance(answer, Tensor)]
    numbers = all(answer for answer in answers if not isinstance(answer, Tensor))
    return _stacked(tensors).all() if tensors and numbers else numbers


def _stacked(answers: list[Tensor]) -> Tensor:
    """Answers of layers, which may be on different devices."""
    return torch.stack([answer.to(answers[0].device) for answer in answers])
