"""Where in the text each sample begins and ends, and where its facts stand; drawn with seeds of their own."""

from __future__ import annotations

import random
import re
import string
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
SENTENCE = re.compile(r"\n|[.!?][\"')]? (?=[A-Z\"(])")
ANSWER_ROOM = 32  # tokens kept free below the nominal length: the answers are at most that long
FULL = 0.985  # a sample whose sentences fill less of its length begins a sentence later
# No name occurs in the text; evals/build_tasks.py checks that.
KEYS = """
Accra Adelaide Algiers Ankara Antwerp Asmara Athens Auckland Baghdad Baku Bamako Bangkok Beirut Belgrade Bogota
Bordeaux Bratislava Brisbane Bucharest Budapest Cairo Calgary Canberra Caracas Casablanca Colombo Dakar Damascus
Delhi Dhaka Dublin Durban Florence Geneva Ghent Glasgow Gothenburg Granada Guatemala Hamburg Hanoi Harare Havana
Istanbul Jakarta Kabul Kampala Karachi Khartoum Krakow Kyoto Lagos Leipzig Lima Lisbon Ljubljana Luanda Lusaka
Madrid Manila Maputo Marseille Melbourne Milan Mombasa Montevideo Mumbai Munich Nairobi Naples Odessa Osaka Oslo
Palermo Porto Prague Quito Rabat Reykjavik Riga Rotterdam Salzburg Sarajevo Seoul Seville Sofia Stockholm Tallinn
Tbilisi Tehran Toulouse Tripoli Tunis Utrecht Valencia Venice Vienna Vilnius Warsaw Yerevan Zagreb
"""
CITIES = KEYS.split()


@dataclass(frozen=True)
class Prose:
    """The text, cut at the beginnings of its sentences."""

    text: str
    cuts: Sequence[int]  # characters
    tokens: Sequence[int]  # before each cut

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> Prose:
        """Cuts ``text``, and counts its tokens as a Hugging Face fast tokenizer makes them."""
        starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
        cuts = [0, *(match.end() for match in SENTENCE.finditer(text))]
        return cls(text, cuts, [bisect_left(starts, cut - 1) for cut in cuts])

    def stretches(self, n: int, room: int) -> Iterator[tuple[int, int]]:
        """``n`` pairs of cuts, spread evenly over the text, between which almost ``room`` tokens lie."""
        last = bisect_right(self.tokens, self.tokens[-1] - 2 * room)
        for sample in range(n):
            start = sample * last // n
            while (end := self.end(start, room)) and self.tokens[end] - self.tokens[start] < FULL * room:
                start += 1
            yield start, end

    def end(self, start: int, room: int) -> int:
        """The last cut that is at most ``room`` tokens after the cut ``start``."""
        return bisect_right(self.tokens, self.tokens[start] + room) - 1

    def at_depth(self, start: int, end: int, depth: float) -> int:
        """The cut between two others that is nearest to a share of the tokens between them."""
        wanted = self.tokens[start] + depth * (self.tokens[end] - self.tokens[start])
        return min(range(start, end + 1), key=lambda cut: abs(self.tokens[cut] - wanted))


def numbers(prose: Prose, n: int, length: int, *, keys: int, overhead: int, seed: str) -> list[Record]:
    """Retrieval of the first of ``keys`` special magic numbers; ``overhead`` tokens of the prompt are not text."""
    draw, records = random.Random(seed), []
    depths = zip(*(spread(n, draw) for _ in range(keys)), strict=True)
    for depth, stretch in zip(depths, prose.stretches(n, length - overhead - ANSWER_ROOM), strict=True):
        values = draw.sample(range(10_000, 100_000), keys)
        facts = {"keys": draw.sample(CITIES, keys), "numbers": [str(value) for value in values]}
        records.append(place(prose, stretch, depth) | facts)
    return records


def aliases(prose: Prose, n: int, length: int, *, overhead: int, seed: str) -> list[Record]:
    """A number, and later in the text a second name for its key."""
    draw, records = random.Random(seed), []
    for stretch in prose.stretches(n, length - overhead - ANSWER_ROOM):
        depths = sorted(draw.random() for _ in range(2))
        facts = {"keys": draw.sample(CITIES, 2), "numbers": [str(draw.randrange(10_000, 100_000))]}
        records.append(place(prose, stretch, depths) | facts)
    return records


def variables(prose: Prose, n: int, length: int, *, overhead: int, seed: str) -> list[Record]:
    """A value that a chain of three variables passes on, in the order of the text."""
    draw, records = random.Random(seed), []
    for stretch in prose.stretches(n, length - overhead - ANSWER_ROOM):
        depths = sorted(draw.random() for _ in range(3))
        names = ["".join(draw.sample(string.ascii_uppercase, 5)) for _ in depths]
        facts = {"names": names, "value": str(draw.randrange(10_000, 100_000))}
        records.append(place(prose, stretch, depths) | facts)
    return records


def continuations(prose: Prose, n: int, length: int, *, scored: int) -> list[Record]:
    """Text of ``length`` tokens of which the last sentences, at least ``scored`` tokens, are to be predicted."""
    records = []
    for start, end in prose.stretches(n, length):
        at = bisect_right(prose.tokens, prose.tokens[end] - scored) - 1
        records.append({"start": prose.cuts[start], "end": prose.cuts[end], "at": prose.cuts[at]})
    return records


def documents(prose: Prose, length: int) -> list[Record]:
    """The whole text in stretches of at most ``length`` tokens that do not overlap."""
    records, start = [], 0
    while prose.tokens[-1] - prose.tokens[start] >= length:
        end = prose.end(start, length)
        records.append({"start": prose.cuts[start], "end": prose.cuts[end]})
        start = end
    return records


def spread(n: int, draw: random.Random) -> list[float]:
    """``n`` depths, evenly spread between 0 and 1, shuffled."""
    depths = [(sample + 0.5) / n for sample in range(n)]
    draw.shuffle(depths)
    return depths


def place(prose: Prose, stretch: tuple[int, int], depths: Sequence[float]) -> Record:
    """Where a stretch begins and ends and where facts at these depths stand, in characters."""
    start, end = stretch
    at = [prose.cuts[prose.at_depth(start, end, depth)] for depth in depths]
    return {"start": prose.cuts[start], "end": prose.cuts[end], "at": at}
