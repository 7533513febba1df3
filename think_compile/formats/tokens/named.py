"""Token rules as users write them: an object, or its text such as "snapkv:1024" or "h2o:0.25"."""

from __future__ import annotations

from typing import Any

from think_compile.formats.given import hashable
from think_compile.formats.tokens.h2o import H2O
from think_compile.formats.tokens.kvcrush import KVCrush
from think_compile.formats.tokens.rule import TokenRule
from think_compile.formats.tokens.snapkv import SnapKV

NAMED = {"snapkv": SnapKV, "h2o": H2O, "kvcrush": KVCrush}
_EXAMPLES = 'for example SnapKV(1024), "snapkv:1024" or "kvcrush:0.25"'


def rule_of(given: Any) -> TokenRule | None:
    """The rule as a user gives it; None: all tokens are stored.

    Raises:
        TypeError, ValueError: says what was given and what is allowed.
    """
    if given is None or isinstance(given, str):
        return None if given is None else _named(given)
    missing = [name for name in ("positions", "describe") if not callable(getattr(given, name, None))]
    if missing or isinstance(given, type):
        lacks = "a class and not an object of it" if isinstance(given, type) else f"without {', '.join(missing)}"
        raise TypeError(f"tokens must be a rule, {_EXAMPLES}; got {given!r}, {lacks}.")
    rule: TokenRule = hashable("tokens", given)
    return rule


def _named(text: str) -> TokenRule:
    name, _, budget = text.partition(":")
    if name not in NAMED or not budget:
        raise ValueError(f"tokens={text!r} is not RULE:BUDGET with one of {', '.join(NAMED)}; {_EXAMPLES}.")
    try:
        number: int | float = int(budget) if budget.isdecimal() else float(budget)
    except ValueError:
        raise ValueError(f"tokens={text!r}: {budget!r} is no number of tokens and no share; {_EXAMPLES}.") from None
    return NAMED[name](number)
