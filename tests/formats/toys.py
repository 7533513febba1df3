"""Codecs for tests only: examples of users' codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from think_compile.formats import Part, Seen, State


@dataclass(frozen=True)
class Scaled:
    """Rows in 8-bit integers, with a scale per token, and an offset per sequence chosen by the first call."""

    name: ClassVar[str] = "scaled"
    group: ClassVar[int] = 1
    has_window: ClassVar[bool] = True

    def parts(self, width: int) -> tuple[Part, ...]:
        return (
            Part("codes", ("B", "H", "C", width), torch.int8),
            Part("magnitude", ("B", "H", "C", 1), torch.float32),
            Part("middle", ("B", "H", width), torch.float32),
        )

    def choose(self, seen: Seen) -> State:
        return {"middle": seen.v.float().mean(2)}

    def encode(self, rows: Tensor, chosen: State) -> State:
        rows = rows.float() - chosen["middle"][:, :, None]
        scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return {"codes": (rows / scale).round().to(torch.int8), "magnitude": scale}

    def decode(self, state: State, width: int) -> Tensor:
        return state["codes"].float() * state["magnitude"] + state["middle"][:, :, None]

    def scores(self, queries: Tensor, state: State) -> Tensor:
        return queries @ self.decode(state, 0).to(queries.dtype).mT

    def is_lossy(self, width: int) -> bool:
        return True

    def describe(self, width: int) -> str:
        return f"{width} channels in 8 bits"
