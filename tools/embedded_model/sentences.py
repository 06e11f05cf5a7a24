"""A fact drawn at random as sentences, and what such facts are filled with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from . import phrasing

WRAPPED_SHARE = 0.25


class Sentences(NamedTuple):
    """One fact: told, asked for in two ways, answered."""

    statement: str
    question: str
    other_question: str
    answer: str
    value: str


class Draw(NamedTuple):
    """The draws of names, things, nouns and values that a relation is filled with (given by `facts.py`)."""

    person: Callable[[], str]
    thing: Callable[[], str]
    noun: Callable[[], str]
    value: Callable[[str], str]


def filled(
    random: Random, statements: Sequence[str], questions: Sequence[str], answer: str, names: dict[str, str]
) -> Sentences:
    """One of the statements and two of the questions, filled with `names` (the value as `v`) and loosely phrased."""
    asked = [random.choice(questions).format(**names) for _ in range(2)]
    asked = [phrasing.wrapped(random, text) if random.random() < WRAPPED_SHARE else text for text in asked]
    statement = phrasing.loosened(random, random.choice(statements).format(**names))
    return Sentences(statement, *asked, answer.format(**names) + ".", names["v"])


def plural(noun: str) -> str:
    """The noun with an s."""
    return noun if noun.endswith("s") else noun + "s"
