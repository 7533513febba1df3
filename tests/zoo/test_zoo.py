"""Every language model of the installed transformers is rewritten or refused by name, and none is wrong."""

import os
import time
import warnings

import architectures
import coverage
import pytest
import transformers
from trial import try_all, try_out
from workers import Died, Worker

from think_compile import ThinkWarning

# A few in every run, one for each kind of attention and cache; the others are variants.
FEW = ["bloom", "deepseek_v3", "gemma2", "gpt_oss", "seq2seq/t5"]
ALL = [*architectures.causal(), *architectures.seq2seq()]


def cases() -> list:
    few, others = pytest.mark.versions, pytest.mark.zoo
    return [pytest.param(a, id=str(a), marks=few if str(a) in FEW else others) for a in ALL]


@pytest.fixture(scope="module")
def document() -> str:
    return coverage.DOCUMENT.read_text()


def written_with(document: str) -> bool:
    return f"transformers {transformers.__version__} " in document


@pytest.mark.parametrize("what", cases())
def test_architecture(what, document):
    if reason := coverage.cannot_run(what):
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        trial = try_all(what.build())
    assert not trial.fault
    if written_with(document):
        assert str(coverage.row_of_trial(what.name, trial)) in document, "stale: python tests/zoo/coverage.py"


SLIDING = ["gemma2", "gpt_oss", "mistral", "gemma3_text", "gemma4_text", "mimo_v2_flash", "recurrent_gemma"]


@pytest.mark.parametrize("name", [*SLIDING[:2], *(pytest.param(name, marks=pytest.mark.zoo) for name in SLIDING[2:])])
def test_sliding_windows(name):
    """Windows overfilled by the prompt, with and without full layers: all layers are rewritten."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThinkWarning)
        (what,) = (a for a in ALL if str(a) == name)
        outcome, exact = try_out(what.build(), sliding=True)
    assert exact is not None and not outcome.fault + exact.fault
    assert not outcome.found.refused, str(outcome.found)
    assert any(record.cache == "sliding" for record in outcome.found.rewritten)


def test_every_architecture_is_in_the_document(document):
    if written_with(document):
        causal, _, seq2seq = document.partition("## Encoder-decoder")
        assert all(f"\n| {a.name} |" in (seq2seq if a.seq2seq else causal) for a in ALL)
    assert coverage.WRONG not in document


def test_every_representative_is_listed():
    assert set(FEW) <= {str(a) for a in ALL}


@pytest.mark.parametrize(("task", "argument"), [(time.sleep, 60), (os._exit, 3)], ids=["hangs", "dies"])
def test_a_process_that_hangs_or_dies_is_replaced(task, argument):
    worker = Worker(limit_s=5)
    try:
        with pytest.raises(Died, match="no result after 5 s" if task is time.sleep else "status 3"):
            worker.do(task, argument)
        worker.limit_s = 60
        assert worker.do(abs, -2) == 2
    finally:
        worker.stop()
