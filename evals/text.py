"""Prose from the Jargon File: one paragraph a line, ASCII, without tables, lists of entries and cross-references."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from pathlib import Path

BEGINNING = "Chapter 1. Hacker Slang and Hacker Culture"  # after the contents and a table of glyphs
MEMBER = "./usr/share/doc/jargon-text/jargon.txt.gz"
SHORTEST = 120  # characters of a paragraph that is kept: shorter ones are headings, references and lists
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "\xa0": " ", "—": "-", "−": "-", "·": "-"})
# Paragraphs left out: crude ones, jokes about groups of people, and digits that could be taken for an answer's.
UNWANTED = re.compile(
    r"f\*?u\*?ck|shit|\bcrap|\bsex|\brap(?:e|ing)\b|\bwhore|bitch|masturbat|orgasm|\bgay\b|\bJew|\d{5}", re.I
)
REFERENCE = re.compile(r" ?\(?(?:\b[Ss]ee|\b[Cc]ompare|\b[Cc]ontrast)(?: also)? \{[^.()]*[.)]\)?")
HEADWORD = re.compile(r":(?P<word>[^:]+):(?: .*)?")


def read_debian_text(package: Path) -> str:
    """The Jargon File out of its Debian package, which is an ar archive that holds a tar archive."""
    with tarfile.open(fileobj=io.BytesIO(_ar_member(package.read_bytes(), "data.tar"))) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        return gzip.decompress(member.read()).decode("utf-8")


def _ar_member(archive: bytes, prefix: str) -> bytes:
    """The first member whose name starts with ``prefix``; headers are 60 bytes, members padded to even sizes."""
    start = len(b"!<arch>\n")
    while start < len(archive):
        name, size = archive[start : start + 16].decode(), int(archive[start + 48 : start + 58])
        if name.startswith(prefix):
            return archive[start + 60 : start + 60 + size]
        start += 60 + size + size % 2
    raise ValueError(f"The archive has no member {prefix}.")


def prose(jargon: str) -> str:
    """The paragraphs that read as prose, each on a line; an entry's first one begins with its headword."""
    text = jargon.translate(ASCII)
    kept, headword = [], ""
    for block in re.split(r"\n\s*\n", text[text.index(BEGINNING) :]):
        paragraph = " ".join(block.split())
        if entry := HEADWORD.fullmatch(paragraph):
            headword = entry["word"]
        elif is_prose(paragraph):
            kept.append(plain(f"{headword}: {paragraph}" if headword else paragraph))
            headword = ""
    return "".join(f"{paragraph}\n" for paragraph in kept if len(paragraph) >= SHORTEST)


def is_prose(paragraph: str) -> bool:
    """Whether the paragraph is long enough, ASCII, ends as a sentence does, and holds nothing unwanted."""
    ends = paragraph.endswith((".", "!", "?", '."', '!"', '?"', ".)"))
    return len(paragraph) >= SHORTEST and ends and paragraph.isascii() and not UNWANTED.search(paragraph)


def plain(paragraph: str) -> str:
    """The paragraph without its references to other entries, and without the braces that mark their names."""
    without = REFERENCE.sub("", paragraph)
    return re.sub(r"[{}]", "", without).strip()
