"""KL and agreement: their definitions, and their measurement through the pruned cache."""

import dataclasses
from contextlib import closing

import pytest
import torch
from random_lm import PRUNED, in_float64, random_model, word_tokenizer, words
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from think_compile.demo import load_demo_model
from think_compile.evals.calls import Scored, TwoCalls
from think_compile.evals.divergence import Divergence, Sample
from think_compile.evals.methods import Recorder, Simulation
from think_compile.evals.settings import SIMULATED, Settings
from think_compile.evals.tasks import prompts


def samples(*lengths, continuation=6):
    pairs = [(words(length, length), " " + words(continuation, 100 + length)) for length in lengths]
    return [Sample.of(word_tokenizer(), *pair) for pair in pairs]


def settings(method, **options):
    return Settings.of(method=method, **PRUNED | options)


def test_distance_of_the_dense_model_and_of_ratio_zero_is_nothing():
    divergence = Divergence(random_model(), samples(30, 17), batch_size=2)
    for method in (Settings(method="dense"), settings("simulated", ratio=0)):
        distance = divergence.of(method)
        assert distance.kl == pytest.approx([0, 0], abs=1e-12)
        assert distance.agreement == [1, 1]
        assert (distance.tokens, distance.through_pruned) == (12, 0)


def test_compiled_method_is_as_far_as_the_simulated_one():
    model, some = random_model(), samples(30, 17)
    divergence = Divergence(model, some, batch_size=2)
    compiled, simulated = divergence.of(settings("think")), divergence.of(settings("simulated"))
    exact = Divergence(in_float64(model), some).of(settings("simulated"))
    assert compiled.kl == pytest.approx(exact.kl, rel=1e-4)
    assert simulated.kl == pytest.approx(exact.kl, rel=1e-4)
    assert compiled.agreement == simulated.agreement == exact.agreement
    assert compiled.through_pruned == 12
    assert compiled.told["effective_ratio"] == 0.5
    assert min(compiled.kl) > 0.01


def test_methods_that_share_their_first_calls_are_as_far_as_alone():
    """Also if the recorder keeps more queries than a method observes, and samples are padded."""
    wanted = [settings(method) for method in SIMULATED]
    wanted += [
        settings("simulated", observe=3),
        settings("simulated", recent=2),
        settings("simulated", score_over="old"),
    ]
    for size in (1, 3):
        divergence = Divergence(random_model(), samples(30, 17, 24), batch_size=size)
        for one, found in zip(wanted, divergence.of_simulated(wanted), strict=True):
            alone = divergence.of(one)
            assert found.kl == pytest.approx(alone.kl, rel=1e-5), one
            assert found == dataclasses.replace(alone, kl=found.kl), one
    assert len({tuple(found.kl) for found in divergence.of_simulated(wanted)}) == len(wanted)


def test_queries_that_were_not_kept_cannot_score():
    with closing(Recorder(random_model(), observe=4)) as recorder:
        filled = TwoCalls(recorder.model, recorder).fill([tuple(range(2, 22))])
        method = Simulation(recorder.model, settings("simulated", observe=8))
        with closing(method), pytest.raises(ValueError, match="observe=8 queries are to score, 4 were kept"):
            method.of_recorded(filled.cache, recorder.layers)


@pytest.mark.parametrize("method", SIMULATED)
def test_each_method_is_measured_one_sample_or_many_at_a_time(method):
    model, some = random_model(), samples(30, 17, 24)
    alone, together = (Divergence(model, some, batch_size=size).of(settings(method)) for size in (1, 3))
    assert alone.kl == pytest.approx(together.kl, rel=1e-3)
    assert min(alone.kl) > 1e-3


def test_kl_is_its_formula():
    """From the plain model's own logits, at the positions that predict the continuation."""
    model, (sample,) = random_model(), samples(20, continuation=3)
    divergence = Divergence(model, [sample])
    ids = torch.tensor([sample.context + sample.continuation])
    with torch.no_grad():
        dense = model(ids).logits[0, 19:22].double()
    divergence.dense = {0: Scored(dense.roll(1, -1), 0)}
    p, q = dense.roll(1, -1).softmax(-1), dense.softmax(-1)
    distance = divergence.of(Settings(method="dense"))
    assert distance.kl == pytest.approx([(p * (p / q).log()).sum(-1).mean().item()], rel=1e-5)
    assert distance.agreement == [0.0]


def test_a_window_that_holds_everything_is_no_distance():
    distance = Divergence(random_model(), samples(10)).of(settings("simulated", recent=64))
    assert distance.kl == pytest.approx([0], abs=1e-12)
    assert distance.through_pruned == 0


def test_more_may_be_held_back():
    model, some = random_model(), samples(30)
    one, ten = (Divergence(model, some, held_back=count).of(settings("simulated")).kl for count in (1, 10))
    assert one != ten


@pytest.mark.parametrize("sample", [Sample((1, 2), (3,)), Sample((1, 2, 3), ())], ids=str)
def test_samples_that_are_too_short(sample):
    with pytest.raises(ValueError, match=r"more than held_back=2 tokens of context and one of continuation; got"):
        Divergence(random_model(), [sample], held_back=2)


def test_a_token_of_both_texts_belongs_to_the_continuation():
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "bc"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("b", "c")])))
    assert Sample.of(tokenizer, "aab", "ca") == Sample((0, 0), (3, 0))
    assert Sample.of(tokenizer, "aab", "a") == Sample((0, 0, 1), (0,))


@pytest.mark.slow
def test_real_model_is_close_and_random_channels_are_not():
    model, tokenizer = load_demo_model(Console(quiet=True))
    docs = prompts.load("continuation_2k.jsonl")["test"]
    some = [Sample.of(tokenizer, prompts.context(docs[i]), prompts.continuation(docs[i])) for i in range(2)]
    divergence = Divergence(model, some)
    ours, kvpress, drawn = (
        divergence.of(Settings.of(method=method, lowering="eager")) for method in ("think", "kvpress", "random")
    )
    assert sum(ours.kl) < sum(kvpress.kl) < sum(drawn.kl) / 10
    assert sum(ours.agreement) > sum(drawn.agreement) + 0.5
