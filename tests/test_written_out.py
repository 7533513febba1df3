"""Attention without the stock operation, in many styles, against the oracle."""

import pytest
import torch
from compare import Rules, Trio, padding, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_out import CACHES, EXTRAS, LAYOUTS, MASKS, PRODUCTS, SOFTMAXES, Style, every_choice, register

from think_compile import report

STYLES = st.builds(
    Style,
    layout=st.sampled_from(sorted(LAYOUTS)),
    product=st.sampled_from(PRODUCTS),
    mask=st.sampled_from(MASKS),
    softmax=st.sampled_from(SOFTMAXES),
    extra=st.sampled_from(EXTRAS),
    cache=st.sampled_from(CACHES),
).filter(lambda style: not (style.extra == "heads in turn" and style.product.startswith("grouped")))
# (grouped products read neighbouring heads: keys and values would be read by different query heads)


RULES = Rules()


def follow(
    style: Style,
    *,
    calls: tuple[int, ...] = (20, 1, 1, 5, 1, 1, 1),
    lowering: str = "eager",
    padded: str = "left",
    rules: Rules = RULES,
    batch: int = 3,
) -> None:
    """A conversation of several calls, with every cache compared; the layer must have been rewritten."""
    trio = Trio(register(style), rules, rows=batch, lowering=lowering)
    real = padding("none" if style.mask == "none" else padded, batch, 20)
    trio.run(tokens(batch, sum(calls)), list(calls), real)
    assert len(report(trio.model).rewritten) == 1, str(report(trio.model))
    trio.check_handles(1)


@pytest.mark.parametrize("style", every_choice(), ids=str)
@torch.no_grad()
def test_each_choice(style):
    follow(style, calls=(20, *[1] * 7))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("product", ["bmm", "grouped einsum"])
@torch.no_grad()
def test_calls_of_several_tokens(product, cache):
    follow(Style(product=product, cache=cache))


@pytest.mark.parametrize("product", ["bmm", "grouped einsum", "grouped matmul"])
@torch.no_grad()
def test_one_sequence(product):
    """An axis of size one can be lost in views."""
    follow(Style(product=product), batch=1)


@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_generated_tokens_left_whole(cache):
    follow(Style(product="bmm", cache=cache), rules=Rules(prune_generated=False))


@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(style=STYLES, side=st.sampled_from(["none", "left", "right"]))
@torch.no_grad()
def test_choices_together(style, side):
    torch._dynamo.reset()
    follow(style, padded=side, rules=Rules(0.75, recent=3, observe=5))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(style=STYLES, side=st.sampled_from(["none", "left", "right"]), ratio=st.sampled_from([0.0, 0.3, 0.75]))
@torch.no_grad()
def test_more_choices_together(style, side, ratio):
    torch._dynamo.reset()
    follow(style, padded=side, rules=Rules(ratio, recent=3, observe=5))


INDUCTOR = [
    pytest.param(Style(product="bmm", mask="masked_fill"), id="growing"),
    pytest.param(Style(layout="bshd", extra="sink", cache="fixed"), id="fixed", marks=pytest.mark.slow),
    pytest.param(Style(extra="stock, bias of the values"), id="values read elsewhere", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("style", INDUCTOR)
@torch.no_grad()
def test_inductor(style):
    follow(style, calls=(20, 1, 1, 1), lowering="inductor")
