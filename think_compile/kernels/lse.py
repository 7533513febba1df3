"""Stock attention with the log-sum-exp of each query's logits, which fused attention kernels compute anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from think_compile.kernels import arrange

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


class _FusedAttention(TorchDispatchMode):
    """Keeps the log-sum-exp of the fused attention below, as the backend gives it; None if the backend is not fused."""

    lse: Tensor | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _ATTENTION:  # in inference mode it arrives whole
            with self:
                return func.decompose(*args, **kwargs)
        names = [argument.name for argument in func._schema.arguments]
        if "compute_log_sumexp" in names:
            at = names.index("compute_log_sumexp")
            args = (*args[:at], True, *args[at + 1 :])
        out = func(*args, **kwargs)
        results = [result.name for result in func._schema.returns]
        for name in {"logsumexp", "log_sumexp"}.intersection(results):
            self.lse = out[results.index(name)]
        return out


def attend(*operands: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Stock attention, arguments as written in the graph; and the log-sum-exp [B, Hq, N] fp32, or None."""
    with _FusedAttention() as fused:
        out = _ATTENTION(*operands, **options)
    return out, _of_queries(fused.lse, operands[0])


def attend_prompt(*operands: Any) -> tuple[Tensor, Tensor | None]:
    """:func:`.arrange.attend_prompt`, and the log-sum-exp [B, Hq, N] fp32, or None."""
    with _FusedAttention() as fused:
        out = arrange.attend_prompt(*operands)
    return out, _of_queries(fused.lse, operands[0])


def _of_queries(lse: Tensor | None, q: Tensor) -> Tensor | None:
    """Without a last axis of one, or more queries for alignment, as some backends have them."""
    return None if lse is None else lse.flatten(2)[..., : q.shape[2]]
