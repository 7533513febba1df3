"""The codec that stores rows unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from think_compile.cache.state import BATCH_SIZE, CAPACITY, HEADS, Part, State
from think_compile.formats.seen import Seen


@dataclass(frozen=True)
class Whole:
    """All numbers of every row."""

    name: ClassVar[str] = "whole"
    group: ClassVar[int] = 1
    has_window: ClassVar[bool] = False

    def parts(self, width: int) -> tuple[Part, ...]:
        """The rows, and nothing else."""
        return (Part("rows", (BATCH_SIZE, HEADS, CAPACITY, width)),)

    def choose(self, seen: Seen) -> State:
        """Nothing."""
        return {}

    def encode(self, rows: Tensor, chosen: State) -> State:
        """Rows [B, H, S, W], unchanged."""
        return {"rows": rows}

    def decode(self, state: State, width: int) -> Tensor:
        """[B, H, S, W]."""
        return state["rows"]

    def scores(self, queries: Tensor, state: State) -> Tensor:
        """[B, H, M, S]: products of ``queries`` [B, H, M, W] with the rows."""
        return queries @ state["rows"].to(queries.dtype).mT

    def is_lossy(self, width: int) -> bool:
        """Whether numbers are dropped."""
        return False

    def describe(self, width: int) -> str:
        """For the report."""
        return f"all {width} channels"
