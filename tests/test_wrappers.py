"""Modules around a model: the compiled module is the one that their ``generate`` calls."""

import copy

import pytest
import torch
from oracle import CACHE
from tiny import tiny_llama
from torch import nn
from transformers import StaticCache

from think_compile import adapter, explain, report, restore, think_compile
from think_compile.cache.handle import Handle

IDS = torch.arange(2, 42).view(2, 20)
RULES = {"recent": 4, "channel_multiple": 1, "lowering": "eager"}
LAYERS = "model.layers.0.self_attn", "model.layers.1.self_attn"


class Around(nn.Module):
    """Generates with the model inside, and has its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


class Handing(Around):
    """Its only ``generate`` is the model's."""

    generate = property(lambda self: self.inner.generate)


def generated(model, **options):
    return model.generate(
        input_ids=IDS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def assert_generates_as(expected, model):
    out = generated(model)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(out.logits, expected.logits)
    return out


def paths(found):
    return {record.layer for record in found.rewritten}


def compiled(model):
    return [part for part in model.modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize("kind", [Around, Handing])
def test_a_wrapper_generates_as_its_wrapped_model(kind):
    plain = tiny_llama()
    expected = generated(think_compile(copy.deepcopy(plain), 0.5, **RULES))
    model = think_compile(kind(copy.deepcopy(plain)), 0.5, **RULES)
    out = assert_generates_as(expected, model)
    assert isinstance(getattr(out, CACHE).layers[0].keys, Handle)
    assert paths(report(model)) == {f"inner.{path}" for path in LAYERS}
    assert report(model).stored_bytes > 0
    assert restore(model) is model and not compiled(model)
    assert_generates_as(generated(plain), model)


@torch.no_grad()
def test_a_wrapper_that_is_called_itself():
    model = think_compile(Around(tiny_llama()), 0.5, **RULES)
    generated(model)
    graphs = report(model).graphs
    assert isinstance(getattr(model(IDS), CACHE).layers[0].keys, Handle)
    assert report(model).graphs == graphs + 1
    assert paths(report(model)) == {f"inner.{path}" for path in LAYERS}
    assert paths(explain(model, {"input_ids": IDS})) == {f"inner.{path}" for path in LAYERS}


def test_a_model_inside_is_wrapped_or_compiled_once():
    model = think_compile(Around(tiny_llama()), 0.5, **RULES)
    with pytest.raises(ValueError, match="this model is wrapped by think_compile already"):
        think_compile(model.inner)
    restore(model.inner)
    assert not compiled(model)
    think_compile(model.inner, 0.5, **RULES)
    with pytest.raises(ValueError, match="the LlamaForCausalLM inside this model is wrapped by think_compile already"):
        think_compile(model)
    restore(model.inner).compile(backend="eager")
    with pytest.raises(ValueError, match="the LlamaForCausalLM inside this model is compiled already"):
        think_compile(model)


def test_a_model_inside_gets_its_cache_on_a_gpu(monkeypatch):
    monkeypatch.setattr(adapter, "_on_gpu", lambda model: True)
    model = think_compile(Around(tiny_llama()), 0.5, **RULES)
    assert isinstance(getattr(generated(model), CACHE), StaticCache)


def test_a_model_that_generates_itself_is_all_that_is_compiled():
    model = tiny_llama()
    model.assistant = tiny_llama()
    assert compiled(think_compile(model, 0.5, **RULES)) == [model]


def test_peft():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tiny_llama()
    plain = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    model = think_compile(copy.deepcopy(plain), 0.5, **RULES)
    assert_generates_as(generated(think_compile(copy.deepcopy(plain).get_base_model(), 0.5, **RULES)), model)
    with torch.no_grad():
        assert isinstance(getattr(model(IDS), CACHE).layers[0].keys, Handle)
    assert paths(report(model)) == {f"base_model.model.{path}" for path in LAYERS}
    with model.disable_adapter():
        assert_generates_as(generated(think_compile(base, 0.5, **RULES)), model)
    assert_generates_as(generated(plain), restore(model))
