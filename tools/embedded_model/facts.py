"""Facts in three sentences (told, asked for, answered) with values drawn at random.

Words and wordings come in two disjoint splits, `train` and `held_out`. The module does not know how a chat is
built from facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from . import phrasing, relations, words
from . import wordings as w

SPLITS = ("train", "held_out")
# Values that make no sense for their question can only be copied.
ODD_VALUE_SHARE = 0.5
# Training sentences built by `phrasing` instead of taken from a list.
PUT_TOGETHER_SHARE = 0.6
# Training facts under a relation drawn at random, and groups of facts that share owners and attributes.
RELATION_SHARE = 0.65
KINDRED_SHARE = 0.3
# Training answers in the first, whole form: one form is learned sooner than several.
WHOLE_ANSWER_SHARE = 0.85
NOISY_QUESTION_SHARE = 0.08


@dataclass(frozen=True)
class Fact:
    """A fact told, asked for and answered; `value` is the part that only the context holds."""

    statement: str
    question: str
    answer: str
    value: str
    other_question: str | None = None


def split_parts(parts: tuple, split: str) -> tuple:
    """The training part (first four fifths) or the held-out part (the rest, at least one) of `parts`."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    num_held_out = max(1, len(parts) // 5)
    return parts[-num_held_out:] if split == "held_out" else parts[:-num_held_out]


@cache
def harvested(kind: str) -> tuple[str, ...]:
    """The `nouns` or `names` found often in the public-domain books, in a fixed random order.

    Many and odd words make copying general: with short lists a model learns the lists.
    """
    return tuple(Path(__file__).with_name(f"{kind}.txt").read_text(encoding="utf-8").split())


def draw_noun(random: Random, split: str) -> str:
    """A noun from the books."""
    return random.choice(split_parts(harvested("nouns"), split))


def capitalised(sentence: str) -> str:
    """The sentence with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def invented_name(random: Random, *, is_place: bool = False) -> str:
    """A name made of syllables, such as Trelvona or Quimford."""
    name = random.choice(words.ONSETS) + random.choice(words.VOWELS)
    if random.random() < 0.6:
        name += random.choice(words.MIDDLES) + random.choice(words.VOWELS[:5])
    return name + random.choice(words.PLACE_ENDINGS if is_place else words.ENDINGS)


def draw_value(random: Random, kind: str, split: str) -> str:
    """A value of the given kind; words come from the split, numbers and invented names are always fresh."""
    if kind == "code":
        return "".join(random.choice("0123456789") for _ in range(random.choice((3, 4, 4, 5, 6))))
    if kind == "number":
        return str(random.randint(2, random.choice((99, 999, 9999))))
    if kind == "age":
        return str(random.randint(3, 99))
    if kind == "phone":
        return (
            "".join(random.choice("0123456789") for _ in range(3))
            + "-"
            + "".join(random.choice("0123456789") for _ in range(4))
        )
    if kind == "time":
        return f"{random.randint(0, 23)}:{random.randint(0, 59):02d}"
    if kind == "date":
        return f"{random.choice(words.MONTHS)} {random.randint(1, 31)}"
    if kind == "name":
        return draw_person(random, split)
    if kind == "place":
        return invented_name(random, is_place=True)
    value = random.choice(split_parts(words.VALUES[kind], split))
    if random.random() < ODD_VALUE_SHARE:
        value = f"a {draw_noun(random, split)}" if " " in value else draw_noun(random, split)
    if kind == "word" and random.random() < 0.3:
        value += " " + draw_noun(random, split)
    return value


def draw_thing(random: Random, split: str) -> str:
    """A thing, mostly with an adjective."""
    things = words.THINGS if random.random() < 0.5 else harvested("nouns")
    thing = random.choice(split_parts(things, split))
    if random.random() < 0.3:
        return thing
    return f"{random.choice(split_parts(words.THING_ADJECTIVES, split))} {thing}"


def draw_person(random: Random, split: str) -> str:
    """A common first name, a name from the books or an invented one."""
    kind = random.choices(("common", "books", "invented"), (3, 4, 3))[0]
    if kind == "invented":
        return invented_name(random)
    return random.choice(split_parts(words.PERSONS if kind == "common" else harvested("names"), split))


def draw_fact(random: Random, split: str, *, wording: str | None = None) -> Fact:
    """A fact with names and values of `split` and sentences of `wording` (the same split if None)."""
    wording = split if wording is None else wording
    if wording == "train" and random.random() < RELATION_SHARE:
        return _related(random, relations.relation(random, draws(random, split)))
    if random.random() < 0.55:
        return _subject_fact(random, split, wording)
    families = w.HELD_OUT_FAMILIES if wording == "held_out" and random.random() < 0.2 else w.FAMILIES
    family = random.choice(families)
    is_new = families is w.HELD_OUT_FAMILIES
    names = {
        "p": draw_person(random, split),
        "t": draw_thing(random, split),
        "v": draw_value(random, family.value_kind, split),
    }
    statement = random.choice(family.statements if is_new else split_parts(family.statements, wording))
    question = random.choice(family.questions if is_new else split_parts(family.questions, wording))
    # A question may only name what the statement named.
    answer = random.choice(family.answers)
    if wording == "train" and random.random() < WHOLE_ANSWER_SHARE:
        answer = family.answers[0]
    statement, question, answer = _without_unknown(statement, question, answer, family)
    statement, question, answer = (part.format(**names) for part in (statement, question, answer))
    if wording == "train" and random.random() < PUT_TOGETHER_SHARE:
        statement, question = phrasing.loosened(random, statement), phrasing.wrapped(random, question)
    return Fact(statement, question, answer, names["v"])


def draws(random: Random, split: str) -> relations.Draw:
    """What fills a relation drawn at random: names, things, nouns and values of `split`."""
    return relations.Draw(
        person=lambda: draw_person(random, split),
        thing=lambda: draw_thing(random, split),
        noun=lambda: draw_noun(random, split),
        value=lambda kind: draw_value(random, kind, split),
    )


def _related(random: Random, sentences: relations.Sentences) -> Fact:
    question = sentences.question
    if random.random() < NOISY_QUESTION_SHARE:
        question = relations.noisy(random, question)
    return Fact(sentences.statement, question, sentences.answer, sentences.value, sentences.other_question)


def _without_unknown(statement: str, question: str, answer: str, family: w.Family) -> tuple[str, str, str]:
    known = [name for name in ("{p}", "{t}") if name in statement]
    if all(name in known for name in ("{p}", "{t}") if name in question):
        if not all(name in known for name in ("{p}", "{t}") if name in answer):
            answer = "It is {v}."
        return statement, question, answer
    subject = "{p}" if "{p}" in question else "{t}"
    lead = f"this is about {subject}: " if subject == "{p}" else f"this is about the {subject}: "
    return (
        lead + statement,
        question,
        answer if all(n in [*known, subject] for n in ("{p}", "{t}") if n in answer) else "It is {v}.",
    )


def _subject_fact(random: Random, split: str, wording: str) -> Fact:
    if random.random() < 0.65:
        attribute, kind = random.choice(split_parts(w.OWNED, split))
        owner = "my" if random.random() < 0.45 else draw_person(random, split) + "'s"
        asked = f"{owner} {attribute}"
        answered = f"{'your' if owner == 'my' else owner} {attribute}"
    else:
        attribute, kind = random.choice(split_parts(w.THING_ATTRIBUTES, split))
        asked = answered = "the " + attribute.format(t=draw_thing(random, split))
    names = {"s": asked, "z": answered, "v": draw_value(random, kind, split)}
    statement = random.choice(split_parts(w.SUBJECT_STATEMENTS, wording)).format(**names)
    question = random.choice(split_parts(w.SUBJECT_QUESTIONS, wording)).format(**names)
    if wording == "train" and random.random() < PUT_TOGETHER_SHARE:
        statement = phrasing.spoken_statement(random, asked, names["v"])
    if wording == "train" and random.random() < PUT_TOGETHER_SHARE:
        question = phrasing.spoken_question(random, asked)
    answer = random.choice(w.SUBJECT_ANSWERS)
    if wording == "train" and random.random() < WHOLE_ANSWER_SHARE:
        answer = w.SUBJECT_ANSWERS[0]
    return Fact(statement, question, answer.format(**names), names["v"])


def distinct_facts(random: Random, split: str, count: int, *, wording: str | None = None) -> list[Fact]:
    """`count` facts of which no two answer the same question."""
    facts: dict[str, Fact] = {}
    wording = split if wording is None else wording
    waiting: list[Fact] = []
    if wording == "train" and count > 1 and random.random() < KINDRED_SHARE:
        kindred = relations.kindred(random, draws(random, split), random.randint(2, count))
        waiting = [_related(random, sentences) for sentences in kindred]
    while len(facts) < count:
        fact = waiting.pop() if waiting else draw_fact(random, split, wording=wording)
        # The answer without its value names the subject, whatever the wording.
        facts.setdefault(
            fact.answer.replace(fact.value, "") if len(fact.answer) > len(fact.value) + 8 else fact.question,
            fact,
        )
    return list(facts.values())
