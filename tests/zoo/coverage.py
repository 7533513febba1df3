"""Writes docs/coverage.md: what becomes of every causal language model of the installed transformers.

    python tests/zoo/coverage.py [--jobs N]

Each architecture runs tiny, with random weights, plain and pruned, in a process of its own.
"""

from __future__ import annotations

import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["THINK_COMPILE_FALLBACK"] = "0"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import architectures  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import typer  # noqa: E402
from rich.progress import track  # noqa: E402
from trial import Outcome, generate, try_out  # noqa: E402

DOCUMENT = HERE.parents[1] / "docs" / "coverage.md"
WRONG = "**wrong**"


@dataclass(frozen=True)
class Row:
    """One line of the table; ``layers`` is how many keep a key for every token of the text, as far as known."""

    name: str
    layers: int | None
    rewritten: int
    reason: str

    def __str__(self) -> str:
        layers = "" if self.layers is None else str(self.layers)
        return f"| {self.name} | {layers} | {self.rewritten} | {self.reason} |"


def row_of(name: str) -> Row:
    """What becomes of one architecture."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model = architectures.build(name)
        with torch.no_grad():
            generate(model)
    except Exception as error:
        return Row(name, None, 0, f"not tried: the plain model cannot be built or run so: {_line(error)}")
    try:
        return row_of_outcome(name, try_out(model, 0.5))
    except Exception as error:
        return Row(name, None, 0, f"{WRONG}: {_line(error)}")


def row_of_outcome(name: str, outcome: Outcome) -> Row:
    """The row of an architecture that was tried."""
    reasons = sorted({record.reason.value for record in outcome.found.refused})
    if not outcome.right:
        reasons = [f"{WRONG}: logits off by {outcome.error:.1e}, {outcome.natural:.1e} is natural"]
    return Row(name, outcome.expected, outcome.packed, "; ".join(reasons))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:120]}"


def document(rows: list[Row]) -> str:
    """The whole document."""
    tried = [row for row in rows if row.layers is not None]
    cached = [row for row in tried if row.layers]
    whole = [row for row in cached if row.rewritten == row.layers]
    wrong = [row for row in rows if WRONG in row.reason]
    version = torch.__version__.split("+")[0]
    head = f"""# Coverage

Every architecture that transformers {transformers.__version__} lists as a causal language model, tiny and with random
weights, generating from a padded batch with its default cache at ratio 0.5 (torch {version}, op by op). Its
logits must be those of the plain model whose keys are zero-filled by the rules, up to rounding. Written by
`python tests/zoo/coverage.py`.

- {len(rows)} architectures, of which {len(tried)} could be tried;
- {len(cached)} of those keep a key for every token in some layer: {len(whole)} have **every such layer rewritten**;
- {len(wrong)} are wrong.

"Layers" counts those that keep a key for every token; the reasons are those of all layers left as they were.

| architecture | layers | rewritten | left as they were, because |
|---|---|---|---|
"""
    return head + "\n".join(str(row) for row in rows) + "\n"


def main(jobs: int = 2) -> None:
    """Try every architecture and write the document."""
    names = architectures.causal_names()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=8) as pool:
        rows = list(track(pool.map(row_of, names), description="architectures", total=len(names)))
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(document(rows))


if __name__ == "__main__":
    typer.run(main)
