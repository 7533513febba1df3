"""From the committed records to prompts and scores; the YAML files name these functions.

A record of retrieval has the start and end of its text in text.txt, and its facts with their places, in characters; the
prompt is assembled on demand. The harness loads this file by its path, so nothing of the package is imported.
"""

from __future__ import annotations

import json
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from datasets import Dataset

HERE = Path(__file__).parent
FEWSHOT = 32  # the first records of a multiple-choice file are shown as examples, never asked

NUMBER = "The special magic number for {} is {}."
ALIAS = "The special magic number for {} is the same as the one for {}."
NUMBER_ORDER = "Special magic numbers are hidden in the text below. Memorize them: you will be asked for one of them."
NUMBER_QUESTION = (
    "Question: What is the special magic number for {0} in the text above?\nAnswer: The special magic number for {0} is"
)
VARIABLE = "VAR {} = {}."
VARIABLE_ORDER = "Assignments of variables are hidden in the text below. Memorize and track them."
VARIABLE_QUESTION = (
    "Question: Which variables are assigned the value {0} in the text above, directly or through another variable?\n"
    "Answer: The {1} variables that are assigned the value {0} are"
)


@cache
def text() -> str:
    """The prose of all tasks, ASCII."""
    return (HERE / "text.txt").read_text(encoding="ascii")


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The records of a JSONL file beside this one. The harness also passes all of the task's metadata."""
    return {"test": Dataset.from_list(_records(file))}


def load_choices(file: str, **_: Any) -> dict[str, Dataset]:
    """The records of multiple choice: the first ones are examples."""
    records = _records(file)
    return {"fewshot": Dataset.from_list(records[:FEWSHOT]), "test": Dataset.from_list(records[FEWSHOT:])}


def _records(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / file).read_text(encoding="utf-8").splitlines()]


def number_prompt(doc: dict[str, Any]) -> str:
    """Special magic numbers in text, and the question for the first number."""
    facts = [NUMBER.format(key, number) for key, number in zip(doc["keys"], doc["numbers"], strict=True)]
    return "\n\n".join([NUMBER_ORDER, with_facts(doc, facts), NUMBER_QUESTION.format(doc["keys"][0])])


def number_answer(doc: dict[str, Any]) -> str:
    """The expected number."""
    return doc["numbers"][0]


def alias_prompt(doc: dict[str, Any]) -> str:
    """A special magic number in text, a second key for it, and the question for the second key's number."""
    key, alias = doc["keys"]
    facts = [NUMBER.format(key, doc["numbers"][0]), ALIAS.format(alias, key)]
    return "\n\n".join([NUMBER_ORDER, with_facts(doc, facts), NUMBER_QUESTION.format(alias)])


def variable_prompt(doc: dict[str, Any]) -> str:
    """A chain of assignments in text, in order, and the question for all variables with its value."""
    names = doc["names"]
    values = [doc["value"], *(f"VAR {name}" for name in names)]
    facts = [VARIABLE.format(name, value) for name, value in zip(names, values, strict=False)]
    question = VARIABLE_QUESTION.format(doc["value"], len(names))
    return "\n\n".join([VARIABLE_ORDER, with_facts(doc, facts), question])


def variable_answer(doc: dict[str, Any]) -> str:
    """The names of all variables of the chain."""
    return ", ".join(doc["names"])


def with_facts(doc: dict[str, Any], facts: list[str]) -> str:
    """The record's text, ``facts[i]`` as a sentence of its own at ``doc["at"][i]``."""
    pieces, start = [], doc["start"]
    for at, fact in sorted(zip(doc["at"], facts, strict=True), key=itemgetter(0)):  # facts of one place stay in order
        pieces += [text()[start:at], fact, " "]
        start = at
    return "".join([*pieces, text()[start : doc["end"]]]).strip()


def score_number(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 if the answer contains the number."""
    return {"acc": float(doc["numbers"][0] in results[0])}


def score_variables(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The share of the variables named in the answer."""
    return {"acc": sum(name in results[0] for name in doc["names"]) / len(doc["names"])}


def context(doc: dict[str, Any]) -> str:
    """The text before a continuation; the space between them belongs to the continuation."""
    return text()[doc["start"] : doc["at"] - 1]


def continuation(doc: dict[str, Any]) -> str:
    """The text to be predicted, with the preceding space or line break."""
    return text()[doc["at"] - 1 : doc["end"]].rstrip()


def score_continuation(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood in nats and bytes, to be summed and divided by the harness."""
    return {"bits_per_byte": (results[0][0], len(continuation(doc).encode()))}


def document(doc: dict[str, Any]) -> str:
    """A whole stretch of text."""
    return text()[doc["start"] : doc["end"]].rstrip()
