"""Failed calls, with the fall-back of users: the plain model's error comes out, and the next call is as if they had not been."""

import copy
import warnings

import pytest
import torch
from compare import tokens
from models import build, own
from oracle import CACHE
from transformers import StaticCache

from think_compile import ThinkWarning, report, think_compile
from think_compile.handle import Handle
from think_compile.kernels import steps
from think_compile.runtime import CacheFull

SMALL = {"recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")


def wrapped(name="llama", **options):
    return think_compile(build(name), **{**SMALL, **options})


def ids_of(batch, length, seed=1):
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


GOOD = ids_of(2, 20)


def generate(model, ids=GOOD, n=8, **options):
    settings = {"max_new_tokens": n, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **(settings | options))


def past_of(model, rows):
    with torch.no_grad():
        return model(ids_of(rows, 12), use_cache=True)[CACHE]


def past_of_another(model):
    return past_of(build("llama", seed=3).float() if CACHE else None, 2)


def embedded(model, value):
    numbers = model.get_input_embeddings()(GOOD).detach().clone()
    numbers[0, 3] = value
    return model(inputs_embeds=numbers).logits


def behind_a_full_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(GOOD, **{CACHE: cache})
    for _ in range(8):
        out = model(ids_of(2, 1), **{CACHE: cache}).logits
    return out


def marks(*shape):
    return torch.ones(*shape, dtype=torch.long)


# Calls that users make by mistake. Some of them are fine, and all are to end as the plain model's do.
CALLS = {
    "nan in an embedding": lambda m: embedded(m, float("nan")),
    "inf in an embedding": lambda m: embedded(m, float("inf")),
    "empty prompt": lambda m: m(GOOD[:1, :0]).logits,
    "empty prompt, generate": lambda m: m.generate(GOOD[:1, :0], max_new_tokens=3),
    "batch 0": lambda m: m(GOOD[:0]).logits,
    "batch 0, generate": lambda m: m.generate(GOOD[:0], max_new_tokens=3),
    "longer than the model's limit": lambda m: m(ids_of(1, 300)).logits,
    "float ids": lambda m: m(GOOD.float()).logits,
    "int32 ids": lambda m: m(GOOD.int()).logits,
    "ids out of range": lambda m: m(GOOD + 1000).logits,
    "negative ids": lambda m: m(GOOD * 0 - 5).logits,
    "ids of one dimension": lambda m: m(GOOD[0]).logits,
    "ids of three dimensions": lambda m: m(GOOD[None]).logits,
    "mask of another length": lambda m: m(GOOD, attention_mask=marks(2, 7)).logits,
    "mask of another batch": lambda m: m(GOOD, attention_mask=marks(3, 20)).logits,
    "mask that hides all": lambda m: m(GOOD, attention_mask=0 * marks(2, 20)).logits,
    "a row of padding": lambda m: m.generate(
        GOOD, attention_mask=torch.stack([marks(20), 0 * marks(20)]), max_new_tokens=3, do_sample=False
    ),
    "list of ids": lambda m: m(GOOD.tolist()).logits,
    "no argument": lambda m: m().logits,
    "ids and embeddings": lambda m: m(GOOD, inputs_embeds=m.get_input_embeddings()(GOOD)).logits,
    "step with a cache of another batch": lambda m: m(ids_of(3, 1), **{CACHE: past_of(m, 2)}).logits,
    "step with a cache of other heads": lambda m: m(GOOD[:, :1], **{CACHE: past_of(build("qwen2"), 3)}).logits,
    "step with an id out of range": lambda m: m(GOOD[:, :1] + 1000, **{CACHE: past_of(m, 2)}).logits,
    "a string for a cache": lambda m: m(GOOD, **{CACHE: "cache"}).logits,
    "behind a full static cache": behind_a_full_cache,
    "unknown argument": lambda m: m(GOOD, no_such_argument=3).logits,
    "no new token": lambda m: m.generate(GOOD, max_new_tokens=0),
    "beams with an assistant": lambda m: m.generate(GOOD, num_beams=2, assistant_model=m, max_new_tokens=3),
}


def outcome(model, call):
    try:
        return type(call(model)), ""
    except Exception as error:
        return type(error), str(error).strip().splitlines()[0][:80]


def is_packed(out):
    return all(isinstance(layer.keys, Handle) and not layer.keys.is_dense for layer in out[CACHE].layers)


def assert_same(out, expected):
    assert torch.equal(out.sequences, expected.sequences)
    for ours, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_bad_call_ends_as_the_plain_models_and_changes_nothing(caplog):
    plain, model = build("llama"), wrapped()
    expected = generate(model)
    differ = {}
    for name, call in CALLS.items():
        graphs = report(model).graphs
        with warnings.catch_warnings():
            warnings.simplefilter("error", ThinkWarning)
            theirs, ours = outcome(plain, call), outcome(model, call)
        if ours != theirs:
            differ[name] = ours, theirs
        made = report(model).graphs
        good = generate(model)
        assert is_packed(good), f"after {name}"
        assert_same(good, expected)
        assert report(model).graphs == made, f"a good call is compiled again after {name}, {graphs}"
    error = differ.pop("behind a full static cache")  # ours says what to do
    assert error[0][0] is CacheFull and issubclass(CacheFull, error[1][0])
    assert not differ
    assert len(report(model).rewritten) == 2 and not report(model).refused
    assert not [record for record in caplog.records if record.name.startswith("torch") and record.levelno > 20]
