"""Writes docs/coverage.md: the result for every language model of the installed transformers.

    python tests/zoo/coverage.py [--jobs N]      tries all and writes the document
    python tests/zoo/coverage.py NAME...         prints the rows of these and writes nothing

Each architecture runs tiny, with random weights, plain and pruned, in a process that may die without harm.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["THINK_COMPILE_FALLBACK"] = "0"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import architectures  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import typer  # noqa: E402
from architectures import Architecture  # noqa: E402
from rich.progress import track  # noqa: E402
from trial import Outcome, Trial, generate, try_all  # noqa: E402
from workers import Died, Worker  # noqa: E402

DOCUMENT = HERE.parents[1] / "docs" / "coverage.md"
WRONG = "**wrong**"
LIMIT_S = 300


@dataclass(frozen=True)
class Row:
    """One line of a table. ``layers``: the number that keep a key for every token; None: not tried."""

    name: str
    reason: str
    layers: int | None = None
    latent: int = 0
    dynamic: int = 0
    static: int | None = None

    def __str__(self) -> str:
        if self.layers is None:
            return f"| {self.name} | | | | {self.reason} |"
        layers = f"{self.layers} (and {self.latent} latent)" if self.latent else str(self.layers)
        static = "-" if self.static is None else self.static
        return f"| {self.name} | {layers} | {self.dynamic} | {static} | {self.reason} |"

    @property
    def whole(self) -> bool:
        """Whether every layer that keeps a key for every token was rewritten, with each usable cache."""
        return self.dynamic == self.layers and self.static in (None, self.layers)


# ------------------------------------------------------------------------------------------- one architecture


def cannot_run(what: Architecture) -> str:
    """The reason why the plain model cannot be tried, or ""."""
    _quiet()
    try:
        with torch.no_grad():
            generate(what.build())
    except Exception as error:
        return what.note or f"the plain model cannot be built or run so: {_line(error)}"
    return ""


def row_of(what: Architecture) -> Row:
    """The result for one architecture."""
    if reason := cannot_run(what):
        return Row(what.name, f"not tried: {reason}")
    try:
        return row_of_trial(what.name, try_all(what.build()))
    except Exception as error:
        return Row(what.name, f"{WRONG}: {_line(error)}")


def row_of_trial(name: str, trial: Trial) -> Row:
    """The row of a tried architecture."""
    dynamic, static = trial.dynamic, trial.static
    reason = f"{WRONG}: {trial.fault}" if trial.fault else _reasons(dynamic, static)
    return Row(name, reason, dynamic.expected, dynamic.latent, dynamic.packed, static and static.packed)


def _reasons(dynamic: Outcome, static: Outcome | None) -> str:
    """The reasons for refused layers; those of a single kind of cache are marked so."""
    found = [{record.reason.value for record in one.found.refused} for one in (dynamic, static or dynamic)]
    both, only = found[0] & found[1], {"dynamic": found[0] - found[1], "static": found[1] - found[0]}
    told = sorted(both) + [f"{kind} cache: {text}" for kind, texts in only.items() for text in sorted(texts)]
    return "; ".join(told)


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:120]}"


# -------------------------------------------------------------------------------------------------- all of them


def _safe_row(worker: Worker, what: Architecture) -> Row:
    """The row, even if the architecture kills its process."""
    try:
        return worker.do(row_of, what)
    except Died as ours:
        try:
            reason = worker.do(cannot_run, what)
        except Died as plain:
            reason = f"of the plain model, {plain}"
        return Row(what.name, f"not tried: {reason}" if reason else f"{WRONG}: {ours}")


def rows_of(listed: list[Architecture], jobs: int) -> Iterator[Row]:
    """The rows in order, as they become available."""
    free: SimpleQueue[Worker] = SimpleQueue()
    workers = [Worker(LIMIT_S) for _ in range(jobs)]
    for worker in workers:
        free.put(worker)

    def row(what: Architecture) -> Row:
        worker = free.get()
        try:
            return _safe_row(worker, what)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(row, listed)
    for worker in workers:
        worker.stop()


# ------------------------------------------------------------------------------------------------- the document

HEAD = """# Coverage

Every architecture that transformers {transformers} lists as a causal or as an encoder-decoder language model, tiny
and with random weights, generating from a padded batch with its default (dynamic) cache and with a static one (torch
{torch}, op by op): at ratio 0.5 its logits must be those of the plain model whose keys are zero-filled by the rules, at
ratio 0 those of the plain model, up to rounding. Written by `python tests/zoo/coverage.py`; `pytest -m zoo` does the
same.

"Layers" are those of the plain model's own cache that keep a key for every token; a sliding window, a recurrent state,
a compressed memory and an encoder's output are none, and a latent (multi-head latent attention) is counted apart.
With `decode=True` every latent is stored in codes, and the logits are those of the plain model on the decoded cache
(`tests/zoo/test_latents.py`).
"Dynamic" and "static" tell how many of them were rewritten with that cache; "-": plain transformers fails with a
static cache there. The reasons are those of all attention left as it was.
"""

TABLE = """
## {title}

- {all} architectures, of which {tried} could be tried;
- {cached} of those keep a key for every token in some layer: {whole} have **every such layer rewritten**;
- {wrong} are wrong.

| architecture | layers | dynamic | static | left as they were, because |
|---|---|---|---|---|
{rows}
"""


def document(causal: list[Row], seq2seq: list[Row]) -> str:
    """The whole document."""
    head = HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])
    return head + _table("Causal language models", causal) + _table("Encoder-decoder models", seq2seq)


def _table(title: str, rows: list[Row]) -> str:
    cached = [row for row in rows if row.layers]
    return TABLE.format(
        title=title,
        all=len(rows),
        tried=sum(row.layers is not None for row in rows),
        cached=len(cached),
        whole=sum(row.whole for row in cached),
        wrong=sum(WRONG in row.reason for row in rows),
        rows="\n".join(map(str, rows)),
    )


def main(names: Annotated[list[str] | None, typer.Argument()] = None, jobs: int = 2) -> None:
    """Try every architecture and write the document; with NAMES, print the rows of these."""
    causal, seq2seq = architectures.causal(), architectures.seq2seq()
    if names:
        for row in rows_of([what for what in causal + seq2seq if what.name in names], jobs):
            print(row, flush=True)
        return
    rows = list(track(rows_of(causal + seq2seq, jobs), "architectures", total=len(causal + seq2seq)))
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(rows[: len(causal)], rows[len(causal) :]))


if __name__ == "__main__":
    typer.run(main)
