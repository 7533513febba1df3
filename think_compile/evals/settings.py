"""The settings of an evaluation: a method, its arguments and the protocol, checked before any model loads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from think_compile.config import ThinkConfig

METHODS = {
    "think": "the compiled path of think_compile",
    "dense": "the plain model, same protocol",
    "simulated": "think's rule on a dense cache, for comparison",
    "kvpress": "ThinKPress of kvpress: all tokens of the prompt, no recent window",
    "per_query_head": "the paper's code: each query head has its own channels",
    "magnitude": "key energy alone",
    "attended": "keys count as much as the observed queries attend to them",
    "random": "channels drawn at random",
}
SIMULATED = tuple(name for name in METHODS if name not in ("think", "dense"))
SCORED_KEYS = ("all", "old")
PLANS = ("keys", "values")
OF_PLANS = ("group", "sinks", "decode")
AS_TEXT = (*PLANS, "tokens")
THINK_OPTIONS = (
    "ratio",
    *PLANS,
    "group",
    "sinks",
    "recent",
    "observe",
    "channel_multiple",
    "tokens",
    "prune_generated",
    "decode",
    "sliding",
    "lowering",
)

_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Settings:
    """A method and its protocol.

    Attributes:
        method: a key of ``METHODS``.
        config: the pruning; ``lowering`` is for method "think" alone.
        held_back: number of last tokens of a context that read the pruned cache together with the continuation.
        split: prefilled share of a rolling window, in (0, 1).
        score_over: simulated methods: keys for scoring the channels, "all" or "old" (outside the window).
        seed: of method "random".
    """

    method: str = "think"
    config: ThinkConfig = field(default_factory=ThinkConfig)
    held_back: int = 1
    split: float = 0.5
    score_over: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}.")
        _require(isinstance(self.held_back, int) and self.held_back >= 1, "held_back", "an int >= 1", self.held_back)
        fits = isinstance(self.split, float) and 0 < self.split < 1
        _require(fits, "split", "a number in (0, 1), the share of a rolling window that is prefilled", self.split)
        _require(self.score_over in SCORED_KEYS, "score_over", f"one of {', '.join(SCORED_KEYS)}", self.score_over)
        _require(isinstance(self.seed, int), "seed", "an int", self.seed)
        if self.method in SIMULATED and (self.has_plans or self.config.tokens is not None):
            raise ValueError(f"keys, values and tokens are for method 'think'; got method {self.method!r}.")
        if self.score_over != "all" and self.method not in SIMULATED:
            raise ValueError(
                f"score_over={self.score_over!r} is for the simulated methods ({', '.join(SIMULATED)}); "
                f"got method {self.method!r}."
            )

    @classmethod
    def of(cls, *, dense: Any = False, **options: Any) -> Settings:
        """From arguments as a command line gives them: numbers and booleans may be strings.

        ``dense`` is short for method "dense"; the rest are options of ``ThinkConfig`` or attributes of this class.

        Raises:
            TypeError, ValueError: an argument is unknown, has the wrong type or is out of range.
        """
        known = cls.names()
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"unknown argument {', '.join(unknown)}; known are dense, {', '.join(known)}.")
        values = {name: _typed(value) for name, value in options.items()}
        dense = _typed(dense)
        _require(isinstance(dense, bool), "dense", "True or False", dense)
        if dense:
            if values.get("method", cls.method) not in (cls.method, "dense"):
                raise ValueError(f"dense=True and method={values['method']!r} are two methods: give one of them.")
            values["method"] = "dense"
        config = ThinkConfig(**{name: values.pop(name) for name in THINK_OPTIONS if name in values})
        return cls(config=config, **values)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options of :meth:`of`, but for ``dense``."""
        return (*THINK_OPTIONS, *(f.name for f in dataclasses.fields(cls) if f.name != "config"))

    @property
    def has_plans(self) -> bool:
        """Whether keys or values are stored by a bit plan."""
        return any(getattr(self.config, side) is not None for side in PLANS)

    @property
    def prunes(self) -> bool:
        """Whether the cache is to be compressed at all."""
        stored = self.config.ratio > 0 or self.has_plans or self.config.tokens is not None
        return self.method != "dense" and stored

    @property
    def label(self) -> str:
        """For example ``think-0.5``, ``think-k8x0.25+4x0.75-v4``, or ``think-0-snapkvx1024``."""
        if self.method == "dense":
            return "dense"
        ratio = "" if self.config.keys is not None else f"-{self.config.ratio:g}"
        plans = "".join(f"-{side[0]}{plan}" for side in PLANS if (plan := getattr(self.config, side)) is not None)
        tokens = "" if self.config.tokens is None else f"-{self.config.tokens}"
        return f"{self.method}{ratio}{plans}{tokens}".replace(":", "x")

    def described(self) -> dict[str, Any]:
        """Everything with an influence on the numbers, for JSON, without options unused by the method."""
        told: dict[str, Any] = {"method": self.method, "held_back": self.held_back, "split": self.split}
        if self.method == "dense":
            return told
        options = [name for name in THINK_OPTIONS if name != "lowering" or self.method == "think"]
        told |= {name: getattr(self.config, name) for name in options if name not in (*AS_TEXT, *OF_PLANS)}
        told |= {} if self.config.tokens is None else {"tokens": str(self.config.tokens)}
        if self.has_plans:
            plans = {side: plan for side in PLANS if (plan := getattr(self.config, side)) is not None}
            told |= {side: str(plan) for side, plan in plans.items()}
            told |= {"group": self.config.group, "sinks": self.config.sinks}
            told |= {"decode": True} if self.config.decode else {}
        if self.method in SIMULATED:
            told |= {"score_over": self.score_over}
        return told | ({"seed": self.seed} if self.method == "random" else {})


def _require(fits: bool, name: str, allowed: str, got: Any) -> None:
    if not fits:
        raise ValueError(f"{name} must be {allowed}; got {got!r}.")


def _typed(value: Any) -> Any:
    """A number or boolean, possibly from a string."""
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue  # a word, or a number of the other kind
    return value
