"""Libraries that quantize weights or caches: compressed layers, and correct reasons for the others."""

import copy
import warnings

import pytest
import torch
from compare import Rules, causal_mask, tokens
from models import hugging_face, own
from torch import nn

from think_compile import ThinkWarning, report, think_compile
from think_compile.passes.refusal import Reason

SMALL = vars(Rules())


def calls(model, ids):
    """Logits of a prompt and two later calls."""
    first, past = model(ids[:, :12], None, causal_mask(0, 12, 12, None))
    second, past = model(ids[:, 12:13], past, causal_mask(12, 13, 13, None))
    return first, second, model(ids[:, 13:16], past, causal_mask(13, 16, 16, None))[0]


@torch.no_grad()
def test_weights_of_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    plain, quantized = own("tuple_cat"), own("tuple_cat")
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    for ours, theirs in zip(quantized.modules(), plain.modules(), strict=True):
        if isinstance(ours, nn.Linear):
            theirs.weight = nn.Parameter(ours.weight.dequantize())
    ids = tokens(1, 16)
    expected, got = (calls(think_compile(m, lowering="eager", **SMALL), ids) for m in (plain, quantized))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(report(quantized).rewritten) == 2 and not report(quantized).refused


def generated(model, ids, **options):
    """Tokens and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, **options)
    return out, " ".join(str(w.message) for w in caught if issubclass(w.category, ThinkWarning))


def in_8_bits(model):
    """The model with weights in bitsandbytes' form, except the head's."""
    library = pytest.importorskip("bitsandbytes")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            new = library.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
            new.weight = library.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, new)
    return model.to("cpu")


def test_weights_of_bitsandbytes_in_8_bits():
    """Each product sets its weight's memory anew."""
    plain = in_8_bits(hugging_face("llama", num_hidden_layers=1))
    ids = tokens(1, 24)
    expected, _ = generated(plain, ids)
    model = think_compile(plain, lowering="eager", **SMALL)
    got, warned = generated(model, ids)
    assert got.equal(expected)
    assert {record.reason for record in report(model).refused} == {Reason.NOT_FUNCTIONAL}, str(report(model))
    assert "set_" in warned and "internal failure" not in warned and "no attention" not in warned


def test_a_cache_quantized_by_quanto():
    """Its past is a quanto tensor, whose creation cannot be traced, and is joined from three parts."""
    pytest.importorskip("optimum.quanto")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    plain = hugging_face("llama", head_dim=64, hidden_size=128, num_hidden_layers=1)
    model = think_compile(copy.deepcopy(plain), lowering="eager", **SMALL)
    ids = tokens(1, 24)
    expected, _ = generated(plain, ids, **options)
    got, warned = generated(model, ids, **options)
    assert got.equal(expected) and not report(model).rewritten
    reasons = {record.reason for record in report(model).refused}
    assert reasons == {Reason.TENSOR_CLASS, Reason.UNKNOWN_ROOT}, str(report(model))
    assert Reason.TENSOR_CLASS.value in warned and "internal failure" not in warned
