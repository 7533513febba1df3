"""Caches that attention does not read as they are stored: codes decoded on read, for every latent of the zoo.

The compiled model runs first. The plain model then gets, before each call, the caches that the compiled model would
have read: only rounding may differ.
"""

import copy
import warnings

import architectures
import pytest
import torch
from coverage import cannot_run
from oracle import worst
from trial import Run, before_each_call, cache_layers, generate, runs

from think_compile import Report, ThinkWarning, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.passes.refusal import Reason

RULES = {"keys": 8, "values": 4, "recent": 4, "group": 8, "sinks": 2, "decode": True, "lowering": "eager"}
LATENT = [
    *("deepseek_v3", "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v32", "dots3_note", "dots3_note_text"),
    *("glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
]
FEW = LATENT[:1]


def decoded(cache) -> dict:
    """Copies of the compressed tensors, dense."""
    layers = cache_layers(cache)
    sides = [(i, name, getattr(layer, name, None)) for i, layer in enumerate(layers) for name in ("keys", "values")]
    return {(i, name): x.dense().clone() for i, name, x in sides if isinstance(x, Handle) and not x.is_dense}


def compare(model, static: bool) -> tuple[Run, Run, Report]:
    """Generations: compiled, and plain on the same caches."""
    torch._dynamo.reset()
    ours, seen = think_compile(copy.deepcopy(model), **RULES), []
    with before_each_call(ours, lambda cache: seen.append(decoded(cache))):
        got = generate(ours, static)
    calls = iter(seen)

    def put(cache):
        for (i, name), x in next(calls).items():
            getattr(cache_layers(cache)[i], name).copy_(x)

    with before_each_call(model, put):
        same = generate(model, static)
    assert any(seen), "nothing was compressed"
    return got, same, report(ours)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.zoo) for name in LATENT])
@torch.no_grad()
def test_latents_are_stored_in_codes(name):
    what = next((a for a in architectures.causal() if a.name == name), None)
    if what is None or (reason := cannot_run(what)):
        pytest.skip("not in this transformers" if what is None else reason)
    model = what.build()
    plain = generate(copy.deepcopy(model))
    for static in (False, True) if runs(model, True) else (False,):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ThinkWarning)
            got, same, found = compare(copy.deepcopy(model), static)
        assert {record.reason for record in found.refused} <= {Reason.BOUNDED}, str(found)
        assert any("decoded on read" in record.detail for record in found.rewritten)
        scale = max(1.0, same.logits.abs().max().item())
        assert worst(got.logits, same.logits) <= 2e-5 * scale
        assert worst(got.logits, plain.logits) > 2e-5 * scale or static, "nothing was lost: was it compressed?"
