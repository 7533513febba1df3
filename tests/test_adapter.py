"""The changes of wrapping to Hugging Face's ``generate``, and their limits."""

import copy
import pickle

import pytest
import torch
from oracle import CACHE
from tiny import tiny_llama
from torch import nn
from transformers import CompileConfig, DynamicCache, StaticCache

from think_compile import adapter, restore, think_compile

IDS = torch.arange(2, 12)[None]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The adapter takes the model's device for a GPU."""
    monkeypatch.setattr(adapter, "_on_gpu", lambda model: True)


def generated(model, **options):
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **options)
    return getattr(out, CACHE)


def wrapped(**options):
    ratio = None if "keys" in options else 0.5
    return think_compile(tiny_llama(), ratio, lowering="eager", **options)


def test_a_static_cache_of_a_round_size_on_a_gpu(on_a_gpu):
    cache = generated(wrapped())
    assert isinstance(cache, StaticCache)
    assert cache.layers[0].keys.shape[2] == adapter.SMALLEST


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_who_chooses_otherwise_gets_that(on_a_gpu, options):
    options = {"do_sample": False} | options
    out = wrapped().generate(IDS, max_new_tokens=3, return_dict_in_generate=True, **options)
    assert isinstance(getattr(out, CACHE), DynamicCache)


def test_a_cache_that_is_given_is_used(on_a_gpu):
    model = wrapped()
    cache = DynamicCache(config=model.config)
    assert generated(model, **{CACHE: cache}) is cache


@pytest.mark.parametrize(
    "options", [{"static_cache": False}, {"sliding": True}], ids=lambda options: next(iter(options))
)
def test_it_can_be_turned_off(on_a_gpu, options):
    assert isinstance(generated(wrapped(**options)), DynamicCache)


def test_a_growing_cache_on_a_cpu():
    assert isinstance(generated(wrapped()), DynamicCache)


def test_the_user_s_own_settings_stay_as_they_are(on_a_gpu):
    model = wrapped()
    generated(model)
    assert model.generation_config.cache_implementation is None


def test_other_models_and_restored_ones_are_left_alone(on_a_gpu):
    model = wrapped()
    assert isinstance(generated(tiny_llama()), DynamicCache)
    assert isinstance(generated(restore(model)), DynamicCache)
    static = generated(model, cache_implementation="static")
    assert static.layers[0].keys.shape[2] < adapter.SMALLEST


def files(model, folder):
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_saved_is_what_was_saved_before(tmp_path):
    model = tiny_llama()
    before = files(model, tmp_path / "before")
    think_compile(model, 0.5, lowering="eager")
    assert files(model, tmp_path / "wrapped") == before
    settings = copy.deepcopy(model).generation_config, pickle.loads(pickle.dumps(model)).generation_config
    assert not any(one.disable_compile for one in settings)
    assert files(restore(model), tmp_path / "restored") == before


class Compiled(Exception):
    """generate compiles the model's call."""


def test_generate_does_not_compile_the_call_again(monkeypatch):
    def compiled(*args):
        raise Compiled

    model, everywhere = wrapped(), CompileConfig()
    everywhere._compile_all_devices = True
    monkeypatch.setattr(type(model), "get_compiled_call", compiled)
    settings = {"cache_implementation": "static", "compile_config": everywhere}
    assert isinstance(generated(model, **settings), StaticCache)
    for other in (copy.deepcopy(model), restore(model)):
        with pytest.raises(Compiled):
            generated(other, **settings)


def test_copies_and_pickles_of_a_wrapped_model():
    model = wrapped()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(generated(other), DynamicCache)


def test_a_static_cache_on_a_cpu_keeps_its_size():
    cache = generated(wrapped(), cache_implementation="static")
    assert cache.layers[0].keys.shape[2] < adapter.SMALLEST


def test_models_that_keep_latents_keep_their_caches(on_a_gpu):
    model = wrapped()
    model.config.kv_lora_rank = 16
    assert isinstance(generated(model), DynamicCache)


def test_latents_in_codes_get_a_static_cache(on_a_gpu):
    model = wrapped(keys=8, values=8, decode=True)
    model.config.kv_lora_rank = 16
    assert isinstance(generated(model), StaticCache)
    model.config.index_topk = 4
    assert isinstance(generated(model), DynamicCache)


def test_a_stage_of_a_pipeline_gets_the_cache_that_grows(on_a_gpu):
    model = wrapped()
    model._pp_stage = object()
    assert isinstance(generated(model), DynamicCache)


def test_a_model_without_its_first_layer_gets_the_cache_that_grows(on_a_gpu):
    model = wrapped()
    model.model.layers[0] = First()
    assert isinstance(generated(model), DynamicCache)


class First(nn.Identity):
    """Stands for a layer that runs in another process."""

    def forward(self, x, *args, **kwargs):
        return x


def test_sizes_are_few_and_not_much_larger():
    sizes = [adapter.rounded(tokens) for tokens in range(1, 40_000)]
    assert all(tokens <= size for tokens, size in enumerate(sizes, 1))
    assert all(size <= max(adapter.SMALLEST, tokens * 1.15 + adapter.SMALLEST) for tokens, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 60
