"""Keys and values as users write them: a bit plan, a codec, or a codec's text such as "mustafar:0.7"."""

from __future__ import annotations

from typing import Any

from think_compile.formats.mustafar import Mustafar
from think_compile.formats.plan import Plan
from think_compile.formats.side import Codec

NAMED = {"mustafar": Mustafar}
_CODEC = ("name", "group", "has_window", "parts", "choose", "encode", "decode", "scores", "is_lossy", "describe")


def stored_as(side: str, given: Any) -> Plan | Codec | None:
    """The plan or codec for ``side`` ("keys" or "values") as a user gives it; None: none is given.

    Raises:
        TypeError, ValueError: says what was given and what is allowed.
    """
    if given is None:
        return None
    if isinstance(given, str) and given.partition(":")[0] in NAMED:
        return _named(side, given)
    missing = [attribute for attribute in _CODEC if not hasattr(given, attribute)]
    if isinstance(given, type) or 0 < len(missing) < len(_CODEC) - 1:
        lacks = "a class and not an object of it" if isinstance(given, type) else f"without {', '.join(missing)}"
        raise TypeError(f"{side} must be a codec (docs/formats.md says what that is), got {given!r}, {lacks}.")
    if missing:
        return Plan.of(given, side)
    codec: Codec = hashable(side, given)
    return codec


def hashable(what: str, given: Any) -> Any:
    """``given``; raises TypeError if it cannot be hashed."""
    try:
        hash(given)
    except TypeError:
        raise TypeError(f"{what} must be hashable, as a frozen dataclass is; got {given!r}.") from None
    return given


def _named(side: str, text: str) -> Codec:
    """From "mustafar:RATIO", "mustafar:RATIO:BITS" or "mustafar:RATIO:BITS:MULTIPLE"."""
    name, *numbers = text.split(":")
    try:
        ratio, *others = (kind(number) for kind, number in zip((float, int, int), numbers, strict=False))
        if len(numbers) > 3:
            raise ValueError
    except ValueError:
        allowed = f'{name}:RATIO, {name}:RATIO:BITS or {name}:RATIO:BITS:MULTIPLE, for example "{name}:0.7:8"'
        raise ValueError(f"{side}={text!r} is not {allowed}.") from None
    codec: Codec = NAMED[name](ratio, *others)
    return codec
