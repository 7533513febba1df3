"""Bit plans against `simulated_bits`: logits and cache contents of wrapped models, call by call."""

import copy

import pytest
import simulated_bits
import torch
from compare import padding, tokens
from models import CAPACITY, HuggingFaceSession, dense, hugging_face
from oracle import Oracle
from simulated_bits import SIDES, BitRules, Simulation, deal, select, tier_sizes, value_scores
from transformers import DynamicCache, StaticCache

from think_compile import report, think_compile
from think_compile.cache.handle import Handle

MIXED = BitRules({8: 0.25, 4: 0.75}, 4)
# Window and group of 8: the single steps flush at least twice. Each kind of call compiles anew: few tests have chunks.
CHUNKS = [27, 3, 11] + [1] * 17  # the first call is longer than any padding
STEPS = [27] + [1] * 21


def model_of(name="llama", layers=1, **overrides):
    """gemma3: other head_dim than hidden size / heads, other scale than 1 / sqrt(D), one KV head."""
    if name == "gemma3":
        overrides["layer_types"] = ["full_attention"] * layers
    return hugging_face(name, num_hidden_layers=layers, **overrides)


def wrap(model, rules, lowering="eager"):
    """A wrapped copy."""
    return think_compile(copy.deepcopy(model), lowering=lowering, **vars(rules))


def is_exact(rules):
    """Whether the format has no codes: the wrapped model then differs by rounding only."""
    return all(bits == 16 for side in SIDES for bits in rules.plan(side))


class Three:
    """Conversations with the plain model `plain`, its simulation `expected` and the wrapped model `got`."""

    def __init__(self, rules, model=None, *, fixed=False, lowering="eager"):
        self.rules = rules
        model = model_of() if model is None else model
        self.wrapped = wrap(model, rules, lowering)
        models = (model, Simulation(model, rules).model, self.wrapped)
        caches = [StaticCache(config=model.config, max_cache_len=CAPACITY) if fixed else DynamicCache() for _ in models]
        self.plain, self.expected, self.got = self.sessions = [
            HuggingFaceSession(m, cache) for m, cache in zip(models, caches, strict=True)
        ]
        self.later = []  # (plain, expected, got): logits of real tokens of each call but the first
        self.first_call = 0

    @torch.no_grad()
    def run(self, ids, calls, real=None):
        parts = [None] * len(calls) if real is None else real.split(calls, dim=1)
        for part, marks in zip(ids.split(calls, dim=1), parts, strict=True):
            self.step(part, marks)
        return self

    def step(self, ids, real=None):
        chosen = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        logits = [talk.step(ids, real)[chosen] for talk in self.sessions]
        if self.got.length > ids.shape[1]:
            self.later.append(logits)
            return
        self.first_call = ids.shape[1]
        for other in logits[1:]:  # the first call is exact
            torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=2e-5)

    def crop(self, count):
        for talk in self.sessions:
            talk.cache.crop(-count)
            talk.length -= count
            talk.real = None if talk.real is None else talk.real[:, : talk.length]

    def select(self, index):
        self.plain.cache.batch_select_indices(index)
        select(self.expected.cache, index)
        self.got.cache.batch_select_indices(index)
        for talk in self.sessions:
            talk.rows = len(index)
            talk.real = None if talk.real is None else talk.real[index]

    def check(self, allowed=0.05):
        """Logits and cache contents of everything so far."""
        layers = self.got.cache.layers
        assert all(isinstance(layer.keys, Handle) and isinstance(layer.values, Handle) for layer in layers)
        assert len(report(self.wrapped).rewritten) == len(layers) and not report(self.wrapped).refused
        self.check_caches()
        self.check_logits(allowed)

    def check_logits(self, allowed):
        """The error is a small part of what the format itself changes, and that is no small change."""
        plain, expected, got = (torch.cat(logits) for logits in zip(*self.later, strict=True))
        of_format, error = (expected - plain).norm().item(), (got - expected).norm().item()
        assert of_format > 1e-3 * plain.norm().item()
        if is_exact(self.rules):
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)
        assert error <= allowed * of_format, f"off by {error:.3g}; the format makes {of_format:.3g}"

    def check_caches(self):
        for i, (expected, got) in enumerate(zip(self.expected.cache.layers, self.got.cache.layers, strict=True)):
            # deeper layers: later rows depend on the codes of the layers below
            count = self.got.length if i == 0 else min(self.first_call, self.got.length)
            for side in SIDES:
                simulated, stored = (dense(getattr(c, side))[:, :, :count] for c in (expected, got))
                steps = expected.simulated.steps[side][:, :, :count]
                assert_same_codes(*self._real_tokens(simulated, stored, steps), f"{side} of layer {i}")

    def _real_tokens(self, *tensors):
        """[real tokens, H, D] of each [B, H, tokens, D]."""
        count, real = tensors[0].shape[2], self.got.real
        real = torch.ones(self.got.rows, count) if real is None else real
        return [x.transpose(1, 2)[real[:, :count].bool()] for x in tensors]


def assert_same_codes(expected, got, steps, what):
    """Within a code step everywhere, far less almost everywhere; what is no code is the same."""
    error = (got - expected).abs()
    whole = steps == 0
    assert (error[whole] <= 2e-5 * (1 + expected[whole].abs())).all(), f"{what}: whole numbers or zeros differ"
    assert torch.equal((expected == 0) & whole, (got == 0) & whole), f"{what}: other channels are dropped"
    if not whole.all():
        in_steps = (error / steps)[~whole]
        assert in_steps.max() <= 1.05, f"{what}: off by {in_steps.max():.2f} code steps"
        flipped = (in_steps > 0.25).float().mean().item()
        assert flipped <= 0.05, f"{what}: {flipped:.1%} of the codes differ"


# ------------------------------------------------------------------ the simulation itself


@torch.no_grad()
def test_the_simulation_of_thinks_plan_is_the_oracle():
    model, ids, real = model_of(), tokens(3, 40), padding("left", 3, 40)
    ours = Simulation(model, BitRules({16: 0.5}))
    talks = [HuggingFaceSession(m) for m in (ours.model, Oracle(model, 0.5, recent=8, observe=8, channel_multiple=1))]
    calls = [20, 7] + [1] * 13
    for part, marks in zip(ids.split(calls, 1), real.split(calls, 1), strict=True):
        logits = [talk.step(part, marks) for talk in talks]
        assert torch.equal(*logits)


def test_tiers_are_dealt_from_most_bits_down():
    assert tier_sizes({4: 0.75, 8: 0.25}, 32, 1) == [(8, 8), (4, 24)]
    assert tier_sizes({8: 0.25, 4: 0.75}, 32, 16) == [(8, 16), (4, 16)]
    assert tier_sizes({4: 0.5, 2: 0.25}, 32, 1) == [(4, 16), (2, 8)]
    assert tier_sizes({4: 0.3}, 32, 16) == [(4, 16)]
    assert deal([(8, 1), (4, 2)], torch.tensor([[[3.0, 9.0, 1.0, 5.0]]])).tolist() == [[[4, 8, 0, 4]]]


def test_value_scores_are_norms_of_attention_outputs():
    """Brute force, query by query."""
    q, k, v = torch.randn(1, 4, 6, 3), torch.randn(1, 2, 6, 3), torch.randn(1, 2, 6, 3)
    observed = torch.tensor([[False] * 3 + [True] * 3])
    expected = torch.zeros(1, 2, 3)
    for head in range(4):
        for i in range(3, 6):
            weights = (k[0, head // 2, : i + 1] @ q[0, head, i] * 0.7).softmax(0)
            expected[0, head // 2] += (weights @ v[0, head // 2, : i + 1]).square()
    pairs = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(value_scores(q, k, v, pairs, observed, 0.7), expected)


# ------------------------------------------------------------------ plans, models, caches

PLANS = [
    pytest.param("llama", BitRules(8, 8), True, STEPS, id="8-8-llama-fixed"),
    pytest.param("qwen3", BitRules(4, 4), False, STEPS, id="4-4-qwen3-growing"),
    pytest.param("gemma3", MIXED, True, STEPS, id="8+4-4-gemma3-fixed"),
    pytest.param("llama", BitRules({4: 0.5}, 4), False, STEPS, id="half4-4-llama-growing"),
    pytest.param("qwen3", BitRules({4: 0.5, 2: 0.5}, 4), True, STEPS, id="4+2-4-qwen3-fixed"),
    pytest.param("gemma3", BitRules({16: 0.5}, 4), False, STEPS, id="half16-4-gemma3-growing"),
    pytest.param("llama", BitRules(4), True, STEPS, id="4-none-llama-fixed"),
    pytest.param("qwen3", BitRules({16: 0.5}, {16: 0.5}), False, STEPS, id="half16-half16-qwen3-growing"),
    pytest.param("gemma3", BitRules(2, 2), True, STEPS, id="2-2-gemma3-fixed"),
    pytest.param(
        "llama", BitRules({4: 0.5, 2: 0.25}, {8: 0.5, 4: 0.25}), True, CHUNKS, id="4+2-8+4-llama-fixed-chunks"
    ),
]


@pytest.mark.parametrize(("name", "rules", "fixed", "calls"), PLANS)
def test_plans_with_padding(name, rules, fixed, calls):
    length = sum(calls)
    real = padding("left", 3, length)
    Three(rules, model_of(name), fixed=fixed).run(tokens(3, length), calls, real).check()


MORE_PLANS = [
    pytest.param("gemma3", BitRules(4, {16: 0.5, 4: 0.25}), False, STEPS, id="values-scored-gemma3-growing"),
    pytest.param("llama", BitRules(values=4, ratio=0.25), True, STEPS, id="ratio-4-llama-fixed"),
    pytest.param(
        "llama", BitRules({16: 0.25, 4: 0.5}, {16: 0.25, 2: 0.75}), False, CHUNKS, id="16+4-16+2-llama-growing"
    ),
    pytest.param("llama", BitRules({16: 1}, 2, sinks=0, group=16), True, STEPS, id="16-2-llama-fixed-without-sinks"),
    pytest.param("llama", BitRules({16: 0.5}, {16: 0.75}, sinks=3), True, STEPS, id="half16-16-llama-fixed-sinks"),
    pytest.param(
        "llama", BitRules({8: 0.3, 4: 0.3}, {4: 0.6}, channel_multiple=8), False, STEPS, id="rounded-up-llama"
    ),
]


@pytest.mark.parametrize(("name", "rules", "fixed", "calls"), MORE_PLANS)
def test_plans_without_padding(name, rules, fixed, calls):
    Three(rules, model_of(name), fixed=fixed).run(tokens(2, sum(calls)), calls).check()


def test_two_layers():
    """The codes of a layer change what the next one stores."""
    Three(MIXED, model_of("qwen3", layers=2)).run(tokens(2, sum(STEPS)), STEPS).check()


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.9), (4, 0.3)])
def test_the_stored_form_of_ranges_costs_little(bits, allowed, monkeypatch):
    """Against codes between the exact minimum and maximum, relative to the error of these."""
    monkeypatch.setattr(simulated_bits, "stored_range", simulated_bits.unrounded_range)
    three = Three(BitRules(bits, bits)).run(tokens(2, 57), [40] + [1] * 17)
    three.check_logits(allowed)


def test_values_of_many_channels_have_a_scale_for_each_64():
    """128 channels: one tier in two blocks; then tiers of 32 and 96, the latter in blocks of 64 and 32."""
    for values in (4, {8: 0.25, 4: 0.75}):
        Three(BitRules({16: 0.75}, values), model_of(head_dim=128)).run(tokens(2, 32), [30, 1, 1]).check()


def test_a_plan_that_keeps_everything_is_the_plain_model():
    for fixed in (False, True):
        three = Three(BitRules({16: 1}, {16: 1}), fixed=fixed).run(tokens(2, 48), STEPS)
        plain, _, got = (torch.cat(logits) for logits in zip(*three.later, strict=True))
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
        for layer, other in zip(three.got.cache.layers, three.plain.cache.layers, strict=True):
            for side in SIDES:
                torch.testing.assert_close(dense(getattr(layer, side)), getattr(other, side), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ caches in the user's hands


@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@torch.no_grad()
def test_crops(fixed):
    """Inside the window, inside a group behind it, at the end of a group, and twice at once."""
    three = Three(MIXED, fixed=fixed)
    three.run(tokens(2, 38), [28, 10])  # the window begins at 24
    for crop, then in [(9, [1] * 3), (11, [1] * 5), (2, [10, 1]), (18, [1] * 15)]:
        three.crop(crop)
        three.check_caches()
        three.run(tokens(2, sum(then)), then)
        three.check_caches()
    three.crop(2)
    three.crop(15)
    three.run(tokens(2, 26), [1] * 16 + [10])
    three.check()


@torch.no_grad()
def test_crop_into_the_sinks():
    three = Three(BitRules(4, 4)).run(tokens(2, 30), [28, 1, 1])
    three.crop(28)
    three.run(tokens(2, 24), [1] * 24).check()


@torch.no_grad()
def test_reordered_sequences():
    """Sequences with different padding and channels swap places, one twice; then the next groups leave the window."""
    real = padding("left", 3, 31)
    three = Three(BitRules({8: 0.25, 4: 0.75}, {8: 0.25, 4: 0.5})).run(tokens(3, 31), [23, 8], real)
    for index in ([2, 0, 1], [1, 1, 2], [2, 1, 0]):
        three.select(torch.tensor(index))
        three.check_caches()
        three.run(tokens(3, 5), [1] * 5, torch.ones(3, 5, dtype=torch.long))
    three.check()


def generate(model, ids, real, **options):
    return model.generate(ids, attention_mask=real, max_new_tokens=24, do_sample=False, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, pytest.param({"num_beams": 3}, marks=pytest.mark.slow)],
    ids=["greedy", "fixed", "beams"],
)
def test_generate(options):
    model, ids, real = model_of(), tokens(2, 27), padding("left", 2, 27)
    dense_tokens = generate(model, ids, real, **options)
    expected = generate(Simulation(model, MIXED).model, ids, real, **options)
    assert not torch.equal(expected, dense_tokens)  # else the test says nothing
    assert torch.equal(generate(wrap(model, MIXED), ids, real, **options), expected)


# ------------------------------------------------------------------ compiled code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rules", "fixed"),
    [(MIXED, False), (BitRules({4: 0.5}, 4), True), (BitRules({16: 0.5}, {16: 0.5}), False)],
    ids=["mixed-4-growing", "half4-4-fixed", "16half-16half-growing"],
)
def test_inductor(rules, fixed):
    real = padding("left", 2, 42)
    three = Three(rules, fixed=fixed, lowering="inductor")
    three.run(tokens(2, 42), [21] + [1] * 21, real).check(0.2)  # contracted products flip some codes
