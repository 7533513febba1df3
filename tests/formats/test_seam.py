"""Passes and runtime know no format: neither a format's file nor its parts."""

import ast
import re
from pathlib import Path

import contract
import pytest

import think_compile

ROOT = Path(think_compile.__file__).parent
KNOW_NO_FORMAT = sorted(
    [*ROOT.glob("passes/**/*.py"), *ROOT.glob("runtime/*.py"), ROOT / "backend.py", ROOT / "report.py"]
    + [ROOT / "cache" / name for name in ("handle.py", "cell.py", "operations.py")]
)
BASE = "think_compile.formats.base"
OF_ONE_FORMAT = {"pruned", "channels", "recent", "floor", "ring", "progress"}


def names_of_parts():
    """The names of all parts of all formats, except those that every format has."""
    sides = [side for form in contract.FORMATS.values() for side in (form.keys, form.values)]
    return {part.name for side in sides for part in side.parts(fixed=True)} - {"rows", "counters"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", KNOW_NO_FORMAT, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_base_of_formats_is_imported(path):
    found = {name for name in imports(ast.parse(path.read_text())) if name and name.startswith("think_compile.formats")}
    assert found <= {BASE}


@pytest.mark.parametrize("path", KNOW_NO_FORMAT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_names_a_part(path):
    forbidden = names_of_parts() | OF_ONE_FORMAT
    tree = ast.parse(path.read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.arg for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.keyword)) and node.arg}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not used & forbidden


def test_the_names_of_parts_are_found_where_they_are():
    """The names that the tests above search for exist."""
    assert {"channels", "ring", "codes", "middle"} <= names_of_parts()
    assert re.search(r"\bring\b", (ROOT / "formats" / "side.py").read_text())
