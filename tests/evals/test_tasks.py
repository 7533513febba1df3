"""The offline tasks load without a network, and each prompt contains its answer once."""

import hashlib
import json
import socket
from collections import Counter
from functools import cache

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from think_compile.evals.tasks import FOLDER, prompts

SCORED = 128
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192}
SAMPLES = {
    "needle": 500, "multikey": 300, "alias": 200, "variables": 200, "continuation": 200, "text": 258,
    "commonsenseqa": 1000, "mmlu": 600, "piqa": 1000,
}  # fmt: skip
NUMBERS = ["needle_1k", "needle_2k", "needle_4k", "needle_8k", "multikey_2k", "multikey_4k"]
RETRIEVAL = [*NUMBERS, "alias_1k", "alias_2k", "variables_2k", "variables_4k"]
CHOICES = ["commonsenseqa_local", "mmlu_local", "piqa_local"]
KINDS = ["needle_1k", "variables_2k", "continuation_2k", "text_rolling", "commonsenseqa_local"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"something connects to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def manager():
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


@cache
def tasks():
    return manager().load("think_offline")["tasks"]


def prompts_of(name):
    task = tasks()[name]
    return [(doc, task.doc_to_text(doc)) for doc in task.test_docs()]


def length_of(name):
    return LENGTHS[name.rsplit("_", 1)[1]]


def asked_after(name):
    return name.replace("_", "_after_")


def test_every_file_is_a_task_of_the_group():
    files = {path.stem for path in FOLDER.glob("[!_]*.yaml")}
    assert files == {*tasks(), "think_offline"} == set(manager().all_tasks) - set(manager().all_tags)


def test_sample_counts():
    assert {name: len(task.test_docs()) for name, task in tasks().items()} == {
        name: SAMPLES[name.split("_")[0]] for name in tasks()
    }


def test_data_is_what_its_checksums_say():
    listed = dict(line.split("  ")[::-1] for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    data = [*FOLDER.glob("*.jsonl"), FOLDER / "text.txt"]
    assert listed == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data}
    assert sum(path.stat().st_size for path in data) < 2_500_000


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_stand_once_at_their_depth(name):
    for doc, prompt in prompts_of(name):
        body = prompt[len(prompts.NUMBER_ORDER) + 2 : prompt.index("\n\nQuestion:")]
        placed = sorted(zip(doc["at"], doc["keys"], doc["numbers"], strict=True), key=lambda fact: fact[0])
        before = 0  # the length of the facts placed so far
        for at, key, number in placed:
            fact = prompts.NUMBER.format(key, number)
            assert prompt.count(fact) == prompt.count(number) == 1
            assert body.index(fact) == min(at - doc["start"] + before, len(body) - len(fact))
            before += len(fact) + 1
        assert prompt.count(doc["keys"][0]) == 3  # the fact and the question
        assert tasks()[name].doc_to_target(doc) == doc["numbers"][0] == prompts.number_answer(doc)
        assert prompt.endswith(f"for {doc['keys'][0]} is")


@pytest.mark.parametrize("name", ["needle_1k", "needle_2k", "needle_4k", "needle_8k"])
def test_depths_and_regions_are_spread_evenly(name):
    docs = list(tasks()[name].test_docs())
    depths = [(doc["at"][0] - doc["start"]) / (doc["end"] - doc["start"]) for doc in docs]
    spread = [(i + 0.5) / len(docs) for i in range(len(docs))]
    assert max(abs(a - b) for a, b in zip(sorted(depths), spread, strict=True)) < 0.06
    assert abs(torch.corrcoef(torch.tensor([depths, [doc["start"] for doc in docs]]))[0, 1]) < 0.15
    starts = sorted(doc["start"] for doc in docs)
    assert len(set(starts)) == len(docs) and starts[-1] > len(prompts.text()) * 0.85


@pytest.mark.parametrize("name", ["alias_1k", "alias_2k"])
def test_aliases_follow_their_number(name):
    for doc, prompt in prompts_of(name):
        key, alias = doc["keys"]
        facts = [prompts.NUMBER.format(key, doc["numbers"][0]), prompts.ALIAS.format(alias, key)]
        assert [prompt.count(fact) for fact in facts] == [1, 1] and prompt.index(facts[0]) < prompt.index(facts[1])
        assert prompt.endswith(f"for {alias} is") and prompt.count(doc["numbers"][0]) == 1


@pytest.mark.parametrize("name", ["variables_2k", "variables_4k"])
def test_variables_pass_their_value_on_in_order(name):
    for doc, prompt in prompts_of(name):
        value, (first, second, third) = doc["value"], doc["names"]
        facts = [f"VAR {first} = {value}.", f"VAR {second} = VAR {first}.", f"VAR {third} = VAR {second}."]
        places = [prompt.index(fact) for fact in facts]
        assert places == sorted(places) and [prompt.count(fact) for fact in facts] == [1, 1, 1]
        question = prompt[prompt.index("Question:") :]
        assert question.count(value) == 2 and not any(variable in question for variable in doc["names"])
        assert tasks()[name].doc_to_target(doc) == f"{first}, {second}, {third}"


@pytest.mark.parametrize("name", RETRIEVAL)
def test_the_text_gives_no_answer_away(name):
    text = prompts.text()
    for doc in tasks()[name].test_docs():
        facts = [*doc.get("keys", []), *doc.get("numbers", []), *doc.get("names", []), doc.get("value", "12345")]
        assert not [fact for fact in facts if fact in text]
        assert len(set(facts)) == len(facts)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_asked_after_pruning_is_the_same_prompt_split_at_the_question(name):
    within, after = tasks()[name], tasks()[asked_after(name)]
    kwargs = dict(after.config.generation_kwargs)
    marker = kwargs.pop("prune_before")
    assert kwargs == within.config.generation_kwargs
    assert (list(after.test_docs()), after.config.process_results) == (
        list(within.test_docs()), within.config.process_results,
    )  # fmt: skip
    for doc, prompt in prompts_of(name):
        assert after.doc_to_text(doc) == prompt
        context, question = prompt.split(marker)  # occurs once
        assert context.endswith("\n\n") and 10 < len(question) < 250
        assert all(at <= doc["end"] for at in doc["at"])


@pytest.mark.parametrize("name", RETRIEVAL)
def test_characters_are_near_what_the_tokens_take(name):
    for _, prompt in prompts_of(name):
        assert 3.5 < len(prompt) / length_of(name) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", RETRIEVAL)
def test_tokens_are_a_little_below_the_nominal_length(name):
    room = tasks()[name].config.generation_kwargs["max_gen_toks"]
    for _, prompt in prompts_of(name):
        assert 0.93 * length_of(name) < len(smol_tokenizer()(prompt)["input_ids"]) <= length_of(name) - room


@pytest.mark.slow
@pytest.mark.parametrize("name", ["continuation_2k", "continuation_4k"])
def test_tokens_of_continuations(name):
    task = tasks()[name]
    for doc in task.test_docs():
        context, scored = (
            len(smol_tokenizer()(part)["input_ids"]) for part in (task.doc_to_text(doc), task.doc_to_target(doc))
        )
        assert 0.97 * length_of(name) < context + scored <= length_of(name) and scored + 3 >= SCORED and scored < 400


@cache
def smol_tokenizer():
    from think_compile import demo

    return demo.load_demo_model(Console())[1]


@pytest.mark.parametrize("name", ["continuation_2k", "continuation_4k"])
def test_continuations_continue_the_text(name):
    task, text = tasks()[name], prompts.text()
    for doc in task.test_docs():
        context, continuation = task.doc_to_text(doc), task.doc_to_target(doc)
        assert context + continuation == text[doc["start"] : doc["end"]].rstrip()
        assert continuation[0] in " \n" and not context[-1].isspace() and 400 < len(continuation) < 1600


def test_documents_are_the_text():
    docs = list(tasks()["text_rolling"].test_docs())
    assert [doc["start"] for doc in docs] == [0, *(doc["end"] for doc in docs[:-1])]
    assert len(prompts.text()) - docs[-1]["end"] < 6000
    assert tasks()["text_rolling"].doc_to_target(docs[0]) == prompts.text()[: docs[0]["end"]].rstrip()


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_complete_and_balanced(name):
    task = tasks()[name]
    docs = list(task.test_docs())
    kinds = len(docs[0]["choices"])
    golds = Counter(doc["gold"] for doc in docs)
    assert set(golds) == set(range(kinds)) and max(golds.values()) < 1.3 * len(docs) / kinds
    assert all(len(set(doc["choices"])) == kinds and task.doc_to_choice(doc) == doc["choices"] for doc in docs)
    questions = [doc["question"] for doc in [*docs, *task.fewshot_docs()]]
    assert len(set(questions)) == len(questions) == len(docs) + prompts.FEWSHOT


@pytest.mark.parametrize("name", CHOICES)
def test_examples_make_contexts_longer_than_the_window(name):
    task = tasks()[name]
    task.build_all_requests(limit=20, rank=0, world_size=1)
    contexts = {request.args[0] for request in task.instances}
    assert len(contexts) == 20 and min(map(len, contexts)) > 1400  # at least 300 tokens, 32 of them whole
    assert all(context.endswith("\nAnswer:") for context in contexts)


def test_scores():
    doc = {"numbers": ["48213", "11111"], "names": ["ABCDE", "FGHIJ", "KLMNO"]}
    assert prompts.score_number(doc, [" 48213."]) == {"acc": 1.0}
    assert prompts.score_number(doc, [" 48231, not 11111."]) == {"acc": 0.0}
    assert prompts.score_variables(doc, [" VAR KLMNO and ABCDE"]) == {"acc": pytest.approx(2 / 3)}
    whole = {"start": 0, "at": 19, "end": 40}
    part = prompts.text()[18:40].rstrip()
    assert prompts.score_continuation(whole, [(-3.5, False)]) == {"bits_per_byte": (-3.5, len(part))}


@pytest.fixture(scope="module")
def tiny():
    """A random model that reads bytes."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "<end>": len(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters) + 1, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16384, bos_token_id=None, eos_token_id=len(letters),
    )  # fmt: skip
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return HFLM(pretrained=LlamaForCausalLM(config).eval(), tokenizer=wrapped, device="cpu", batch_size=1)


@pytest.mark.host
@pytest.mark.parametrize("name", KINDS)
def test_the_harness_runs_a_task_of_each_kind(tiny, name):
    found = lm_eval.simple_evaluate(tiny, tasks=[name], task_manager=manager(), limit=1, bootstrap_iters=0)
    metrics = {key: value for key, value in found["results"][name].items() if key.endswith(",none")}
    if "bits_per_byte,none" in metrics:
        assert 6 < metrics["bits_per_byte,none"] < 12  # log2(257) is 8.0
    else:
        assert metrics["acc,none"] in (0, 1 / 3, 2 / 3, 1)
    json.dumps(found["results"])
