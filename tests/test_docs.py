"""The documents against the code."""

import re
from pathlib import Path

import pytest

from evals import document
from think_compile.passes.refusal import Reason

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [path for folder in (ROOT, DOCS, ROOT / "think_compile" / "evals" / "tasks") for path in folder.glob("*.md")]


def test_every_reason_is_explained():
    text = (DOCS / "refusals.md").read_text()
    assert not [reason.name for reason in Reason if f"`{reason.name}`" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]


def test_the_tables_of_accuracy_are_the_results():
    text = document.DOCUMENT.read_text()
    assert text.count("<!-- end ") == len(document.TABLES)
    assert document.filled(text) == text, "python -m evals.document writes them"
