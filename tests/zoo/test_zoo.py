"""Every causal language model of the installed transformers: rewritten or refused by name, and none wrong."""

import warnings

import architectures
import coverage
import pytest
import transformers
from trial import try_out

from think_compile import ThinkWarning

# A few in every run, one for each way of attending and caching that the others vary.
FEW = ["bloom", "ctrl", "deepseek_v3", "falcon_mamba", "gemma2", "gpt_oss"]


def cases() -> list:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.zoo) for name in architectures.causal_names()]


@pytest.fixture(scope="module")
def document() -> str:
    return coverage.DOCUMENT.read_text()


def written_with(document: str) -> bool:
    return f"transformers {transformers.__version__} " in document


@pytest.mark.parametrize("ratio", [0.5, pytest.param(0.0, marks=pytest.mark.zoo)])
@pytest.mark.parametrize("name", cases())
def test_architecture(name, ratio, document):
    if f"| {name} |  | 0 | not tried" in document:
        pytest.skip("docs/coverage.md says why it was not tried")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        outcome = try_out(architectures.build(name), ratio)
    assert outcome.right, f"logits off by {outcome.error:.2e}, {outcome.natural:.2e} is natural"
    if outcome.packed < outcome.expected:
        assert outcome.found.refused, "a layer with a key cache is neither rewritten nor refused"
    if written_with(document) and ratio:
        assert str(coverage.row_of_outcome(name, outcome)) in document, "stale: python tests/zoo/coverage.py"


SLIDING = ["gemma2", "gpt_oss", "mistral", "gemma3_text", "gemma4_text", "mimo_v2_flash", "recurrent_gemma"]


@pytest.mark.parametrize("name", [*SLIDING[:2], *(pytest.param(name, marks=pytest.mark.zoo) for name in SLIDING[2:])])
def test_sliding_windows(name):
    """Windows that the prompt overfills, beside full layers or not: all layers are rewritten."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        outcome = try_out(architectures.build(name), 0.5, sliding=True)
    assert outcome.right, f"logits off by {outcome.error:.2e}, {outcome.natural:.2e} is natural"
    assert not outcome.found.refused, str(outcome.found)
    assert any(record.cache == "sliding" for record in outcome.found.rewritten)


def test_every_architecture_is_in_the_document(document):
    if written_with(document):
        assert all(f"\n| {name} |" in document for name in architectures.causal_names())
    assert coverage.WRONG not in document.partition("| architecture |")[2]
