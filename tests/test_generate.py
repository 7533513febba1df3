"""Compiled models under `generate` and in users' hands: the plain model's tokens at ratio 0, the oracle's otherwise."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import HEAD_DIM, Rules, Trio, padding, tokens
from models import CAPACITY, VOCAB, hugging_face, own
from oracle import CACHE, Oracle
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache, pipeline

from think_compile import explain, report, restore, think_compile
from think_compile.cache.handle import Handle

NEW = 10
PLAIN, PRUNED = Rules(0.0), Rules(0.5)
RATIOS = pytest.mark.parametrize("rules", [PLAIN, PRUNED], ids=["ratio0", "ratio0.5"])
# Tests whose ratio 0 runs the same code as other tests with both ratios.
MOSTLY_PRUNED = pytest.mark.parametrize(
    "rules", [pytest.param(PLAIN, id="ratio0", marks=pytest.mark.slow), pytest.param(PRUNED, id="ratio0.5")]
)


def compiled(model, rules=PRUNED, **kwargs):
    """A compiled copy; the model itself does not change."""
    return think_compile(copy.deepcopy(model), lowering="eager", **vars(rules), **kwargs)


def reference(model, rules):
    """The expected model: the plain one if nothing is pruned, the oracle otherwise."""
    return model if rules.ratio == 0 else Oracle(model, **vars(rules)).model


def generate(model, ids, real=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    real = torch.ones_like(ids) if real is None else real
    options = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=real, **options)


def assert_same_tokens(rules, ids, real=None, model=None, **kwargs):
    """Generates with the compiled model and with its reference, and returns the compiled model."""
    model = hugging_face("llama") if model is None else model
    ours = compiled(model, rules)
    expected = generate(reference(model, rules), ids, real, **kwargs)
    assert torch.equal(generate(ours, ids, real, **kwargs), expected)
    return ours


# ------------------------------------------------------------------ ways of decoding


BATCHES = [  # each batch once, and both ratios with and without padding; the other settings repeat these: slow
    pytest.param(PLAIN, 1, "none", id="batch1-ratio0"),
    pytest.param(PRUNED, 1, "none", id="batch1-ratio0.5", marks=pytest.mark.slow),
    pytest.param(PLAIN, 7, "none", id="batch7-none-ratio0", marks=pytest.mark.slow),
    pytest.param(PRUNED, 7, "none", id="batch7-none-ratio0.5"),
    pytest.param(PLAIN, 7, "left", id="batch7-left-ratio0"),
    pytest.param(PRUNED, 7, "left", id="batch7-left-ratio0.5", marks=pytest.mark.slow),
    pytest.param(PLAIN, 7, "right", id="batch7-right-ratio0", marks=pytest.mark.slow),
    pytest.param(PRUNED, 7, "right", id="batch7-right-ratio0.5"),
]


@pytest.mark.parametrize(("rules", "batch", "side"), BATCHES)
def test_greedy(rules, batch, side):
    assert_same_tokens(rules, tokens(batch, 24), padding(side, batch, 24))


def test_pruning_changes_the_tokens():
    """Guards the other tests: at ratio 0.5 the reference differs from the plain model's text."""
    model, ids = hugging_face("llama"), tokens(7, 24)
    assert not torch.equal(generate(reference(model, PRUNED), ids), generate(model, ids))


@RATIOS
def test_sampling_with_a_seed(rules):
    ours = assert_same_tokens(rules, tokens(2, 20), do_sample=True, temperature=1.5, seed=3)
    ids = tokens(2, 20)
    runs = [generate(ours, ids, do_sample=True, temperature=1.5, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@MOSTLY_PRUNED
@pytest.mark.parametrize("side", ["none", "left"])
def test_beam_search(rules, side):
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert_same_tokens(rules, tokens(2, 20), padding(side, 2, 20), **options)


@MOSTLY_PRUNED
def test_beam_sampling(rules):
    assert_same_tokens(rules, tokens(2, 20), num_beams=2, do_sample=True, temperature=1.5)


@MOSTLY_PRUNED
def test_several_samples_of_one_prompt(rules):
    assert_same_tokens(rules, tokens(1, 20), do_sample=True, temperature=1.5, num_return_sequences=3)


@MOSTLY_PRUNED
def test_prompt_lookup(rules, monkeypatch):
    crops = []
    crop = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, n: crops.append(n) or crop(cache, n))
    ids = tokens(1, 8).repeat(1, 4)
    assert_same_tokens(rules, ids, prompt_lookup_num_tokens=4, max_new_tokens=16)
    assert any(n < 0 for n in crops)


@MOSTLY_PRUNED
@pytest.mark.parametrize("side", ["none", "left"])
def test_static_cache(rules, side):
    ours = assert_same_tokens(rules, tokens(2, 24), padding(side, 2, 24), cache_implementation="static")
    assert {record.cache for record in report(ours).rewritten} == {"fixed"}


@MOSTLY_PRUNED
def test_static_cache_twice(rules):
    model = hugging_face("llama")
    ours, expected = compiled(model, rules), reference(model, rules)
    for length in (24, 12, 30):
        ids = tokens(2, length)
        options = {"cache_implementation": "static"}
        assert torch.equal(generate(ours, ids, **options), generate(expected, ids, **options))


@MOSTLY_PRUNED
def test_chunked_prefill_by_generate(rules):
    assert_same_tokens(rules, tokens(2, 29), prefill_chunk_size=8)


@MOSTLY_PRUNED
def test_mixed_sliding_layers(rules):
    ours = assert_same_tokens(rules, tokens(2, 30), padding("left", 2, 30), model=hugging_face("gemma3"))
    assert (len(report(ours).rewritten), len(report(ours).refused)) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        pytest.param(
            {"prompt_lookup_num_tokens": 4},
            marks=pytest.mark.xfail(
                torch.__version__.startswith("2.11"),
                raises=torch._dynamo.exc.InternalTorchDynamoError,
                reason="torch 2.11 cannot trace the dense window's view that a crop leaves; users get plain code there",
            ),
        ),
    ],
    ids=str,
)
def test_mixed_sliding_layers_otherwise(options):
    ours = assert_same_tokens(PRUNED, tokens(1, 8).repeat(1, 4), model=hugging_face("gemma3"), **options)
    assert (len(report(ours).rewritten), len(report(ours).refused)) == (1, 1)


def test_assistant_model():
    """Both models are compiled; the assistant prunes more."""
    model, ids = hugging_face("llama"), tokens(1, 20)
    expected = generate(reference(model, PRUNED), ids, assistant_model=reference(model, Rules(0.75)))
    ours = compiled(model)
    assert torch.equal(generate(ours, ids, assistant_model=compiled(model, Rules(0.75))), expected)


@MOSTLY_PRUNED
def test_preallocated_static_cache(rules):
    """Chunked prefill allocates a static cache before the first call; the cache must release these tensors."""
    options = {"prefill_chunk_size": 8, "cache_implementation": "static"}
    ours = assert_same_tokens(rules, tokens(2, 29), **options)
    assert {record.cache for record in report(ours).rewritten} == {"fixed"}
    assert len(report(ours).rewritten) == 2 and not report(ours).refused


@torch.no_grad()
def test_a_tensor_in_a_tuple_is_not_swapped():
    """A tensor in a tuple cannot be replaced, so it is written densely, as by the model."""
    model = own("buffer_index_copy")

    class Outside(torch.nn.Module):
        """The caches are arguments, in containers of type `kind`."""

        def __init__(self):
            super().__init__()
            self.attention = model.layers[0].attention

        def forward(self, x, pos, mask, held):
            a = self.attention
            q, k, v = (t.transpose(1, 2) for t in a.project(x, pos))
            keys, values = (cache.index_copy_(2, pos, new) for cache, new in zip(held, (k, v), strict=True))
            return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)

    plain = Outside()
    for kind, rewritten in [(tuple, 0), (list, 1)]:
        ours = think_compile(copy.deepcopy(plain), 0.0, lowering="eager", recent=4)
        caches = [kind(torch.zeros(2, 2, CAPACITY, HEAD_DIM) for _ in range(2)) for _ in range(2)]
        for start, new in [(0, 9), (9, 1), (10, 1)]:
            pos, x = torch.arange(start, start + new), torch.randn(2, new, 64)
            mask = torch.arange(CAPACITY) <= pos[:, None]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got, expected = (m(x, pos, mask, held) for m, held in zip((ours, plain), caches, strict=True))
            torch.testing.assert_close(got, expected)
        assert len(report(ours).rewritten) == rewritten
        assert all(isinstance(held, Handle) is bool(rewritten) for held in caches[0])


@MOSTLY_PRUNED
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_second_turn(rules, options):
    """The cache of a generation is passed back with more tokens: a multi-token call on a pruned past."""
    model = hugging_face("llama")
    ids, more = tokens(2, 20), tokens(2, 7)
    turns = []
    for m in (compiled(model, rules), reference(model, rules)):
        made = {} if not options else {CACHE: StaticCache(config=m.config, max_cache_len=CAPACITY)}
        first = generate(m, ids, return_dict_in_generate=True, **made)
        prompt = torch.cat([first.sequences, more], dim=1)
        turns.append((first.sequences, generate(m, prompt, **{CACHE: first[CACHE]})))
    assert torch.equal(turns[0][0], turns[1][0])
    assert torch.equal(turns[0][1], turns[1][1])


def test_without_a_cache():
    model, ids = hugging_face("llama"), tokens(2, 12)
    ours = compiled(model, PRUNED)
    assert torch.equal(generate(ours, ids, use_cache=False), generate(model, ids, use_cache=False))


@MOSTLY_PRUNED
def test_prompt_shorter_than_the_windows(rules):
    wide, model = Rules(rules.ratio, recent=8, observe=16), hugging_face("llama")
    ours, expected = compiled(model, wide), reference(model, wide)
    for length in (6, 2, 1):
        ids = tokens(2, length)
        assert torch.equal(generate(ours, ids, max_new_tokens=14), generate(expected, ids, max_new_tokens=14))


# ------------------------------------------------------------------ caches in the user's hands, call by call


@torch.no_grad()
def test_multi_token_calls():
    Trio().run(tokens(2, 40), [20, 7, 1, 3, 1, 8])


@pytest.mark.parametrize(
    "sides", [pytest.param(["none"], id="plain", marks=pytest.mark.slow), pytest.param(["left", "right"], id="padded")]
)
@torch.no_grad()
def test_chunked_prefill_by_hand(sides):
    trio = Trio()
    for side in sides:
        trio.begin().run(tokens(3, 33), [12, 12, 6, 1, 1, 1], padding(side, 3, 30))


@torch.no_grad()
def test_crop():
    """Inside the window, exactly it, beyond it, and into the prompt."""
    trio = Trio()
    for removed in (1, 3, 4, 9, 18):
        trio.begin().run(tokens(2, 24), [20, 1, 3])
        trio.crop(removed)
        trio.check_caches()
        trio.run(tokens(2, 11), [1] * 7 + [3, 1])


@torch.no_grad()
def test_crop_into_the_window_again_and_again():
    trio = Trio()
    trio.run(tokens(1, 20), [20])
    for removed in (2, 1, 3, 0, 4):
        trio.run(tokens(1, 4), [4])
        trio.crop(removed)
        trio.check_caches()
    trio.run(tokens(1, 3), [1, 1, 1])


@torch.no_grad()
def test_deep_copies_go_their_own_ways():
    trio = Trio()
    trio.run(tokens(2, 20), [18, 1, 1])
    branch = trio.branch()
    for _ in range(6):
        trio.run(tokens(2, 1), [1])
        branch.run(tokens(2, 1), [1])
    branch.check_caches()
    trio.check_caches()


@torch.no_grad()
def test_a_prefix_can_be_used_many_times():
    trio = Trio()
    trio.run(tokens(1, 18), [18])
    for _ in range(3):
        branch = trio.branch()
        branch.run(tokens(1, 7), [4, 1, 1, 1])
    trio.check_caches()
    trio.run(tokens(1, 2), [1, 1])


@torch.no_grad()
def test_sequences_are_selected():
    trio = Trio()
    for index in ([2, 0, 1], [1, 1, 0], [2], [0, 1, 1, 2]):
        trio.begin().run(tokens(3, 22), [20, 1, 1], padding("left", 3, 20))
        trio.select(torch.tensor(index))
        trio.check_caches()
        trio.run(tokens(len(index), 6), [1] * 6, torch.ones(len(index), 6, dtype=torch.long))


@torch.no_grad()
def test_conversations_are_joined_to_a_batch():
    trio = Trio()
    other = copy.copy(trio).begin()
    trio.run(tokens(2, 20), [18, 1, 1])
    other.run(tokens(1, 20), [19, 1])
    for mine, theirs in zip(trio.sessions, other.sessions, strict=True):
        join(mine.cache, theirs.cache)
        mine.rows += theirs.rows
    trio.check_caches()
    trio.run(tokens(3, 5), [1] * 5)


def join(cache, other):
    """Appends the sequences of another cache, with an oracle's state for them."""
    for a, b in zip(cache.layers, other.layers, strict=True):
        a.keys, a.values = torch.cat([a.keys, b.keys]), torch.cat([a.values, b.values])
        if hasattr(a, "oracle_state"):
            a.oracle_state.kept = torch.cat([a.oracle_state.kept, b.oracle_state.kept])


@pytest.mark.parametrize("name", [pytest.param("tuple_cat", marks=pytest.mark.slow), "bshd_cat"])
@torch.no_grad()
def test_an_older_tuple_is_a_branch(name):
    """No copies: a tuple from some calls ago is used again, more than once."""
    trio = Trio(name)
    trio.run(tokens(2, 20), [18, 1, 1])
    then = [(talk.past, talk.length) for talk in trio.sessions]
    for calls in ([1] * 9, [3, 1], [1] * 6):
        for talk, (talk.past, talk.length) in zip(trio.sessions, then, strict=True):
            assert talk.length == 20
        trio.check_caches()
        trio.run(tokens(2, sum(calls)), calls)


@torch.no_grad()
def test_the_store_grows():
    trio = Trio()
    trio.run(tokens(1, 4), [4])
    for step in range(160):
        trio.step(tokens(1, 1))
        if step % 20 == 0:
            trio.check_caches()
    trio.check_caches()
    assert report(trio.model).graphs == 2


def offload(cache):
    """Every tensor moves away and back, as in offloaded caches."""
    for layer in cache.layers:
        layer.keys = layer.keys.to("cpu", copy=True)
        layer.values = layer.values.to("cpu", non_blocking=True)
        layer.offload()
        layer.prefetch()


@torch.no_grad()
def test_offloaded_and_back():
    trio = Trio()
    trio.run(tokens(2, 20), [18, 1, 1])
    trio.edit(offload)
    assert all(isinstance(keys, Handle) for keys in trio.got.raw())
    trio.run(tokens(2, 6), [1] * 6)


@torch.no_grad()
def test_a_dense_past_is_taken_over():
    """A cache filled by the plain model: the next call is exact and prunes all of it."""
    trio = Trio()
    ids = tokens(2, 20)
    for talk in trio.sessions:
        model = trio.plain.double() if talk is trio.exact else trio.plain.float()
        talk.cache = model(ids, use_cache=True)[CACHE]
        talk.length = talk.rows = 0
        talk.length, talk.rows = ids.shape[1], ids.shape[0]
    trio.run(tokens(2, 10), [3, 1, 1, 5])


@torch.no_grad()
def test_a_reset_cache_begins_anew():
    trio = Trio()
    trio.begin(lambda: StaticCache(config=trio.plain.config, max_cache_len=CAPACITY))
    for _ in range(2):
        trio.run(tokens(2, 22), [20, 1, 1])
        trio.edit(lambda cache: cache.reset())
        for talk in trio.sessions:
            talk.length = 0


@torch.no_grad()
def test_a_densified_cache_is_still_right():
    """An unforeseen operation makes the cache dense: the numbers stay, pruning starts over."""
    trio = Trio()
    trio.run(tokens(2, 20), [18, 1, 1])
    for layer in trio.got.cache.layers:
        assert torch.equal(layer.keys + 0, layer.keys.dense())
        assert torch.equal(torch.sin(layer.values), torch.sin(layer.values.dense()))


@torch.no_grad()
def test_two_conversations_on_one_model():
    trio = Trio()
    other = copy.copy(trio).begin()
    trio.run(tokens(2, 20), [20])
    other.run(tokens(2, 13), [13])
    for _ in range(6):
        trio.run(tokens(2, 1), [1])
        other.run(tokens(2, 1), [1])
    other.run(tokens(2, 4), [4])
    trio.check_caches()


@pytest.mark.slow  # 18 s; other tests also run two models in one process
@torch.no_grad()
def test_two_models_in_one_process():
    first = Trio("llama", Rules(0.5))
    second = Trio("qwen3", Rules(0.75, recent=8, observe=4))
    third = Trio("llama", Rules(0.3, recent=2), model=hugging_face("llama", seed=1))
    for new in [20, 1, 1, 1, 1, 3]:
        for trio in (first, second, third):
            trio.run(tokens(2, new), [new])


@pytest.mark.slow  # test_lower counts the compilations of batches of several sizes
@torch.no_grad()
def test_batches_of_different_sizes_one_after_the_other():
    trio = Trio()
    for batch in (2, 1, 7):
        trio.begin().run(tokens(batch, 26), [20, *[1] * 6])


# ------------------------------------------------------------------ numbers


PRECISIONS = [
    pytest.param(PLAIN, torch.bfloat16, id="ratio0-torch.bfloat16", marks=pytest.mark.slow),
    pytest.param(PLAIN, torch.float16, id="ratio0-torch.float16", marks=pytest.mark.slow),
    pytest.param(PLAIN, torch.float32, id="ratio0-torch.float32", marks=pytest.mark.slow),
    pytest.param(PRUNED, torch.bfloat16, id="ratio0.5-torch.bfloat16"),
    pytest.param(PRUNED, torch.float16, id="ratio0.5-torch.float16"),
    pytest.param(PRUNED, torch.float32, id="ratio0.5-torch.float32"),
]


@pytest.mark.parametrize(("rules", "dtype"), PRECISIONS)
@torch.no_grad()
def test_precisions(dtype, rules):
    trio = Trio(rules=rules, model=hugging_face("llama").to(dtype))
    trio.run(tokens(2, 32), [20, *[1] * 9, 3], padding("left", 2, 20))
    assert all(keys.dtype == dtype for keys in trio.got.raw())


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@RATIOS
@torch.no_grad()
def test_bad_activations_pass_through(rules, value):
    """One sequence of the batch meets an embedding that is not finite: as in the reference, no crash."""
    model = hugging_face("llama")
    model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.clone())
    model.get_input_embeddings().weight[5, 3] = value
    ours, expected = compiled(model, rules), reference(model, rules)
    caches = [None, None]
    ids = tokens(2, 26).clamp(min=6)
    ids[0, 8] = 5
    for part in ids.split([20, *[1] * 6], dim=1):
        outs = [m(part, **{CACHE: c}) for m, c in zip((ours, expected), caches, strict=True)]
        caches = [out[CACHE] for out in outs]
        torch.testing.assert_close(outs[0].logits, outs[1].logits, equal_nan=True, rtol=1e-3, atol=1e-3)
        assert outs[0].logits[1].isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes(mode):
    with mode():
        Trio().run(tokens(2, 28), [20, *[1] * 8])


def test_modes_may_change_between_calls():
    trio = Trio()
    with torch.inference_mode():
        trio.run(tokens(2, 21), [20, 1])
    with torch.no_grad():
        trio.run(tokens(2, 2), [1, 1])
    with torch.inference_mode():
        trio.run(tokens(2, 2), [1, 1])


def test_training_is_exact_and_warns_once():
    plain = hugging_face("llama").train()
    ours = compiled(plain)
    ids = tokens(2, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [ours(ids, labels=ids).loss, ours(ids, labels=ids).loss]
    expected = plain(ids, labels=ids).loss
    for loss in (losses[0], expected):
        loss.backward()
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(losses[1], expected)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    about = [w for w in caught if "train" in str(w.message).lower() or "grad" in str(w.message).lower()]
    assert len(about) == 1


def test_pruning_resumes_after_training():
    ours = compiled(hugging_face("llama")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours(tokens(2, 16))
    ours.eval()
    with torch.no_grad():
        cache = ours(tokens(2, 16), use_cache=True)[CACHE]
    assert all(isinstance(layer.keys, Handle) for layer in cache.layers)


# ------------------------------------------------------------------ the model is unchanged, and its cost


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@RATIOS
def test_pipeline(rules):
    model = hugging_face("llama")
    prompts = [" ".join(f"w{i}" for i in row) for row in tokens(2, 20).tolist()]
    texts = []
    for m in (compiled(model, rules), reference(model, rules)):
        pipe = pipeline("text-generation", model=m, tokenizer=tokenizer(), device=model.device)
        texts.append(pipe(prompts, max_new_tokens=NEW, do_sample=False, return_full_text=False))
    assert texts[0] == texts[1]


def test_the_model_is_still_itself():
    model = hugging_face("llama")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    ours = think_compile(model, lowering="eager")
    assert ours is model
    assert isinstance(ours, LlamaForCausalLM)
    assert {name: p.data_ptr() for name, p in ours.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "side"),
    [
        pytest.param({}, "none", id="none-dynamic", marks=pytest.mark.slow),
        pytest.param({"cache_implementation": "static"}, "none", id="none-static"),
        pytest.param({}, "left", id="left-dynamic"),
        pytest.param({"cache_implementation": "static"}, "left", id="left-static", marks=pytest.mark.slow),
    ],
)
def test_two_graphs_for_a_whole_generation(options, side):
    """Counted by the package and by Dynamo; another text of a different length adds none."""
    ours = compiled(hugging_face("llama"))
    torch._dynamo.utils.counters.clear()
    generate(ours, tokens(2, 20), padding(side, 2, 20), max_new_tokens=24, **options)
    assert report(ours).graphs == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    generate(ours, tokens(2, 17), padding(side, 2, 17), max_new_tokens=24, **options)
    assert report(ours).graphs <= 3  # the prefill's length became dynamic


@torch.no_grad()
def test_bytes_are_those_of_the_living_caches():
    ours = compiled(hugging_face("llama"), Rules(0.5, recent=4))
    assert report(ours).stored_key_bytes == 0
    cache = ours(tokens(2, 1024), use_cache=True)[CACHE]
    found = report(ours)
    dense = 2 * (2 * 2 * 1024 * HEAD_DIM) * 4  # layers, batch x heads x tokens x channels, fp32
    assert found.dense_key_bytes == dense
    assert found.dense_bytes == 2 * dense
    assert found.stored_key_bytes <= 0.55 * dense
    assert found.stored_key_bytes < found.stored_bytes
    del cache
    gc.collect()
    assert report(ours).stored_bytes == report(ours).dense_bytes == 0


def test_nothing_pruned_when_the_multiple_is_too_large():
    model = hugging_face("llama")
    wide = compiled(model, Rules(0.5, channel_multiple=48))
    ids = tokens(2, 20)
    assert torch.equal(generate(wide, ids), generate(model, ids))
    assert "48" in str(report(wide))


def test_restore_gives_the_plain_model_back():
    model, ids = hugging_face("llama"), tokens(2, 20)
    expected = generate(model, ids)
    ours = compiled(model)
    assert not torch.equal(generate(ours, ids), expected)
    restore(ours)
    out = generate(ours, ids, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert not any(isinstance(layer.keys, Handle) for layer in out[CACHE].layers)
    think_compile(ours, lowering="eager")  # and may be compiled again


def test_a_compiled_model_is_not_compiled_twice():
    ours = compiled(hugging_face("llama"))
    with pytest.raises((TypeError, ValueError), match="restore"):
        think_compile(ours)


@torch.no_grad()
def test_explain_tells_without_generating():
    ours = compiled(hugging_face("gemma3"))
    found = explain(ours, {"input_ids": tokens(1, 8)})
    assert (len(found.rewritten), len(found.refused)) == (1, 1)
