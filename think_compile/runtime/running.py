"""The call of a wrapped model in progress: its identity, its arguments, and the failures met on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple


class FrameFailure(NamedTuple):
    """A frame that Dynamo failed on: its code, the kind of its arguments, and the error."""

    code: CodeType
    kind: tuple[Any, ...]
    error: Exception


@dataclass
class Running:
    """One call.

    Attributes:
        warn: takes a warning, as text.
        arguments: the arguments of the call.
        token: tells this call from others.
        names: the local variables of the frame that Dynamo converts at the moment.
        failures: the frames that run as they were written in this call, since Dynamo failed on them.
        marked: the codes that Dynamo has decided, in this call, not to convert again.
    """

    warn: Callable[[str], None]
    arguments: Any = None
    token: object = field(default_factory=object)
    names: Mapping[str, Any] = field(default_factory=dict)
    failures: list[FrameFailure] = field(default_factory=list)
    marked: list[CodeType] = field(default_factory=list)


RUNNING: ContextVar[Running | None] = ContextVar("think_compile_running", default=None)
