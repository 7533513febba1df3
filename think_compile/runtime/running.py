"""The call of a wrapped model in progress: its identity, its arguments, and its failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple


class FrameFailure(NamedTuple):
    """A failure of Dynamo on a frame: its code, the kind of its arguments, and the error."""

    code: CodeType
    kind: tuple[Any, ...]
    error: Exception


@dataclass
class Running:
    """One call.

    Attributes:
        warn: issues a warning, given its text.
        arguments: the arguments of the call.
        token: identifies this call.
        names: the local variables of the frame that Dynamo is converting.
        failures: the frames on which Dynamo failed; they run as written in this call.
        marked: the code objects that Dynamo decided in this call never to convert again.
    """

    warn: Callable[[str], None]
    arguments: Any = None
    token: object = field(default_factory=object)
    names: Mapping[str, Any] = field(default_factory=dict)
    failures: list[FrameFailure] = field(default_factory=list)
    marked: list[CodeType] = field(default_factory=list)


RUNNING: ContextVar[Running | None] = ContextVar("think_compile_running", default=None)
