"""The public API: arguments, wrapping and undoing it, warnings, gradients, internal failures."""

import copy
import dataclasses
import gc
import json
import operator
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from compare import tokens
from models import BufferDecoder, Decoder, PastDecoder, TuplePast, build, own, randomize, session
from oracle import CACHE
from torch import nn

import think_compile as tc
from think_compile import NothingRewritten, ThinkConfig, ThinkWarning, explain, report, restore, think_compile
from think_compile.cache.handle import Handle
from think_compile.runtime.frames import _limits

SMALL = {"recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}


def wrapped(name="tuple_cat", **options):
    return think_compile(build(name), **{**SMALL, **options})


def talk(name, model, ids, calls):
    conversation = session(name, model)
    with torch.no_grad():
        return [conversation.step(part) for part in ids.split(calls, dim=1)], conversation


def caught(f):
    """The think_compile warnings of a call."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        f()
    return [w for w in seen if issubclass(w.category, ThinkWarning)]


# ------------------------------------------------------------------ bad input

BAD = [
    ({"ratio": 1}, ValueError),
    ({"ratio": 1.0}, ValueError),
    ({"ratio": -0.1}, ValueError),
    ({"ratio": 2}, ValueError),
    ({"ratio": float("nan")}, ValueError),
    ({"ratio": float("inf")}, ValueError),
    ({"ratio": "0.5"}, TypeError),
    ({"ratio": True}, TypeError),
    ({"ratio": torch.tensor(0.5)}, TypeError),
    ({"ratio": 1j}, TypeError),
    ({"recent": -1}, ValueError),
    ({"recent": 3.0}, TypeError),
    ({"recent": True}, TypeError),
    ({"observe": 0}, ValueError),
    ({"observe": -3}, ValueError),
    ({"observe": "32"}, TypeError),
    ({"channel_multiple": 0}, ValueError),
    ({"channel_multiple": 1.5}, TypeError),
    ({"prune_generated": 1}, TypeError),
    ({"sliding": "yes"}, TypeError),
    ({"strict": "yes"}, TypeError),
    ({"lowering": "tvm"}, ValueError),
    ({"lowering": None}, (TypeError, ValueError)),
    ({"no_such_option": 1}, TypeError),
    ({"lowering": "eager", "max_autotune": True}, ValueError),
]


@pytest.mark.parametrize("options,error", BAD, ids=lambda value: str(value)[:50])
def test_bad_arguments(options, error):
    model = own("tuple_cat")
    with pytest.raises(error) as raised:
        think_compile(model, **options)
    assert next(iter(options)) in str(raised.value) or len(options) > 1
    think_compile(model, lowering="eager")  # a failed attempt leaves nothing behind


@pytest.mark.parametrize("thing", [None, "gpt2", len, nn.Linear, lambda x: x, 5])
def test_not_a_module(thing):
    for function in (think_compile, report, restore):
        with pytest.raises(TypeError, match="Module"):
            function(thing)


def test_explain_of_no_module():
    with pytest.raises(TypeError):
        explain("gpt2", {})


def test_already_wrapped():
    model = wrapped()
    with pytest.raises(ValueError, match="restore"):
        think_compile(model, 0.5)
    with pytest.raises(TypeError):
        think_compile(model, "half")


def test_compiled_by_someone_else():
    model = own("tuple_cat")
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        think_compile(model)


def test_not_wrapped():
    for function in (report, restore):
        with pytest.raises(ValueError, match="not wrapped"):
            function(own("tuple_cat"))


# ------------------------------------------------------------------ the configuration


def test_configuration_is_frozen_and_complete():
    config = ThinkConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ratio = 0.1
    with pytest.raises(TypeError):
        config.inductor_options["max_autotune"] = True
    given = {"max_autotune": False}
    config = ThinkConfig(inductor_options=given)
    given["max_autotune"] = True
    assert config.inductor_options["max_autotune"] is False
    assert ThinkConfig() == ThinkConfig(0.5) != ThinkConfig(0.4)


CHANGES = {
    "set": lambda options: options.__setitem__("max_autotune", True),
    "delete": lambda options: options.__delitem__("max_autotune"),
    "or": lambda options: operator.ior(options, {"max_autotune": True}),
    "update": lambda options: options.update(max_autotune=True),
    "setdefault": lambda options: options.setdefault("epilogue_fusion", False),
    "pop": lambda options: options.pop("max_autotune"),
    "popitem": lambda options: options.popitem(),
    "clear": lambda options: options.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_options_of_a_configuration_do_not_change(change):
    config = ThinkConfig(inductor_options={"max_autotune": False})
    before = hash(config)
    for one in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        with pytest.raises(TypeError, match="do not change"):
            change(one.inductor_options)
        assert one.inductor_options == {"max_autotune": False} and hash(one) == before
    assert json.loads(json.dumps(dataclasses.asdict(config)))["inductor_options"] == {"max_autotune": False}


@pytest.mark.parametrize("name", ["max-autotune", "max_autotune", "triton.cudagraphs", "triton.autotune-pointwise"])
def test_inductor_knows_the_options_that_are_taken(name):
    options = ThinkConfig(inductor_options={name: False}).inductor_options
    with torch._inductor.config.patch(dict(options)):
        assert torch._inductor.config.get_config_copy()[name.replace("-", "_")] is False


def test_an_option_given_twice():
    with pytest.raises(TypeError, match=r"'max_autotune'.*twice"):
        ThinkConfig(inductor_options={"max-autotune": True, "max_autotune": False})


@pytest.mark.parametrize("way", [hash, dataclasses.asdict, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_configuration_is_a_value(way):
    way(ThinkConfig(inductor_options={"max_autotune": False}))


def test_report_is_a_value():
    model = wrapped()
    talk("tuple_cat", model, tokens(1, 6), [6])
    found = report(model)
    assert copy.deepcopy(found) == found
    assert pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 64, 80, 128])
@pytest.mark.parametrize("ratio", [0, 0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("multiple", [1, 16, 1000])
def test_kept_channels(dim, ratio, multiple):
    kept = ThinkConfig(ratio, channel_multiple=multiple).kept_channels(dim)
    least = dim - int(dim * ratio)
    assert 1 <= least <= kept <= dim
    assert kept == dim or kept % multiple == 0
    assert kept < least + multiple


# ------------------------------------------------------------------ wrapping and undoing it


def test_the_same_object_is_returned():
    model = own("tuple_cat")
    assert think_compile(model, **SMALL) is model
    assert isinstance(model, Decoder)
    assert restore(model) is model


def test_restore_gives_the_plain_model_back():
    model, plain = wrapped(), own("tuple_cat")
    ids = tokens(2, 12)
    _, conversation = talk("tuple_cat", model, ids, [9, 1, 1, 1])
    assert isinstance(conversation.past[0][0], Handle)
    restore(model)
    ours, conversation = talk("tuple_cat", model, ids, [9, 1, 1, 1])
    expected, _ = talk("tuple_cat", plain, ids, [9, 1, 1, 1])
    assert not isinstance(conversation.past[0][0], Handle)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    with pytest.raises(ValueError, match="not wrapped"):
        restore(model)


def test_restore_then_wrap_again():
    model, ids = wrapped(ratio=0.9), tokens(2, 14)
    talk("tuple_cat", model, ids, [9, 1, 4])
    think_compile(restore(model), ratio=0.5, **SMALL)
    again, _ = talk("tuple_cat", model, ids, [9, 1, 4])
    fresh, _ = talk("tuple_cat", wrapped(ratio=0.5), ids, [9, 1, 4])
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))
    assert report(model).config.ratio == 0.5
    assert len(report(model).rewritten) == 2


def test_a_cache_outlives_restore():
    """A cache made while wrapped stays packed and goes on."""
    model, ids = wrapped(), tokens(1, 12)
    _, conversation = talk("tuple_cat", model, ids[:, :9], [9])
    restore(model)
    with torch.no_grad():
        got = conversation.step(ids[:, 9:])
    assert got.isfinite().all()
    assert all(isinstance(t, Handle) and t.shape[2] == 12 for layer in conversation.past for t in layer)


def test_a_deep_copy_is_plain_and_works():
    model, ids = wrapped(), tokens(2, 12)
    before, _ = talk("tuple_cat", model, ids, [9, 1, 2])
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="not wrapped"):
        report(twin)
    ours, conversation = talk("tuple_cat", twin, ids, [9, 1, 2])
    expected, _ = talk("tuple_cat", own("tuple_cat"), ids, [9, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert not isinstance(conversation.past[0][0], Handle)
    twin.embed.weight.data.zero_()  # the copy's weights are its own
    after, _ = talk("tuple_cat", model, ids, [9, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    think_compile(twin, **SMALL)


def test_a_deep_copy_of_a_model_with_handles_in_its_buffers():
    model, ids = wrapped("buffer_index_put"), tokens(3, 12)
    _, conversation = talk("buffer_index_put", model, ids[:, :9], [9])
    assert isinstance(model.layers[0].attention.cache_k, Handle)
    twin = copy.deepcopy(model)
    kept = twin.layers[0].attention.cache_k
    before = kept.dense().clone()
    with torch.no_grad():
        conversation.step(ids[:, 9:])
    assert torch.equal(kept.dense(), before)


def test_a_wrapped_model_can_be_saved(tmp_path):
    model = wrapped()
    talk("tuple_cat", model, tokens(1, 6), [6])
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    talk("tuple_cat", again, tokens(1, 6), [6])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))


def test_a_dropped_model_is_freed():
    model = wrapped()
    talk("tuple_cat", model, tokens(1, 8), [6, 1, 1])
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------ reports


def test_report_before_any_call():
    found = report(wrapped())
    assert (found.rewritten, found.refused, found.graphs) == ((), (), 0)
    assert (found.stored_bytes, found.dense_bytes) == (0, 0)
    assert str(found)


def test_report_counts_the_live_caches():
    model = wrapped()
    _, conversation = talk("tuple_cat", model, tokens(2, 40), [38, 1, 1])
    found = report(model)
    assert len(found.rewritten) == 2
    assert found.dense_key_bytes == found.dense_value_bytes == 2 * 2 * 2 * 40 * 32 * 4
    stores = [t.store for layer in conversation.past for t in layer]
    assert found.stored_bytes == sum(t.nbytes for s in stores for t in s.tensors())
    assert "channels kept" in str(found)
    del conversation, stores
    gc.collect()
    assert report(model).stored_bytes == 0


@pytest.mark.parametrize("multiple", [33, 1000])
def test_channel_multiple_above_the_head_size(multiple):
    model, ids = wrapped(channel_multiple=multiple), tokens(2, 14)
    ours, _ = talk("tuple_cat", model, ids, [9, 1, 4])
    expected, _ = talk("tuple_cat", own("tuple_cat"), ids, [9, 1, 4])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    found = report(model)
    assert all(record.kept == record.head_dim == 32 for record in found.rewritten)
    assert f"channel_multiple={multiple}" in str(found)


def test_explain_leaves_the_model_unwrapped():
    model = build("llama")
    settings = model.generation_config.to_dict()
    found = explain(model, {"input_ids": tokens(1, 6)}, ratio=0.3, channel_multiple=1)
    assert len(found.rewritten) == 2
    assert found.config.ratio == 0.3
    assert model._compiled_call_impl is None
    assert model.generation_config.to_dict() == settings
    with pytest.raises(ValueError, match="not wrapped"):
        report(model)
    assert not any(isinstance(layer.keys, Handle) for layer in model(tokens(1, 6))[CACHE].layers)


def test_explain_of_a_buffer_model_leaves_its_buffers():
    model = own("buffer_index_copy")
    explain(model, (tokens(3, 6), torch.arange(6)))
    assert not isinstance(model.layers[0].attention.cache_k, Handle)


def test_explain_of_a_wrapped_model_uses_its_settings():
    model = wrapped(ratio=0.75)
    found = explain(model, (tokens(1, 6),))
    assert found.config.ratio == 0.75
    assert report(model).graphs == 0


def test_explain_refusals_even_of_a_strict_model():
    """An explanation reports the reason; it must not raise it."""
    found = explain(Sums(), (torch.randn(1, 3, 8),), strict=True, lowering="eager")
    assert found.refused


@pytest.mark.parametrize("options,error", BAD[:6], ids=lambda value: str(value)[:50])
def test_explain_checks_its_arguments(options, error):
    with pytest.raises(error):
        explain(own("tuple_cat"), (tokens(1, 4),), **options)


def test_what_the_package_offers():
    assert all(hasattr(tc, name) for name in tc.__all__)


# ------------------------------------------------------------------ nothing to rewrite


class Sums(nn.Module):
    """Attention that keeps no cache."""

    def forward(self, x):
        q = torch.unflatten(x, -1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q * 3)


class SharedCache(nn.Module):
    """Something else besides the attention reads the keys."""

    def forward(self, x, past=None):
        q, k, v = (torch.unflatten(x, -1, (2, 4)).transpose(1, 2) * n for n in (1, 2, 3))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        return F.scaled_dot_product_attention(q, k, v) + k.mean(), (k, v)


@pytest.mark.parametrize("module", [Sums, SharedCache])
def test_nothing_rewritten_warns_with_the_reason(module):
    model, x = think_compile(module(), lowering="eager"), torch.randn(1, 3, 8)
    with torch.no_grad():
        first = caught(lambda: model(x))
        assert len(first) == 1
        assert caught(lambda: model(x)) == []
    text = str(first[0].message)
    reason = report(model).refused[0].reason
    assert reason.value in text
    assert "nothing was rewritten" in text


@pytest.mark.parametrize("module", [Sums, SharedCache])
def test_strict_raises_nothing_rewritten(module):
    model = think_compile(module(), lowering="eager", strict=True)
    with pytest.raises(NothingRewritten) as raised, torch.no_grad():
        model(torch.randn(1, 3, 8))
    assert type(raised.value) is NothingRewritten
    assert report(model).refused[0].reason.value in str(raised.value)


def test_a_model_without_attention_warns_too():
    """A request to prune a model with nothing to prune."""
    model = think_compile(nn.Sequential(nn.Linear(4, 4)), lowering="eager")
    with torch.no_grad():
        assert len(caught(lambda: model(torch.randn(2, 4)))) == 1


def test_a_model_without_attention_raises_when_strict():
    model = think_compile(nn.Sequential(nn.Linear(4, 4)), lowering="eager", strict=True)
    with pytest.raises(NothingRewritten), torch.no_grad():
        model(torch.randn(2, 4))


def test_strict_is_content_when_all_is_rewritten():
    ids = tokens(3, 12)
    for name in ("tuple_cat", "buffer_index_put", "llama"):
        talk(name, wrapped(name, strict=True), ids, [9, 1, 2])


def test_nothing_warns_when_all_is_well():
    for name in ("tuple_cat", "buffer_index_copy", "llama"):
        model = wrapped(name)
        assert caught(lambda: talk(name, model, tokens(3, 12), [9, 1, 1, 1])) == []  # noqa: B023


# ------------------------------------------------------------------ gradients


def test_training_is_exact_with_one_warning():
    plain = own("tuple_cat").train()
    model, ids = think_compile(copy.deepcopy(plain), **SMALL), tokens(2, 10)
    expected = plain(ids)[0]
    expected.square().mean().backward()

    def steps():
        for _ in range(2):
            model.zero_grad()
            out, past = model(ids)
            assert torch.equal(out, expected)
            assert not any(isinstance(t, Handle) for layer in past for t in layer)
            out.square().mean().backward()

    seen = caught(steps)
    assert len(seen) == 1
    assert "gradient" in str(seen[0].message)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    talk("tuple_cat", model, tokens(2, 12), [9, 1, 2])
    assert len(report(model).rewritten) == 2


def test_gradients_switched_on_over_a_pruned_cache():
    """A packed past in a call with gradients: right numbers, and gradients of the weights."""
    model, ids = wrapped(), tokens(1, 12)
    _, conversation = talk("tuple_cat", model, ids[:, :9], [9])
    dense = tuple(tuple(t.dense() for t in layer) for layer in conversation.past)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(ids[:, 9:10], conversation.past)[0]
    out.sum().backward()
    assert model.head.weight.grad is not None
    torch.testing.assert_close(out, own("tuple_cat")(ids[:, 9:10], dense)[0])


# ------------------------------------------------------------------ failures inside


PLACES = {
    "normalize": "think_compile.backend.normalize",
    "attention": "think_compile.backend.find_attention",
    "kv_cache": "think_compile.backend.find_caches",
    "rewrite": "think_compile.runtime.graph.rewrite",
    "program": "think_compile.runtime.graph.Program",
    "lowering": "think_compile.runtime.lower.Eager.__call__",
    "later call": "think_compile.formats.base.CacheFormat.step",
    "first call": "think_compile.formats.base.CacheFormat.first_call",
    "packed inputs": "think_compile.runtime.program.PackedInputs.of",
    "handles": "think_compile.runtime.program.handle_for",
}


def explode(*args, **kwargs):
    raise ZeroDivisionError("made up")


OFTEN = {"normalize", "rewrite", "later call", "handles"}  # the others fail in the same two places in the backend


@pytest.mark.parametrize("place", [p if p in OFTEN else pytest.param(p, marks=pytest.mark.slow) for p in PLACES])
def test_an_internal_failure_costs_no_tokens(place, monkeypatch):
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")
    monkeypatch.setattr(PLACES[place], explode)
    model, ids = wrapped(ratio=0.0), tokens(2, 12)
    expected, _ = talk("tuple_cat", own("tuple_cat"), ids, [9, 1, 2])
    got = []
    seen = caught(lambda: got.extend(talk("tuple_cat", model, ids, [9, 1, 2])[0]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert seen
    assert "made up" in str(seen[0].message)
    assert "report" in str(seen[0].message)


@pytest.mark.parametrize(("place", "how"), [*((place, "strict") for place in PLACES), ("rewrite", "variable")])
def test_an_internal_failure_raises_when_asked_to(place, how, monkeypatch):
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "0" if how == "variable" else "1")
    monkeypatch.setattr(PLACES[place], explode)
    model = wrapped(strict=how == "strict")
    with pytest.raises(Exception, match="made up"):
        talk("tuple_cat", model, tokens(2, 12), [9, 1, 2])


def test_a_failure_in_the_middle_of_a_conversation(monkeypatch):
    """The decode graph fails while the past is pruned: the model's own operations go on with the pruned past."""
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")
    ids = tokens(2, 14)
    expected, _ = talk("tuple_cat", wrapped(), ids, [9, 1, 1, 3])
    _, conversation = talk("tuple_cat", wrapped(), ids[:, :9], [9])
    monkeypatch.setattr("think_compile.backend.find_caches", explode)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for part, logits in zip(ids[:, 9:].split([1, 1, 3], dim=1), expected[1:], strict=True):
            torch.testing.assert_close(conversation.step(part), logits, rtol=1e-4, atol=1e-4)


TRACER = "torch._dynamo.variables.builder.wrap_to_fake_tensor_and_record"


def test_a_failure_of_the_tracer_costs_no_tokens(monkeypatch):
    """Dynamo fails, before our passes see a graph and in the middle of a conversation: the model's code goes on."""
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")
    ids = tokens(2, 14)
    expected, _ = talk("tuple_cat", wrapped(), ids, [9, 1, 1, 3])
    _, conversation = talk("tuple_cat", wrapped(), ids[:, :9], [9])
    monkeypatch.setattr(TRACER, explode)
    with torch.no_grad(), pytest.warns(ThinkWarning, match="made up"):
        for part, logits in zip(ids[:, 9:].split([1, 1, 3], dim=1), expected[1:], strict=True):
            torch.testing.assert_close(conversation.step(part), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["variable", "strict"])
def test_a_failure_of_the_tracer_raises_when_asked_to(how, monkeypatch):
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "0" if how == "variable" else "1")
    monkeypatch.setattr(TRACER, explode)
    with pytest.raises(Exception, match="made up"):
        talk("tuple_cat", wrapped(strict=how == "strict"), tokens(2, 12), [9, 1, 2])


# ------------------------------------------------------------------ models with traps


class FunctionalFixed(nn.Module):
    """A cache of fixed size that is never written in place: each call returns a new one."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x, pos, past=None):
        q, k, v = torch.unflatten(self.project(x), -1, (6, 8)).transpose(1, 2).split(2, 1)
        if past is None:
            past = [x.new_zeros(x.shape[0], 2, 24, 8) for _ in range(2)]
        k, v = past[0].index_copy(2, pos, k), past[1].index_copy(2, pos, v)
        mask = torch.arange(24, device=pos.device) <= pos[:, None]
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return out, (k, v)


@torch.no_grad()
def test_a_functional_fixed_cache_keeps_its_past():
    model = think_compile(randomize(FunctionalFixed()), ratio=0.5, **SMALL)
    _, old = model(torch.randn(1, 9, 16), torch.arange(9))
    before = [t.dense().clone() if isinstance(t, Handle) else t.clone() for t in old]
    x, other = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    first, _ = model(x, torch.tensor([9]), old)
    model(other, torch.tensor([9]), old)
    after = [t.dense() if isinstance(t, Handle) else t for t in old]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "the past was written to"
    assert torch.equal(model(x, torch.tensor([9]), old)[0], first)


class LowPrecisionCache(nn.Module):
    """Attends in fp32, keeps bf16."""

    def forward(self, x, past=None):
        q, k, v = (torch.unflatten(x, -1, (2, 8)).transpose(1, 2) * n for n in (1, 2, 3))
        if past is not None:
            k, v = torch.cat([past[0].float(), k], 2), torch.cat([past[1].float(), v], 2)
        return F.scaled_dot_product_attention(q, k, v), (k.bfloat16(), v.bfloat16())


@torch.no_grad()
def test_a_cache_keeps_the_dtype_the_model_gave_it():
    plain = LowPrecisionCache()
    model = think_compile(copy.deepcopy(plain), ratio=0.0, **SMALL)
    pasts = [None, None]
    for n in (7, 1, 1):
        x = torch.randn(1, n, 16)
        outs = [m(x, past) for m, past in zip((model, plain), pasts, strict=True)]
        torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-2, atol=1e-2)
        pasts = [past for _, past in outs]
        assert [t.dtype for t in pasts[0]] == [t.dtype for t in pasts[1]]


@torch.no_grad()
def test_growth_within_inference_mode():
    """More new tokens than the store's capacity, all in inference mode."""
    model, ids = wrapped(ratio=0.0), tokens(2, 60)
    expected, _ = talk("tuple_cat", own("tuple_cat"), ids, [9, *[1] * 51])
    conversation = session("tuple_cat", model)
    with torch.inference_mode():
        for part, logits in zip(ids.split([9, *[1] * 51], dim=1), expected, strict=True):
            torch.testing.assert_close(conversation.step(part), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reorder_within_inference_mode():
    model, ids = wrapped(), tokens(2, 14)
    conversation = session("tuple_cat", model)
    with torch.inference_mode():
        conversation.step(ids[:, :9])
        rows = torch.tensor([1, 0])
        conversation.past = tuple(tuple(t.index_select(0, rows) for t in layer) for layer in conversation.past)
        conversation.step(ids[:, 9:10])
    conversation.step(ids[:, 10:11])


@torch.no_grad()
def test_generated_tokens_stay_whole_without_prune_generated():
    """Long enough to fill the ring more than once."""
    model, plain = wrapped(prune_generated=False, ratio=0.5), own("tuple_cat")
    assert isinstance(plain, PastDecoder) and not isinstance(plain, BufferDecoder)
    assert isinstance(plain.layers[0].attention, TuplePast)
    _, conversation = talk("tuple_cat", model, tokens(1, 49), [9, *[1] * 40])
    for keys, _ in conversation.past:
        zeros = (keys.dense() == 0).any(-1).any(1)[0]
        assert zeros.nonzero().flatten().tolist() == list(range(9 - 4))


@torch.no_grad()
def test_looking_at_a_cache_does_not_change_what_follows():
    model, ids = wrapped(), tokens(2, 24)
    seen, unseen = session("tuple_cat", model), session("tuple_cat", model)
    for part in ids.split([9, *[1] * 15], dim=1):
        a, b = seen.step(part), unseen.step(part)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        seen.past[0][0][:, :, 3].sum()


def test_layers_that_graph_breaks_part_may_have_graphs_of_their_own():
    """They share one code object but have different weights: torch counts their graphs against its limit."""
    blocks = [torch.nn.TransformerEncoderLayer(4, 1, 4) for _ in range(40)]
    assert _limits(torch.nn.Sequential(*blocks)) == (320, 320)
    assert _limits(blocks[0]) == (64, 256)
