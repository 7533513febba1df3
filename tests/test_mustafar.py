"""Mustafar against a simulation of its own: logits and cache contents of wrapped models, call by call."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from compare import padding, tokens
from models import CAPACITY, HuggingFaceSession, dense, hugging_face
from simulated_bits import SIDES, Simulation
from transformers import DynamicCache, StaticCache

from think_compile import FormatError, Mustafar, SnapKV, ThinkConfig, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.formats.mustafar import largest

RECENT = 8
CHUNKS = [27, 3, 11] + [1] * 6


# ------------------------------------------------------------------------------------------ the rule, number by number


@dataclass(frozen=True)
class Rule:
    """How many numbers of a row are dropped, and the bits of the others; at ``ratio`` 0 and 16 bits none changes."""

    ratio: float = 0.0
    bits: int = 16

    def row(self, numbers):
        """A row as a later call reads it."""
        strength = [math.inf if math.isnan(x) else abs(x) for x in numbers]
        count = len(numbers) - int(len(numbers) * self.ratio)
        kept = sorted(range(len(numbers)), key=lambda i: (-strength[i], i))[:count]
        if self.bits == 8:
            numbers = self.rounded(numbers, max(strength[i] for i in kept))
        return [x if i in kept else 0.0 for i, x in enumerate(numbers)]

    def rounded(self, numbers, most):
        step = np.float16(most / 127)
        if float(step) * 127 < most:
            step = np.nextafter(step, np.float16(np.inf))
        return [float(step) * max(-127, min(127, round(x / float(step)))) if step > 0 else 0.0 for x in numbers]

    def given(self):
        return Mustafar(self.ratio, self.bits, multiple=1)


class Pruned(Simulation):
    """A plain model whose rows are pruned on leaving the window."""

    def __init__(self, model, keys, values):
        super().__init__(model, None)
        self.sides = {"keys": keys, "values": values}

    def _settle(self, layer, past, call):
        count = int(layer.get_seq_length())
        start = min(layer.window_start if past else 0, past)
        layer.window_start = end = max(start, count - RECENT)
        for side, rule in self.sides.items():
            rows = getattr(layer, side)[:, :, start:end]
            flat = [rule.row(row) for row in rows.flatten(0, 2).tolist()]
            rows.copy_(torch.tensor(flat, dtype=rows.dtype).view(rows.shape))


# ------------------------------------------------------------------------------------------ wrapped models beside it


def model_of(name="llama", layers=1):
    extra = {"layer_types": ["full_attention"] * layers} if name == "gemma3" else {}
    return hugging_face(name, num_hidden_layers=layers, **extra)


class Three:
    """Conversations with a plain model, the simulation, and the wrapped model."""

    def __init__(self, keys, values, *, name="llama", layers=1, fixed=False, lowering="eager"):
        plain = model_of(name, layers)
        stored = {side: rule.given() for side, rule in zip(SIDES, (keys, values), strict=True)}
        self.wrapped = think_compile(copy.deepcopy(plain), recent=RECENT, lowering=lowering, strict=True, **stored)
        models = plain, Pruned(plain, keys, values).model, self.wrapped
        caches = [StaticCache(config=plain.config, max_cache_len=CAPACITY) if fixed else DynamicCache() for _ in models]
        self.talks = [HuggingFaceSession(m, c) for m, c in zip(models, caches, strict=True)]
        self.later, self.codes = [], 8 in (keys.bits, values.bits)

    @torch.no_grad()
    def run(self, ids, calls, real=None):
        marks = [None] * len(calls) if real is None else real.split(calls, dim=1)
        for part, mark in zip(ids.split(calls, dim=1), marks, strict=True):
            chosen = torch.ones_like(part, dtype=torch.bool) if mark is None else mark.bool()
            self.later.append([talk.step(part, mark)[chosen] for talk in self.talks])
        return self

    def crop(self, count):
        for talk in self.talks:
            talk.cache.crop(-count)
            talk.length -= count

    def check(self):
        plain, simulated, got = (torch.cat(logits) for logits in zip(*self.later, strict=True))
        of_format = (simulated - plain).norm()
        assert of_format > 1e-3 * plain.norm()
        assert (got - simulated).norm() <= (0.5 if self.codes else 0.05) * of_format
        if not self.codes:
            torch.testing.assert_close(got, simulated, rtol=0, atol=2e-4)
        for expected, layer in zip(self.talks[1].cache.layers[:1], self.talks[2].cache.layers, strict=False):
            for side in SIDES:
                assert isinstance(getattr(layer, side), Handle)
                want, have = (dense(getattr(x, side))[:, :, : self.talks[2].length] for x in (expected, layer))
                error = (have - want).abs()
                if self.codes:  # within a step, and far less almost everywhere
                    error = error / (want.abs().amax(-1, keepdim=True) / 127)
                    assert error.max() < 1.05 and (error > 0.25).float().mean() < 0.05
                else:
                    assert error.max() < 2e-5 and torch.equal(have == 0, want == 0)


BOTH = Rule(0.5), Rule(0.5)
RULES = {
    "both": BOTH,
    "keys": (Rule(0.6), Rule()),
    "values": (Rule(), Rule(0.7)),
    "8 bits": (Rule(0.5, 8), Rule(0.3, 8)),
}


@pytest.mark.parametrize(
    ("rules", "fixed"), [("both", False), ("both", True), ("keys", True), ("values", False), ("8 bits", True)]
)
def test_later_calls_read_the_largest_numbers(rules, fixed):
    count = sum(CHUNKS)
    Three(*RULES[rules], fixed=fixed).run(tokens(2, count), CHUNKS, padding("left", 2, count)).check()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_models(name):
    Three(*BOTH, name=name, layers=2).run(tokens(2, sum(CHUNKS)), CHUNKS).check()


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_crops(fixed):
    three = Three(*BOTH, fixed=fixed).run(tokens(2, 30), [28, 1, 1])
    for crop, then in ((5, [1] * 3), (14, [1, 9, 1])):
        three.crop(crop)
        three.run(tokens(2, sum(then)), then)
    three.check()


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_inductor_lowers_it(fixed):
    Three(*RULES["8 bits"], fixed=fixed, lowering="inductor").run(tokens(2, 30), [27, 1, 1, 1]).check()


def test_a_codec_that_keeps_everything_is_exact():
    model, ids = model_of(), tokens(2, 30)
    wrapped = think_compile(copy.deepcopy(model), keys=Mustafar(0.0), values=Mustafar(0.0), recent=2, lowering="eager")
    talks = [HuggingFaceSession(m, DynamicCache()) for m in (model, wrapped)]
    with torch.no_grad():
        for part in ids.split([20, 1, 8, 1], dim=1):
            want, got = (talk.step(part, None) for talk in talks)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_composes_with_token_rules():
    """The rows of the kept tokens are pruned as they are without a rule."""
    model, ids = model_of(), tokens(1, 40)
    caches = []
    for rule in (None, SnapKV(24, observe=8)):
        ours = think_compile(copy.deepcopy(model), keys="mustafar:0.5", values="mustafar:0.5", tokens=rule, recent=4)
        caches.append(HuggingFaceSession(ours, DynamicCache()))
        with torch.no_grad():
            caches[-1].step(ids[:, :39], None)
            caches[-1].step(ids[:, 39:], None)
        assert not report(ours).refused
    every, some = (talk.cache.layers[0].values.store for talk in caches)
    at = some.own["positions"].long()
    bitmap = every.rows.parts["bitmap"]
    want = bitmap.gather(2, at[..., None].expand(-1, -1, -1, bitmap.shape[3]))
    assert torch.equal(some.rows.parts["bitmap"][:, :, :24], want)


# ------------------------------------------------------------------------------------------ the rule, and bad input


def test_ties_zeros_and_what_is_no_number():
    inf, nan = math.inf, math.nan
    rows = [
        [1.0, -1, 1, 0.5, -1, 0, 2, 1],
        [0.0] * 8,
        [nan, 3, -inf, nan, 1, 2, inf, nan],
        [-0.0, 0, 1e-45, 0, 5, 0, 0, 0],
    ]
    for count in range(1, 9):
        stays = largest(torch.tensor(rows), count)
        assert (stays.sum(-1) == count).all()
        for row, kept in zip(rows, stays.tolist(), strict=True):
            want = Rule(1 - count / 8).row([x or 5e-324 for x in row])
            assert [x != 0 for x in want] == kept


def test_stored_bytes():
    for bits, most in ((16, 0.40), (8, 0.25)):
        codec = Mustafar(0.7, bits)
        assert codec.mean_bits(128) / 16 <= most and codec.count(128) == 40


def test_what_the_report_says():
    model = model_of()
    ours = think_compile(model, keys="mustafar:0.7:8", values=Mustafar(0.5), lowering="eager")
    with torch.no_grad():
        ours(tokens(1, 20))
    stored = report(ours).rewritten[0].stored
    width = model.config.head_dim
    assert f"of {width} numbers of each token in 8 bits" in stored and "values:" in stored


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (lambda: Mustafar(1.0), ValueError, ["[0, 1)", "1.0"]),
        (lambda: Mustafar(-0.1), ValueError, ["[0, 1)", "-0.1"]),
        (lambda: Mustafar(math.nan), ValueError, ["[0, 1)", "nan"]),
        (lambda: Mustafar("0.5"), TypeError, ["number", "'0.5'"]),
        (lambda: Mustafar(True), TypeError, ["number", "True"]),
        (lambda: Mustafar(0.5, 4), ValueError, ["16", "8", "4"]),
        (lambda: Mustafar(0.5, multiple=0), ValueError, ["multiple", ">= 1", "0"]),
        (lambda: ThinkConfig(keys="mustafar"), ValueError, ["keys='mustafar'", "mustafar:RATIO", "mustafar:0.7:8"]),
        (lambda: ThinkConfig(keys="mustafar:half"), ValueError, ["mustafar:half", "mustafar:RATIO"]),
        (lambda: ThinkConfig(values="mustafar:0.5:8:1:1"), ValueError, ["0.5:8:1:1'", "mustafar:RATIO"]),
        (lambda: ThinkConfig(values="mustafar:0.5:4"), ValueError, ["bits must be 16"]),
        (lambda: ThinkConfig(keys=Mustafar), TypeError, ["a class and not an object"]),
        (lambda: ThinkConfig(keys=Mustafar(0.5), ratio=0.5), ValueError, ["mustafar:0.5", "give one"]),
        (lambda: ThinkConfig(keys=Mustafar(0.5), values=8, decode=True), ValueError, ["decode=True"]),
    ],
)  # fmt: skip
def test_bad_input(given, error, says):
    with pytest.raises(error) as raised:
        given()
    for part in says:
        assert part in str(raised.value)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_heads_of_which_too_little_would_stay(strict):
    """An error of every call, which says what is allowed."""
    ours = think_compile(model_of(), values=Mustafar(0.95), strict=strict)
    for _ in range(2):
        with pytest.raises(FormatError, match=r"mustafar:0.95 leaves 2 of the 32 numbers .* a ratio of at most 0.75"):
            ours(tokens(1, 20))


def test_texts():
    assert ThinkConfig(keys="mustafar:0.7").keys == Mustafar(0.7)
    assert ThinkConfig(values="mustafar:0.7:8").values == Mustafar(0.7, 8)
    for text, codec in (
        ("mustafar:0.7:8", Mustafar(0.7, 8)),
        ("mustafar:0.5", Mustafar(0.5)),
        ("mustafar:0.5:16:1", Mustafar(0.5, multiple=1)),
    ):
        assert str(codec) == text and ThinkConfig(keys=text).keys == codec
