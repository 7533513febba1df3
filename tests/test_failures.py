"""Failed calls with the users' fall-back: the plain model's error is raised, and the call leaves no trace."""

import warnings

import pytest
import torch
from compare import tokens
from models import BufferDecoder, build, own, session
from oracle import CACHE
from torch._dynamo.variables import builder
from transformers import StaticCache

from think_compile import ThinkWarning, report, think_compile
from think_compile.cache.handle import Handle
from think_compile.formats import side
from think_compile.passes.refusal import Reason
from think_compile.runtime.program import CacheFull

SMALL = {"recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
    monkeypatch.setenv("THINK_COMPILE_FALLBACK", "1")


def wrapped(name="llama", **options):
    return think_compile(build(name), **{**SMALL, **options})


def talk(name, model, ids, calls):
    conversation = session(name, model)
    with torch.no_grad():
        return [conversation.step(part) for part in ids.split(calls, dim=1)], conversation


def ids_of(batch, length, seed=1):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randint(3, 60, (batch, length), generator=generator)


with torch.device("cpu"):
    GOOD = ids_of(2, 20)


def generate(model, ids=GOOD, n=8, **options):
    settings = {"max_new_tokens": n, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **(settings | options))


def past_of(model, rows):
    with torch.no_grad():
        return model(ids_of(rows, 12), use_cache=True)[CACHE]


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


# Mistaken calls by users. Some of them are valid, and all must end as in the plain model.
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


@pytest.mark.host  # ids out of range end a process on a GPU
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
    error = differ.pop("behind a full static cache")  # our message says what to do
    assert error[0][0] is CacheFull and issubclass(CacheFull, error[1][0])
    assert not differ
    assert len(report(model).rewritten) == 2 and not report(model).refused
    assert not [record for record in caplog.records if record.name.startswith("torch") and record.levelno > 20]


# ------------------------------------------------------------------ failures in the middle of a call


@pytest.fixture
def failing(monkeypatch):
    """``failing.at(error)``: appending to the ring of the second layer raises the error, once."""

    class Failing:
        plain, error, layer = staticmethod(side.advanced), None, 0

        def at(self, error):
            self.error, self.layer = error, 0

        def __call__(self, *args):
            self.layer += 1
            if self.error is not None and self.layer == 2:
                error, self.error = self.error, None
                raise error
            return self.plain(*args)

    fails = Failing()
    monkeypatch.setattr(side, "advanced", fails)
    return fails


NO_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


ERRORS = [KeyboardInterrupt(), torch.OutOfMemoryError("no memory"), MemoryError(), NO_MEMORY]


@pytest.mark.versions
@torch.no_grad()
def test_what_the_plain_graph_cannot_mend_comes_out_and_changes_nothing(failing):
    ids, model = tokens(2, 14), wrapped("tuple_cat")
    calls = [9, *[1] * 5]
    expected, _ = talk("tuple_cat", model, ids, calls)
    graphs, conversation = report(model).graphs, session("tuple_cat", model)
    errors = iter([None, *ERRORS, None])
    for part, logits in zip(ids.split(calls, dim=1), expected, strict=True):
        error = next(errors)
        if error is not None:
            failing.at(error)
            with warnings.catch_warnings(), pytest.raises(type(error)):
                warnings.simplefilter("error", ThinkWarning)
                conversation.call(part)
        torch.testing.assert_close(conversation.step(part), logits)
    assert report(model).graphs == graphs and len(report(model).rewritten) == 2


def test_the_report_tells_of_a_failure_of_ours(failing):
    ids = tokens(2, 14)
    model, plain = wrapped("tuple_cat", ratio=0.0), own("tuple_cat")
    _, conversation = talk("tuple_cat", model, ids[:, :10], [9, 1])
    assert len(report(model).rewritten) == 2
    failing.at(ZeroDivisionError("made up"))
    with torch.no_grad(), pytest.warns(ThinkWarning, match="made up") as seen:
        got = [conversation.step(part) for part in ids[:, 10:].split(1, dim=1)]
    assert len([w for w in seen if issubclass(w.category, ThinkWarning)]) == 1
    expected, _ = talk("tuple_cat", plain, ids, [9, 1, 1, 1, 1, 1])
    for ours, theirs in zip(got, expected[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found = report(model)
    assert not found.rewritten and len(found.refused) == 2
    assert all(record.reason is Reason.FAILED and "made up" in record.detail for record in found.refused)
    talk("tuple_cat", model, tokens(3, 9), [9])  # another kind of call is compressed; the report keeps the failure
    assert len(report(model).refused) == 2


@pytest.mark.host
def test_an_error_of_the_model_after_its_layers_leaves_fixed_caches_packed():
    """The plain graph runs to find out whose error it is, and its writes make the buffers dense."""

    class Checked(BufferDecoder):
        def forward(self, ids, pos, mask=None):
            logits = super().forward(ids, pos, mask)
            torch._assert_async((ids < 61).all(), "such ids are not answered")
            return logits

    ids = tokens(3, 14).clamp(max=60)
    models = [think_compile(own("buffer_index_put"), **SMALL) for _ in range(2)]
    for model in models:
        model.__class__ = Checked
    (expected, _), (got, conversation) = (
        talk("buffer_index_put", model, ids[:, :n], calls)
        for model, n, calls in zip(models, (14, 12), ([9, 1, 1, 1, 1, 1], [9, 1, 1, 1]), strict=True)
    )
    bad = torch.full_like(ids[:, :1], 61)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ThinkWarning)
        with pytest.raises(RuntimeError, match="such ids are not answered"):
            conversation.call(bad)
        got += [conversation.step(part) for part in ids[:, 12:].split(1, dim=1)]
    keys = models[1].layers[0].attention.cache_k
    assert isinstance(keys, Handle) and not keys.is_dense
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.host  # a kernel moves the window on a GPU
@torch.no_grad()
def test_a_failed_call_on_a_fixed_cache_made_again_is_exact(failing):
    """The second layer fails after the first has run and moved its window, in calls of one token and of several."""
    calls = [12, 1, 1, 6, 1, 1]
    ids, model = tokens(3, sum(calls)), wrapped("buffer_index_put")
    expected, _ = talk("buffer_index_put", model, ids, calls)
    for error in (KeyboardInterrupt(), NO_MEMORY):
        conversation = session("buffer_index_put", model)
        for n, (part, logits) in enumerate(zip(ids.split(calls, dim=1), expected, strict=True)):
            if n in (2, 3):
                failing.at(error)
                with pytest.raises(type(error)):
                    conversation.call(part)
            torch.testing.assert_close(conversation.step(part), logits)


@pytest.mark.versions
def test_a_kind_of_call_that_dynamo_fails_on_runs_plain_and_the_others_stay_compressed(monkeypatch):
    trace, attempts = builder.wrap_to_fake_tensor_and_record, []

    def fails_on_batches_of_two(value, *args, **kwargs):
        if value.dim() == 2 and value.dtype == torch.long and value.shape[0] == 2:
            attempts.append(value)
            raise ZeroDivisionError("made up")
        return trace(value, *args, **kwargs)

    model = wrapped("tuple_cat")
    talk("tuple_cat", model, tokens(1, 10), [9, 1])
    monkeypatch.setattr(builder, "wrap_to_fake_tensor_and_record", fails_on_batches_of_two)
    with pytest.warns(ThinkWarning, match="made up. Calls of this kind run as the model wrote them"):
        _, plain = talk("tuple_cat", model, tokens(2, 9), [9])
    assert not any(isinstance(keys, Handle) for keys, _ in plain.past)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ThinkWarning)
        for _ in range(4):  # the code inside is tried on its own
            tried = len(attempts)
            talk("tuple_cat", model, tokens(2, 9), [9])
        assert len(attempts) == tried, "this kind of call is traced again and again"
        for rows in (1, 3):
            _, conversation = talk("tuple_cat", model, tokens(rows, 10), [9, 1])
            assert all(isinstance(keys, Handle) for keys, _ in conversation.past)
    assert [record.reason for record in report(model).refused] == [Reason.FAILED]
    assert len(report(model).rewritten) == 2
