"""What the documents say against what the code has."""

from pathlib import Path

from think_compile.passes.refusal import Reason

DOCS = Path(__file__).parents[1] / "docs"


def test_every_reason_is_explained():
    text = (DOCS / "refusals.md").read_text()
    assert not [reason.name for reason in Reason if f"`{reason.name}`" not in text]
