"""Questions asked after the pruning: the division of contexts, and results against the oracle."""

import pytest
import torch
from oracle import CACHE, Oracle
from random_lm import PRUNED, instance, random_model, word_tokenizer, words
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from think_compile.evals.model import ThinkLM
from think_compile.evals.questions import tails

DENSE = {"dense": True}
SIMULATED = PRUNED | {"method": "simulated"}
ASKED = {"until": ["w11"], "max_gen_toks": 12, "do_sample": False, "prune_before": "w50"}
QUESTIONS = [f"{words(20, 1)} w50 {words(3, 2)}", f"w50 {words(33, 3)} w50 w7", f"{words(9, 4)} w50 {words(3, 5)}"]


def asked_by_oracle(model, text, ratio):
    """Greedy text by the oracle: the context before its last w50 first, then the rest, then token by token."""
    tokenizer = word_tokenizer()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    question = tokenizer.convert_tokens_to_ids("w50")
    start = (ids[0] == question).nonzero()[-1].item()
    rules = {name: PRUNED[name] for name in ("recent", "observe", "channel_multiple")}
    oracle, new = Oracle(model, ratio=ratio, **rules), []
    with torch.no_grad():
        output = oracle(input_ids=ids[:, :start], use_cache=True)
        output = oracle(input_ids=ids[:, start:], use_cache=True, **{CACHE: output[CACHE]})
        for _ in range(12):
            new.append(output.logits[0, -1].argmax().item())
            output = oracle(input_ids=torch.tensor([new[-1:]]), use_cache=True, **{CACHE: output[CACHE]})
    return tokenizer.decode(new).split("[EOS]")[0].split("w11")[0]


@pytest.mark.parametrize(
    ("method", "ratio"), [(DENSE, 0.0), (SIMULATED, 0.5), (PRUNED, 0.5)], ids=["dense", "simulated", "compiled"]
)
def test_the_question_is_asked_after_the_pruning(method, ratio):
    """Batched contexts of several lengths, and questions of two lengths."""
    model = random_model()
    lm = ThinkLM(model, tokenizer=word_tokenizer(), batch_size=3, **method)
    got = lm.generate_until([instance("generate_until", (text, ASKED)) for text in QUESTIONS], disable_tqdm=True)
    lm.close()
    assert [text.split() for text in got] == [asked_by_oracle(model, text, ratio).split() for text in QUESTIONS]
    assert lm.counters.contexts == 3
    assert lm.counters.generated_through_pruned == (lm.counters.generated_tokens if ratio else 0)


def test_asking_before_or_after_is_not_the_same():
    """Otherwise prune_before would do nothing."""
    lm = ThinkLM(random_model(), tokenizer=word_tokenizer(), **SIMULATED)
    before = {name: value for name, value in ASKED.items() if name != "prune_before"}
    asked = [[instance("generate_until", (text, how)) for text in QUESTIONS] for how in (ASKED, before)]
    after, within = (lm.generate_until(requests, disable_tqdm=True) for requests in asked)
    assert after != within


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("w1 w2 w3", "does not contain"), ("w50 w3", "nothing is left"), ("w1 w50" + " w2" * 30, "fit the model's")],
)
def test_a_context_that_cannot_be_divided_is_an_error(text, complaint):
    lm = ThinkLM(random_model(), tokenizer=word_tokenizer(), max_length=32, **DENSE)
    with pytest.raises(ValueError, match=rf"prune_before='w50'.* {complaint}"):
        lm.generate_until([instance("generate_until", (text, ASKED))], disable_tqdm=True)


class Slow:
    """A tokenizer without token offsets."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self.fast(text, add_special_tokens=add_special_tokens)["input_ids"]}


@pytest.mark.parametrize("wrapped", [lambda fast: fast, Slow], ids=["fast", "slow"])
def test_a_token_across_the_boundary_belongs_to_the_question(wrapped):
    vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "?", "c?"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("c", "?")]))
    tokenizer = wrapped(PreTrainedTokenizerFast(tokenizer_object=bpe))
    assert tails(tokenizer, ["abc?a", "?b?aa"], "?") == [(4, 0), (3, 0, 0)]
