"""Facts told by the prose itself, for training alone: one word of a sentence is replaced by a fresh value.

No list of wordings has the variety of books. The question repeats words of the changed sentence, whole or in part,
so finding the sentence and copying what stands in the gap is all there is to learn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

_DETERMINERS = "the a an his her my your their its our this that every each no some"
_NUMBERS = "two three four five six seven eight nine ten twelve twenty thirty fifty hundred"
DETERMINERS, NUMBERS = frozenset(_DETERMINERS.split()), frozenset(_NUMBERS.split())
# After these a name is taken for a place.
INSIDE = frozenset({"in", "at", "near", "towards"})
FEWEST_HEAVY_WORDS = 2
# Words on each side of the gap that belong to the clause.
REACH = 9
ASKED = {
    "name": ("who", "who", "whom", "which person"),
    "place": ("where", "which place", "which town", "what place"),
    "number": ("how many", "how many", "what number of"),
    "noun": ("what", "what", "which thing"),
}


class Echo(NamedTuple):
    """The sentence as changed, and the fact it now tells: clause, question, answer, value."""

    sentence: str
    clause: str
    question: str
    answer: str
    value: str


def echo(
    random: Random, sentence: str, draw: Callable[[str], str], *, names: Iterable[str], nouns: Iterable[str]
) -> Echo | None:
    """A fact made of `sentence`, or None if it has no word that can be replaced; `draw` gives a value of a kind."""
    words = sentence.split(" ")
    slots = [(i, kind) for i in range(1, len(words)) if (kind := _kind(words, i, names, nouns))]
    if not slots:
        return None
    place, kind = random.choice(slots)
    value = draw(kind)
    words[place] = re.sub(r"\w[\w-]*", value, words[place], count=1)
    start, end = _clause(words, place)
    before = [_bare(word) for word in words[start:place]]
    after = [_bare(word) for word in words[place + 1 : end]]
    if len(_heavy(before + after)) < FEWEST_HEAVY_WORDS:
        return None
    clause = " ".join([*before, value, *after])
    return Echo(" ".join(words), clause, _question(random, kind, before, after), clause + ".", value)


def _bare(word: str) -> str:
    return word.strip("\"'.,;:!?()[]*\n")


def _kind(words: list[str], place: int, names: Iterable[str], nouns: Iterable[str]) -> str | None:
    word, previous = words[place], words[place - 1]
    if not word or "\n" in word or not re.fullmatch(r"\w[\w-]*[,;.!?\"]*", word):
        return None
    bare = _bare(word)
    if bare in names and previous and previous[-1].isalpha():
        return "place" if previous in INSIDE else "name"
    if bare in NUMBERS:
        return "number"
    return "noun" if bare in nouns and previous.lower() in DETERMINERS else None


def _clause(words: list[str], place: int) -> tuple[int, int]:
    """First and last word (exclusive) around `place` between two marks, at most `REACH` to either side."""
    start, end = place, place + 1
    while start > max(0, place - REACH) and re.fullmatch(r"[\"']?[\w'-]+", words[start - 1]):
        start -= 1
    while end < min(len(words), place + REACH) and re.fullmatch(r"[\w'-]+", words[end - 1]):
        end += 1
    return start, end


def _question(random: Random, kind: str, before: list[str], after: list[str]) -> str:
    asked = random.choice(ASKED[kind])
    if kind == "noun":
        # The article goes with the noun.
        before = before[:-1]
    # A part of the clause is enough, if it has words of weight.
    near, next_to = before[-random.randint(2, 6) :], after[: random.randint(1, 5)]
    if random.random() < 0.5 and _heavy(near + next_to):
        before, after = near, next_to
    left, right, heavy = " ".join(before), " ".join(after), _heavy(before + after)
    forms = [f"{left} {asked} {right}", f"fill the gap: {left} ... {right}"]
    if _heavy(after):
        forms += [f"{asked} {right}", f"{asked} was it that {right}"]
    if _heavy(before):
        forms += [f"{left} {asked}", f"{left} ...", f"{asked} - {left}", f"{asked} was it: {left}"]
    if len(heavy) >= 2:
        random.shuffle(heavy)
        some = " ".join(heavy[: random.randint(2, 4)])
        forms += [f"{asked} {some}", f"{some} {asked}", f"{asked} goes with {some}", f"{some}: {asked}"]
    return random.choice(forms).strip()


def _heavy(words: list[str]) -> list[str]:
    return [word for word in words if len(word) > 3]
