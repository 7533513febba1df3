"""A random Llama with peaked attention, a tokenizer of words, and requests like the harness's."""

from __future__ import annotations

import copy
import random

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import randomize
from tiny import WORDS, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PRUNED = {"ratio": 0.5, "recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}


def random_model(**config):
    return randomize(tiny_llama(**config))


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]")


def words(count, seed):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(58)}" for _ in range(count))


def loglikelihoods(*pairs):
    return [instance("loglikelihood", pair) for pair in pairs]


def instance(kind, arguments, task="random"):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))


def choices(count, context_words, seed=0):
    """Pairs of a context with several continuations of different lengths."""
    context = words(context_words, seed)
    return [(context, " " + words(1 + n, seed + 100 + n)) for n in range(count)]


def hflm(model, **options):
    return HFLM(model, tokenizer=word_tokenizer(), **options)


def in_float64(model):
    return copy.deepcopy(model).double()


def assert_as_exact_as(got, same, exact, what=""):
    """The float64 error of `got` is at most a few times that of `same`, in the same precision."""
    natural = max(abs(a - b) for a, b in zip(same, exact, strict=True))
    error = max(abs(a - b) for a, b in zip(got, exact, strict=True))
    scale = max(1.0, *(abs(number) for number in exact))
    assert error <= 4 * natural + 1e-6 * scale, f"{what}: off by {error:.2e}; {natural:.2e} is natural"
