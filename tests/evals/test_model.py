"""The harness's model: its dense numbers equal HFLM's, and pruned ones come from the pruned cache."""

import pytest
import torch
from lm_eval.api.model import CachingLM
from oracle import CACHE, Oracle
from random_lm import (
    PRUNED,
    assert_as_exact_as,
    choices,
    hflm,
    in_float64,
    instance,
    loglikelihoods,
    random_model,
    word_tokenizer,
    words,
)
from rich.console import Console
from tiny import save_tiny_model
from transformers import T5Config

from think_compile.demo import GGUF, cache_folder, load_demo_model
from think_compile.evals.calls import Piece, TwoCalls, batches
from think_compile.evals.model import Counters, ThinkLM
from think_compile.evals.settings import Settings

DENSE = {"dense": True}
SIMULATED = PRUNED | {"method": "simulated"}
# four choices, three others, one context alone, no context, one token of context
PAIRS = [*choices(4, 30), *choices(3, 17, 5), *choices(1, 40, 9), ("", "w1 w2 w3"), ("w5", " w6 w7")]
DOCUMENTS = [words(count, count) for count in (90, 12, 41)]


def think(model, **options):
    return ThinkLM(model, tokenizer=word_tokenizer(), **options)


def scores(lm, pairs=PAIRS):
    """Log-likelihoods, and whether each continuation is the greedy one."""
    answers = lm.loglikelihood(loglikelihoods(*pairs), disable_tqdm=True)
    return [likelihood for likelihood, _ in answers], [greedy for _, greedy in answers]


def document_scores(lm):
    return lm.loglikelihood_rolling([instance("loglikelihood_rolling", (text,)) for text in DOCUMENTS], True)


# --------------------------------------------------------------------------------------------------- as HFLM


CUT = {"batch_size": 5, "max_length": 24}


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        pytest.param(DENSE, CUT, id="dense, batched and cut", marks=pytest.mark.slow),
        pytest.param(DENSE, {"batch_size": 1}, id="dense"),
        pytest.param(PRUNED | {"ratio": 0}, CUT, id="ratio 0"),
    ],
)
def test_without_pruning_loglikelihoods_are_those_of_the_harness(method, sizes):
    """Several choices per context, padding on both sides, contexts that are cut or too short to hold back a token."""
    model = random_model()
    (same, greedy), (exact, _) = scores(hflm(model, **sizes)), scores(hflm(in_float64(model), **sizes))
    lm = think(model, **method, **sizes)
    got, got_greedy = scores(lm)
    assert_as_exact_as(got, same, exact)
    assert got_greedy == greedy
    assert lm.counters.truncated_contexts == (5 if "max_length" in sizes else 0)
    assert lm.counters.scored_through_pruned == 0


def test_the_greedy_continuation_is_recognised():
    model, context = random_model(), words(20, 3)
    ids = torch.tensor([word_tokenizer()(context)["input_ids"]])
    best = word_tokenizer().decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -3:])
    other = best.rsplit(" ", 1)[0] + (" w3" if not best.endswith(" w3") else " w4")  # different in the last token
    assert scores(think(model, **DENSE), [(context, f" {best}"), (context, f" {other}")])[1] == [True, False]


@pytest.mark.parametrize("method", [DENSE, PRUNED | {"ratio": 0}], ids=["dense", "ratio 0"])
def test_without_pruning_documents_score_as_in_the_harness(method):
    model, sizes = random_model(), {"batch_size": 2, "max_length": 32}
    same, exact = document_scores(hflm(model, **sizes)), document_scores(hflm(in_float64(model), **sizes))
    lm = think(model, **method, **sizes)
    assert_as_exact_as(document_scores(lm), same, exact)
    assert lm.counters.scored_tokens == 90 + 12 + 41


def test_generation_without_pruning_is_that_of_the_harness():
    model = random_model()
    arguments = {"until": ["w7"], "max_gen_toks": 9, "do_sample": False}
    requests = [instance("generate_until", (words(count, count), arguments)) for count in (20, 9, 33)]
    expected = hflm(model, batch_size=3).generate_until(requests, disable_tqdm=True)
    assert think(model, batch_size=3, **DENSE).generate_until(requests, disable_tqdm=True) == expected


def test_automatic_batch_size():
    model = random_model(max_position_embeddings=64)
    expected = scores(think(model, batch_size=8, **SIMULATED))[0]
    lm = think(model, batch_size="auto", max_batch_size=8, **SIMULATED)
    assert_as_exact_as(scores(lm)[0], expected, expected)


def test_answers_are_kept_and_not_asked_again(tmp_path):
    lm = think(random_model(), **DENSE)
    requests = loglikelihoods(*PAIRS)
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    first = cached.loglikelihood(requests)
    tokens = lm.counters.scored_tokens
    assert cached.loglikelihood(requests) == first
    assert lm.counters.scored_tokens == tokens
    assert len(cached.dbdict) == len(PAIRS)


# ------------------------------------------------------------------------------------- through the pruned cache


@pytest.mark.parametrize("rows", [2, pytest.param(6, marks=pytest.mark.slow)])  # six rows repeat the test of two: slow
def test_compiled_method_is_the_simulated_one(rows):
    """With two rows, the four choices of a context are read in two calls, on two branches of its cache."""
    model = random_model()
    exact = scores(think(in_float64(model), batch_size=1, **SIMULATED))[0]
    simulated = think(model, batch_size=6, **SIMULATED)
    same = scores(simulated)[0]
    simulated.close()
    lm = think(model, batch_size=rows, **PRUNED)
    got = scores(lm)[0]
    assert_as_exact_as(got, same, exact)
    assert lm.counters == simulated.counters
    assert max(abs(a - b) for a, b in zip(got, scores(hflm(model))[0], strict=True)) > 0.1


@pytest.mark.slow  # other tests lower the same calls
def test_compiled_by_inductor():
    model, pairs = random_model(num_hidden_layers=1), choices(2, 30)
    exact = scores(think(in_float64(model), **SIMULATED), pairs)[0]
    simulated = think(model, **SIMULATED)
    same = scores(simulated, pairs)[0]
    simulated.close()
    assert_as_exact_as(scores(think(model, **PRUNED | {"lowering": "inductor"}), pairs)[0], same, exact)


def test_documents_through_the_compiled_cache_of_their_heads():
    model, sizes = random_model(), {"batch_size": 2, "max_length": 32, "split": 0.7}
    exact = document_scores(think(in_float64(model), **sizes, **SIMULATED))
    simulated = think(model, **sizes, **SIMULATED)
    same = document_scores(simulated)
    simulated.close()
    lm = think(model, **sizes, **PRUNED)
    assert_as_exact_as(document_scores(lm), same, exact)
    assert lm.counters == simulated.counters


def zero_filled(model, context, continuation, held_back, ratio):
    """Log-likelihood of one continuation by the oracle."""
    ids, targets = (torch.tensor([word_tokenizer()(text)["input_ids"]]) for text in (context, continuation))
    rules = {name: PRUNED[name] for name in ("recent", "observe", "channel_multiple")}
    oracle = Oracle(model, ratio=ratio, **rules)
    with torch.no_grad():
        first = oracle(input_ids=ids[:, :-held_back], use_cache=True)
        rest = torch.cat([ids[:, -held_back:], targets[:, :-1]], 1)
        logits = oracle(input_ids=rest, use_cache=True, **{CACHE: first[CACHE]}).logits
    logits = logits[0, -targets.shape[1] :].double().log_softmax(-1)
    return logits.gather(1, targets.T).sum().item()


@pytest.mark.parametrize("held_back", [1, 5])
def test_a_continuation_of_one_token_reads_the_pruned_cache(held_back):
    model, pairs = random_model(), [(words(30, 1), " w7"), (words(21, 2), " w9 w8")]
    lm = think(model, held_back=held_back, batch_size=2, **SIMULATED)
    got = scores(lm, pairs)[0]
    lm.close()
    same = [zero_filled(model, *pair, held_back, 0.5) for pair in pairs]
    exact = [zero_filled(in_float64(model), *pair, held_back, 0.5) for pair in pairs]
    assert_as_exact_as(got, same, exact)
    assert abs(got[0] - zero_filled(model, *pairs[0], held_back, 0.0)) > 0.01


def test_poison_in_the_pruned_rows_reaches_the_scores(monkeypatch):
    """Rows with narrow keys are overwritten after the first call: results that do not read them do not change."""
    fill, model = TwoCalls.fill, random_model()

    def spoilt(self, *args, **kwargs):
        filled = fill(self, *args, **kwargs)
        for layer in filled.cache.layers:
            layer.keys.store.rows.parts["rows"].mul_(-3)
        return filled

    lm = think(model, batch_size=6, **PRUNED)
    clean = scores(lm, choices(4, 30))[0]
    monkeypatch.setattr(TwoCalls, "fill", spoilt)
    assert min(abs(a - b) for a, b in zip(clean, scores(lm, choices(4, 30))[0], strict=True)) > 1e-3


def test_random_channels_change_the_scores_and_are_the_same_again():
    model = random_model()

    def of(method):
        lm = think(model, **PRUNED | {"method": method})
        got = scores(lm, PAIRS[:8])[0]
        lm.close()
        return got

    chosen, drawn = of("simulated"), of("random")
    assert min(abs(a - b) for a, b in zip(chosen, drawn, strict=True)) > 1e-3
    assert drawn == of("random")


def test_choices_of_one_context_share_its_prefill(monkeypatch):
    model, calls = random_model(), []
    lm = think(model, batch_size=8, **SIMULATED)
    plain = lm.calls._call

    def call(ids, *args, **options):
        calls.append(tuple(ids.shape))
        return plain(ids, *args, **options)

    monkeypatch.setattr(lm.calls, "_call", call)
    scores(lm, choices(4, 30))
    assert calls == [(1, 29), (4, 4)]
    calls.clear()
    letters = [(words(20, 3), f" w{n}") for n in range(4)]  # one token each: one row predicts them all
    scores(lm, letters)
    assert calls == [(1, 19), (1, 1)]


def test_batches_hold_whole_groups_the_longest_first():
    pieces = [Piece((1,) * n, (2,), (3,)) for n in (5, 9, 9, 9, 7)] + [Piece((1,) * 20, (), (3,))]
    assert list(batches(pieces, 2)) == [[1, 2, 3], [4, 0], [5]]
    assert list(batches(pieces, 4)) == [[1, 2, 3, 4], [0], [5]]


# ------------------------------------------------------------------------------------------------------- counting


def test_counters_tell_what_went_through_a_pruned_cache():
    lm = think(random_model(), max_length=24, **SIMULATED)
    scores(lm, [(words(30, 1), " w1 w2"), (words(5, 2), " w3"), (words(6, 3), " w4 w5 w6"), ("w7", " w8")])
    # of 5 words 4 are prefilled, all in the window of 4; of 6 words 5, one of them narrow
    assert lm.counters == Counters(scored_tokens=7, scored_through_pruned=5, contexts=4, truncated_contexts=1)
    told = lm.get_model_info()["think"]
    assert told["scored_through_pruned"] == 5
    assert told["effective_ratio"] == 0.5
    assert told["method"] == "simulated"


def test_counted_bytes_are_those_of_narrow_keys():
    lm = think(random_model(), **PRUNED)
    scores(lm, [(words(400, 1), " w1 w2")])
    told = lm.get_model_info()["think"]
    assert told["layers_rewritten"] == 2 and told["layers_left_dense"] == []
    assert told["dense_key_bytes"] == told["dense_value_bytes"] == 2 * 2 * 399 * 32 * 4
    assert 0.5 * told["dense_key_bytes"] < told["stored_key_bytes"] < 0.8 * told["dense_key_bytes"]


def test_the_first_generated_token_is_exact():
    lm = think(random_model(), **SIMULATED)
    arguments = {"until": ["[UNK]"], "max_gen_toks": 5, "do_sample": False}
    lm.generate_until([instance("generate_until", (words(20, 1), arguments))], disable_tqdm=True)
    assert (lm.counters.generated_tokens, lm.counters.generated_through_pruned) == (5, 4)


def test_truncated_prompts_are_counted():
    lm = think(random_model(), max_length=32, batch_size=2, **DENSE)
    texts = [words(30, 1), words(20, 2)]
    arguments = {"until": [], "max_gen_toks": 8}
    lm.generate_until([instance("generate_until", (text, arguments)) for text in texts], disable_tqdm=True)
    assert lm.counters.truncated_contexts == 1


def answers(lm, tokens):
    arguments = {"until": ["[UNK]"], "max_gen_toks": tokens, "do_sample": False}
    return lm.generate_until([instance("generate_until", (words(20, 1), arguments))], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [(PRUNED | {"recent": 64}, 5), (SIMULATED | {"channel_multiple": 32}, 5), (SIMULATED, 1)],
    ids=["all in the window", "no channel dropped", "the exact token only"],
)
def test_a_generation_that_measures_the_dense_model_is_an_error(options, tokens):
    model = random_model()
    lm = think(model, **options)
    with pytest.raises(ValueError, match=rf"none of {tokens} tokens was generated through .* ended with its first"):
        answers(lm, tokens)
    lm.close()
    assert len(answers(think(model, **DENSE), tokens)) == 1
    assert len(answers(think(model, **options | {"ratio": 0}), tokens)) == 1


@pytest.mark.parametrize("options", [{"recent": 64}, {"channel_multiple": 32}], ids=str)
def test_a_run_that_measures_the_dense_model_is_an_error(options):
    lm = think(random_model(), **SIMULATED | options)
    with pytest.raises(ValueError, match=r"none of 22 tokens .* longer contexts .* smaller recent"):
        scores(lm)
    lm = think(random_model(), **SIMULATED | options | {"ratio": 0})
    assert len(scores(lm)[0]) == len(PAIRS)


# -------------------------------------------------------------------------------------------------------- arguments


BAD = {
    "ratio": ({"ratio": 1.5}, "ratio must be in"),
    "ratio word": ({"ratio": "half"}, "ratio must be a number"),
    "recent": ({"recent": -1}, "recent must be"),
    "lowering": ({"lowering": "fast"}, "lowering must be one of"),
    "method": ({"method": "thin"}, "method must be one of think, dense, simulated"),
    "held_back": ({"held_back": 0}, "held_back must be an int >= 1"),
    "split": ({"split": 1.0}, r"split must be a number in \(0, 1\)"),
    "score_over": ({"method": "random", "score_over": "new"}, "score_over must be one of all, old"),
    "score_over of think": ({"score_over": "old"}, "score_over='old' is for the simulated methods"),
    "two methods": ({"dense": True, "method": "kvpress"}, "two methods"),
    "dense": ({"dense": "maybe"}, "dense must be True or False"),
}


@pytest.mark.parametrize(("options", "complaint"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_told_before_a_model_is_looked_for(options, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        ThinkLM("/no/such/model", **options)


def test_misspelt_option_of_a_model_object():
    with pytest.raises(TypeError, match="channel_multple"):
        think(random_model(), channel_multple=4)


def test_encoder_decoder_models_are_refused_before_they_are_loaded(tmp_path):
    T5Config(d_model=32, num_layers=1, vocab_size=64).save_pretrained(tmp_path)  # no weights
    with pytest.raises(ValueError, match="'t5' is an encoder-decoder model"):
        ThinkLM(str(tmp_path))


def test_arguments_come_as_strings():
    strings = {"ratio": "0.25", "recent": "8", "observe": "4", "channel_multiple": "1", "lowering": "eager"}
    rest = {"prune_generated": "False", "held_back": "2", "split": "0.25", "dense": "false", "method": "random"}
    settings = Settings.of(**strings, **rest, seed="3")
    numbers = {"ratio": 0.25, "recent": 8, "observe": 4, "channel_multiple": 1, "lowering": "eager"}
    assert settings == Settings.of(
        **numbers, prune_generated=False, held_back=2, split=0.25, dense=False, method="random", seed=3
    )


def test_a_line_of_arguments_loads_a_folder(tmp_path):
    save_tiny_model(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    line = f"pretrained={tmp_path},ratio=0.25,recent=8,method=simulated,channel_multiple=1,device=cpu"
    lm = ThinkLM.create_from_arg_string(line, {"batch_size": 4, "device": None})
    assert lm.settings.config.ratio == 0.25
    assert len(scores(lm)[0]) == len(PAIRS)
    assert lm.get_model_info()["think"]["effective_ratio"] == 0.25


def test_a_model_object_is_given_back(tmp_path):
    model = random_model()
    for method in (PRUNED, SIMULATED):
        lm = think(model, **method)
        lm.close()
    with torch.no_grad():
        assert model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
    assert model.config._attn_implementation == "sdpa"
    assert model._compiled_call_impl is None


# ------------------------------------------------------------------------------------------------------ real weights


@pytest.mark.slow
def test_real_model_from_its_gguf_file():
    load_demo_model(Console(quiet=True))  # fetches the file
    lm = ThinkLM(str(cache_folder() / GGUF), method="simulated", dtype="float32")
    plain, tokenizer = load_demo_model(Console(quiet=True))
    pairs = [("The quick brown fox jumps over the lazy dog. " * 12 + "The quick brown", " fox")]
    expected = scores(ThinkLM(plain, tokenizer=tokenizer, method="simulated"), pairs)[0]
    assert scores(lm, pairs)[0] == pytest.approx(expected, abs=1e-3)
