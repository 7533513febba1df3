"""ThinkConfig: the user's settings, checked once. The only place with defaults."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from think_compile.formats.base import CacheFormat, Side
from think_compile.formats.given import stored_as
from think_compile.formats.plan import Plan
from think_compile.formats.think import Channels
from think_compile.formats.tokens.named import rule_of
from think_compile.formats.whole import Whole

LOWERINGS = ("inductor", "eager")
DEFAULT_RATIO = 0.5
SINKS = 4  # of plans with codes


def fallback_allowed() -> bool:
    """Whether an internal failure may fall back to simpler code; THINK_COMPILE_FALLBACK=0 forbids it."""
    return os.environ.get("THINK_COMPILE_FALLBACK", "1") != "0"


def _check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int >= {low}, got {value!r} ({type(value).__name__}).")
    if value < low:
        raise ValueError(f"{name} must be an int >= {low}, got {value}.")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")


def _check_ratio(ratio: Any) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(
            f"ratio must be a number in [0, 1), the share of key channels to drop; got {ratio!r} "
            f"({type(ratio).__name__})."
        )
    if math.isnan(ratio) or not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), the share of key channels to drop; got {ratio}.")


def _inductor_options(options: Mapping[str, Any]) -> Options:
    """The options by their names in ``torch._inductor.config``: ``max-autotune`` becomes ``max_autotune``."""
    if not options:
        return Options()
    from torch._inductor import config as inductor_config

    known = inductor_config.get_config_copy()
    named: dict[str, Any] = {}
    for given, value in options.items():
        name = given.replace("-", "_")
        if name not in known:
            raise TypeError(
                f"unknown argument {given!r}: it is neither an option of think_compile nor one of "
                "torch._inductor.config (torch._inductor.list_options() names those)."
            )
        if name in named:
            raise TypeError(f"the option {name!r} of torch._inductor.config is given twice, once as {given!r}.")
        named[name] = value
    return Options(named)


class Options(dict[str, Any]):
    """An immutable mapping that can be hashed, copied and pickled as part of a frozen value."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted((name, repr(value)) for name, value in self.items())))

    def __reduce__(self) -> Any:
        return Options, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the options of a ThinkConfig do not change; make another ThinkConfig")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True)
class ThinkConfig:
    """The arguments of :func:`think_compile.think_compile`, frozen.

    Attributes:
        ratio: share of the key channels to drop, in [0, 1) (the paper's lambda); None: 0.5, or 0 if ``keys`` or
            ``tokens`` is given.
        keys, values: bit plans (``{8: 0.25, 4: 0.75}``, ``4``, ``"8:0.25+4:0.75"``, ``"balanced"``; a share of the
            channels by number of bits, 16 for the model's own dtype) or codecs (``Mustafar(0.7)``, ``"mustafar:0.7"``;
            docs/formats.md); None: keys pruned by ``ratio``, values whole.
        group: number of tokens that are encoded together, if a plan has codes.
        sinks: number of first tokens of each sequence that stay whole; None: 4 if a plan has codes, else 0.
        recent: number of latest tokens whose rows stay whole between calls (the paper's is 32; docs/accuracy.md).
        observe: number of latest queries that score the channels (the paper's observation window).
        channel_multiple: kept channels are rounded up to a multiple of this; 1 is exactly the paper.
        prune_generated: also prune tokens after the first call, when they leave the window. False is as in the paper's
            own code: only the first call's tokens are pruned.
        tokens: which tokens of a first call are stored: a rule (``SnapKV(1024)``, ``H2O(0.25)``, ``KVCrush(0.25)``, or
            one of the user's own) or its text (``"snapkv:1024"``); None: all.
        decode: also store the caches that attention does not read as they are stored, such as latents, if ``keys`` and
            ``values`` are plans of one tier. A step then decodes each of them, which takes time.
        sliding: also prune the caches of layers with a bounded window, if it is larger than ``recent``.
        strict: raise if an attention layer with a cache cannot be rewritten, and on internal failure, instead of
            leaving it as it was.
        lowering: "inductor" compiles the rewritten graph, "eager" runs it op by op.
        static_cache: on a GPU, Hugging Face's ``generate`` uses a cache of fixed size by default.
        cuda_graphs: on a GPU, replay steps on caches of fixed size from a captured CUDA graph.
        inductor_options: options of ``torch._inductor.config`` for the lowering.
    """

    ratio: float = None  # type: ignore[assignment]  # a number from __post_init__ on
    keys: Any = None  # Plan | Codec | None from __post_init__ on
    values: Any = None
    group: int = 128
    sinks: int = None  # type: ignore[assignment]
    recent: int = 64
    observe: int = 32
    channel_multiple: int = 16
    prune_generated: bool = True
    tokens: Any = None  # TokenRule | None from __post_init__ on
    decode: bool = False
    sliding: bool = False
    strict: bool = False
    lowering: str = "inductor"
    cuda_graphs: bool = True
    static_cache: bool = True
    inductor_options: Mapping[str, Any] = field(default_factory=dict)  # kept as a read-only, hashable mapping

    def __post_init__(self) -> None:
        for side in ("keys", "values"):
            object.__setattr__(self, side, stored_as(side, getattr(self, side)))
        if self.ratio is None:
            object.__setattr__(self, "ratio", DEFAULT_RATIO if self.keys is None and self.tokens is None else 0.0)
        _check_ratio(self.ratio)
        if self.keys is not None and self.ratio != 0:
            raise ValueError(
                f"ratio={self.ratio} drops key channels, and keys={str(self.keys)!r} says how keys are stored: "
                f"give one (ratio={self.ratio} is keys={{16: {1 - self.ratio:g}}})."
            )
        _check_int("group", self.group, 2)
        if self.group % 2:
            raise ValueError(f"group must be even, since two tokens share a byte; got {self.group}.")
        if self.sinks is None:
            object.__setattr__(self, "sinks", SINKS if self._has_codes else 0)
        _check_int("sinks", self.sinks, 0)
        _check_int("recent", self.recent, 0)
        _check_int("observe", self.observe, 1)
        object.__setattr__(self, "tokens", rule_of(self.tokens))
        if self.tokens is not None and (self.decode or self.sliding):
            other = "decode" if self.decode else "sliding"
            raise ValueError(
                f"tokens= selects what attention reads, and {other}=True stores caches otherwise: give one."
            )
        _check_int("channel_multiple", self.channel_multiple, 1)
        _check_bool("prune_generated", self.prune_generated)
        _check_bool("decode", self.decode)
        _check_bool("sliding", self.sliding)
        _check_bool("strict", self.strict)
        _check_bool("cuda_graphs", self.cuda_graphs)
        _check_bool("static_cache", self.static_cache)
        if self.sliding and self._window_group > 1:
            raise ValueError(
                "sliding=True compresses bounded windows row by row, and codes are encoded in groups of tokens: give "
                "plans of 16 bits, or leave sliding out."
            )
        if self.decode:
            self._check_decode()
        if self.lowering not in LOWERINGS:
            raise ValueError(f"lowering must be one of {LOWERINGS}, got {self.lowering!r}.")
        if self.inductor_options and self.lowering != "inductor":
            raise ValueError(f"{sorted(self.inductor_options)} need lowering='inductor', got {self.lowering!r}.")
        object.__setattr__(self, "inductor_options", _inductor_options(self.inductor_options))

    def _check_decode(self) -> None:
        """Raise unless both sides store all channels in the same number of bits, and one of them in codes."""
        for side in ("keys", "values"):
            plan = getattr(self, side)
            fits = isinstance(plan, Plan) and plan.is_uniform if plan is not None else side == "values"
            if not fits:
                ratio = f", so ratio={self.ratio} prunes keys" if side == "keys" and plan is None else ""
                raise ValueError(
                    "decode=True stores all channels of a cache in equally many bits, since no query scores them: "
                    f"{side} must be 8, 4, 2 or 16; got {side}={plan if plan is None else str(plan)!r}{ratio}."
                )
        if not self._has_codes:
            raise ValueError("decode=True needs keys or values in codes (8, 4 or 2 bits); got 16 bits for both.")

    def kept_channels(self, head_dim: int) -> int:
        """Kept channels of D = ``head_dim``: D - int(D * ratio), rounded up to ``channel_multiple``, at most D."""
        kept = head_dim - int(head_dim * self.ratio)
        rounded = -(-kept // self.channel_multiple) * self.channel_multiple
        return min(head_dim, rounded)

    @property
    def smallest_window(self) -> int | None:
        """Bounded caches larger than this are compressed too; None: no bounded cache is."""
        return self.recent if self.sliding else None

    def format_for(self, head_dim: int, value_dim: int) -> CacheFormat:
        """The format of a layer with ``head_dim`` key channels and ``value_dim`` value channels.

        Raises:
            FormatError: a codec does not take rows of this size.
        """
        keys = Channels(self.kept_channels(head_dim), self.observe) if self.keys is None else self.keys
        values = Whole() if self.values is None else self.values
        how = {"multiple": self.channel_multiple, "observe": self.observe, "group": self.group}
        if isinstance(keys, Plan):
            keys = keys.codec("keys", head_dim, **how)
        if isinstance(values, Plan):
            values = values.codec("values", value_dim, **how)
        for codec, width in ((keys, head_dim), (values, value_dim)):
            if hasattr(codec, "check"):
                codec.check(width)
        window = self.recent, self.prune_generated, math.lcm(keys.group, values.group), self.sinks
        sides = Side(keys, head_dim, *window), Side(values, value_dim, *window)
        return CacheFormat(*sides, self.tokens)

    @property
    def _has_codes(self) -> bool:
        return any(isinstance(plan, Plan) and plan.has_codes for plan in (self.keys, self.values))

    @property
    def _window_group(self) -> int:
        groups = [
            stored.group for stored in (self.keys, self.values) if stored is not None and not isinstance(stored, Plan)
        ]
        return math.lcm(*groups, self.group if self._has_codes else 1)
