"""Facts in three sentences (told, asked for, answered) with values drawn at random.

Words and wordings come in disjoint splits, `train` and `held_out`; `second` has the words of `held_out` in sentences of
its own. The module does not know how a chat is built from facts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from . import echoes, phrasing, relations, words
from . import wordings as w
from .sentences import Draw, Sentences
from .wordings import wordings

SPLITS = ("train", "held_out", "second")
# The other facts belong to a family. Training has many families to see.
SUBJECT_SHARE = {"train": 0.4, "held_out": 0.55, "second": 0.55}
# Values that make no sense for their question can only be copied.
ODD_VALUE_SHARE = 0.5
# Training sentences built by `phrasing` instead of taken from a list.
PUT_TOGETHER_SHARE = 0.4
# Training questions of another family that asks for the same kind of value: with one fact about that person or thing
# told, they have one answer, and reading has to find it without the usual words.
LOOSE_QUESTION_SHARE = 0.15
# Training facts under a relation drawn at random, and groups of facts that share owners and attributes.
RELATION_SHARE = 0.4
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
    return parts[:-num_held_out] if split == "train" else parts[-num_held_out:]


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
    if kind == "thing":
        return draw_thing(random, split)
    value = random.choice(split_parts(words.VALUES[kind], split))
    if random.random() < ODD_VALUE_SHARE:
        value = f"a {draw_noun(random, split)}" if value.startswith(("a ", "an ")) else draw_noun(random, split)
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


def draw_fact(random: Random, split: str, *, subjects: str | None = None) -> Fact:
    """A fact with sentences, names and values of `split`, attributes and things of `subjects` (`split` if None)."""
    subjects = split if subjects is None else subjects
    if split == "train" and random.random() < RELATION_SHARE:
        return _related(random, relations.relation(random, draws(random, split)))
    if random.random() < SUBJECT_SHARE[split]:
        return _subject_fact(random, split, subjects)
    parts = wordings(split)
    family = random.choice(parts.new_families if parts.new_families and random.random() < 0.2 else parts.families)
    names = {
        "p": draw_person(random, split),
        "t": draw_thing(random, subjects),
        "v": draw_value(random, family.value_kind, split),
    }
    if any("{q}" in statement for statement in family.statements):
        names["q"] = draw_person(random, split)
    statement, question = random.choice(family.statements), random.choice(family.questions)
    answer = random.choice(family.answers)
    if split == "train":
        if random.random() < WHOLE_ANSWER_SHARE:
            answer = family.answers[0]
        if random.random() < LOOSE_QUESTION_SHARE:
            question = random.choice(_loose_questions(family.value_kind, _named(statement)) or family.questions)
    # A question may only name what the statement named.
    statement, question, answer = _without_unknown(statement, question, answer)
    statement, question, answer = (part.format(**names) for part in (statement, question, answer))
    if split == "train":
        if random.random() < PUT_TOGETHER_SHARE:
            statement = phrasing.loosened(random, statement)
        if random.random() < PUT_TOGETHER_SHARE:
            question = phrasing.wrapped(random, question)
        if random.random() < NOISY_QUESTION_SHARE:
            question = relations.noisy(random, question)
    return Fact(statement, question, answer, names["v"])


def _named(sentence: str) -> frozenset[str]:
    return frozenset(re.findall(r"\{[pqt]\}", sentence))


@cache
def _loose_questions(kind: str, named: frozenset[str]) -> tuple[str, ...]:
    """Training questions for a value of `kind` that name something, and nothing but what is in `named`."""
    families = wordings("train").families
    return tuple(q for f in families if f.value_kind == kind for q in f.questions if _named(q) and _named(q) <= named)


def draws(random: Random, split: str) -> Draw:
    """What fills a relation drawn at random: names, things, nouns and values of `split`."""
    return Draw(
        person=lambda: draw_person(random, split),
        thing=lambda: draw_thing(random, split),
        noun=lambda: draw_noun(random, split),
        value=lambda kind: draw_value(random, kind, split),
    )


@cache
def _trained(kind: str) -> frozenset[str]:
    return frozenset(split_parts(harvested(kind), "train"))


def draw_echo(random: Random, sentence: str) -> tuple[str, Fact] | None:
    """A training fact told by a sentence of prose once a word of it is replaced: the new sentence and the fact."""

    def draw(kind: str) -> str:
        return draw_noun(random, "train") if kind == "noun" else draw_value(random, kind, "train")

    made = echoes.echo(random, sentence, draw, names=_trained("names"), nouns=_trained("nouns"))
    return made and (made.sentence, Fact(made.clause, made.question, made.answer, made.value))


def _related(random: Random, sentences: Sentences) -> Fact:
    question = sentences.question
    if random.random() < NOISY_QUESTION_SHARE:
        question = relations.noisy(random, question)
    return Fact(sentences.statement, question, sentences.answer, sentences.value, sentences.other_question)


def _without_unknown(statement: str, question: str, answer: str) -> tuple[str, str, str]:
    known = _named(statement)
    if not _named(question) <= known:
        subject = "{p}" if "{p}" in question else "{t}"
        known |= {subject}
        statement = f"this is about {subject if subject == '{p}' else 'the {t}'}: {statement}"
    return statement, question, answer if _named(answer) <= known else "It is {v}."


def _subject_fact(random: Random, split: str, subjects: str) -> Fact:
    if random.random() < 0.65:
        attribute, kind = random.choice(wordings(subjects).owned)
        owner = "my" if random.random() < 0.45 else draw_person(random, split) + "'s"
        asked = f"{owner} {attribute}"
        answered = f"{'your' if owner == 'my' else owner} {attribute}"
    else:
        attribute, kind = random.choice(wordings(subjects).of_things)
        asked = answered = "the " + attribute.format(t=draw_thing(random, subjects))
    names = {"s": asked, "z": answered, "v": draw_value(random, kind, split)}
    statement = random.choice(wordings(split).subject_statements).format(**names)
    question = random.choice(wordings(split).subject_questions).format(**names)
    answer = random.choice(w.SUBJECT_ANSWERS)
    if split == "train":
        if random.random() < PUT_TOGETHER_SHARE:
            statement = phrasing.spoken_statement(random, asked, names["v"])
        if random.random() < PUT_TOGETHER_SHARE:
            question = phrasing.spoken_question(random, asked)
        if random.random() < WHOLE_ANSWER_SHARE:
            answer = w.SUBJECT_ANSWERS[0]
    return Fact(statement, question, answer.format(**names), names["v"])


def distinct_facts(random: Random, split: str, count: int, *, subjects: str | None = None) -> list[Fact]:
    """`count` facts of `draw_fact`, of which no two answer the same question."""
    facts: dict[str, Fact] = {}
    waiting: list[Fact] = []
    if split == "train" and count > 1 and random.random() < KINDRED_SHARE:
        kindred = relations.kindred(random, draws(random, split), random.randint(2, count))
        waiting = [_related(random, sentences) for sentences in kindred]
    while len(facts) < count:
        fact = waiting.pop() if waiting else draw_fact(random, split, subjects=subjects)
        # The answer without its value names the subject, whatever the wording.
        facts.setdefault(
            fact.answer.replace(fact.value, "") if len(fact.answer) > len(fact.value) + 8 else fact.question,
            fact,
        )
    return list(facts.values())
