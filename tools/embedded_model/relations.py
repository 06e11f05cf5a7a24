"""Facts whose relation is drawn at random, for training alone: any noun as attribute, any verb as deed.

With a short list of attributes a model learns the list: it recalled 90 % of values told under attributes it knew
and 47 % under new ones, while new ways of telling and asking cost little. Here a relation means nothing, so only
reading can answer. `facts.py` decides when these are used; no word that only held-out relations use is drawn.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from . import phrasing
from .wordings import wordings

# Words of the held-out attributes and families of `wordings.py` that training must not see as a relation.
_HELD_OUT_WORDS = (
    "instrument train appointment wake-up horse drink library card garage hiding combination guardian label "
    "weigh weighs weighed weight heavy pounds marry marries married see seen saw meet met"
)
NEVER_TRAINED = frozenset(_HELD_OUT_WORDS.split())

# fmt: off
PREPOSITIONS = ("of", "of", "of", "for", "for", "on", "in", "behind", "under", "beside", "near", "inside")
KINDS = ("code", "code", "number", "age", "phone", "time", "date", "name", "name", "place", "place", "word", "word",
         "colour", "food", "animal", "object", "job", "instrument")
TAGS = ("number", "code", "name", "colour", "place", "time", "day", "word", "size", "price", "owner", "key", "sign")
ADJECTIVES = (
    "favourite", "first", "last", "next", "old", "new", "secret", "second", "real", "main", "other", "best", "usual",
    "spare", "official", "private", "public", "daily", "final", "early", "late", "common", "hidden", "lucky", "true",
)
# Base, past, participle.
_VERBS = (
    "find/found/found buy/bought/bought sell/sold/sold teach/taught/taught help/helped/helped call/called/called "
    "visit/visited/visited follow/followed/followed chase/chased/chased paint/painted/painted hide/hid/hidden "
    "steal/stole/stolen lose/lost/lost carry/carried/carried drop/dropped/dropped break/broke/broken "
    "mend/mended/mended clean/cleaned/cleaned draw/drew/drawn photograph/photographed/photographed "
    "invite/invited/invited thank/thanked/thanked praise/praised/praised blame/blamed/blamed save/saved/saved "
    "rescue/rescued/rescued catch/caught/caught hire/hired/hired train/trained/trained choose/chose/chosen "
    "pick/picked/picked send/sent/sent bring/brought/brought fetch/fetched/fetched greet/greeted/greeted "
    "warn/warned/warned trust/trusted/trusted fear/feared/feared love/loved/loved hate/hated/hated "
    "admire/admired/admired copy/copied/copied describe/described/described mention/mentioned/mentioned "
    "recognise/recognised/recognised watch/watched/watched hear/heard/heard guard/guarded/guarded "
    "wash/washed/washed build/built/built design/designed/designed invent/invented/invented "
    "discover/discovered/discovered plant/planted/planted bury/buried/buried burn/burned/burned "
    "store/stored/stored park/parked/parked show/showed/shown borrow/borrowed/borrowed lend/lent/lent "
    "open/opened/opened close/closed/closed order/ordered/ordered deliver/delivered/delivered "
    "repair/repaired/repaired test/tested/tested keep/kept/kept win/won/won prepare/prepared/prepared "
    "study/studied/studied serve/served/served replace/replaced/replaced beat/beat/beaten push/pushed/pushed "
    "throw/threw/thrown collect/collected/collected count/counted/counted forget/forgot/forgotten"
)
DEEDS = tuple(tuple(verb.split("/")) for verb in _VERBS.split() if verb.split("/")[0] not in NEVER_TRAINED)
TIES = (
    "engaged to", "related to", "afraid of", "in love with", "angry with", "known to", "proud of", "jealous of",
    "loyal to", "kind to", "the cousin of", "the friend of", "the uncle of", "the rival of", "the partner of",
    "the guest of", "the heir of", "the pupil of", "the successor of", "next to", "taller than", "older than",
    "stronger than", "sitting beside", "waiting for", "working with", "living with", "the same age as", "fond of",
    "the boss of", "the teacher of", "tired of", "looking for", "named after", "compared with", "in debt to",
)
# Adjective of a measure, and its units.
MEASURES = tuple((adjective, units.split()) for adjective, units in (
    ("long", "feet miles inches metres yards hours minutes"), ("tall", "feet inches metres"),
    ("old", "years days weeks"), ("wide", "feet inches metres"), ("deep", "feet metres fathoms"),
    ("high", "feet metres storeys"), ("far", "miles steps leagues"), ("thick", "inches pages"), ("big", "acres rooms"),
))
HOLDING = (
    ("hold", "holds"), ("need", "needs"), ("contain", "contains"), ("carry", "carries"), ("have", "has"),
    ("bear", "bears"), ("cost", "costs"), ("use", "uses"), ("want", "wants"), ("take", "takes"), ("feed", "feeds"),
    ("make", "makes"), ("earn", "earns"), ("give", "gives"), ("show", "shows"), ("lack", "lacks"),
)
# (how it is told, how it is asked for, answer): `{b}` base, `{d}` past and `{q}` participle of a deed.
DEED_FAMILIES = (
    ("name", ("{p} {d} {v}", "{v} was {q} by {p}", "it was {v} that {p} {d}", "{p} once {d} {v}"),
     ("who did {p} {b}", "whom did {p} {b}", "who was {q} by {p}", "{p} {d} whom", "tell me who {p} {d}",
      "which person did {p} {b}", "do you remember who {p} {d}"), "{p} {d} {v}"),
    ("name", ("{v} {d} {p}", "{p} was {q} by {v}", "it was {v} who {d} {p}", "{v} once {d} {p}"),
     ("who {d} {p}", "by whom was {p} {q}", "{p} was {q} by whom", "who was it that {d} {p}", "tell me who {d} {p}",
      "who has {q} {p}"), "{v} {d} {p}"),
    ("name", ("{v} {d} the {t}", "the {t} was {q} by {v}", "it was {v} who {d} the {t}", "{v} has {q} the {t}"),
     ("who {d} the {t}", "by whom was the {t} {q}", "the {t} was {q} by whom", "who has {q} the {t}",
      "tell me who {d} the {t}", "which person {d} the {t}"), "{v} {d} the {t}"),
    ("thing", ("{p} {d} the {v}", "the {v} was {q} by {p}", "what {p} {d} was the {v}", "{p} has {q} the {v}"),
     ("what did {p} {b}", "what was {q} by {p}", "which thing did {p} {b}", "what has {p} {q}",
      "tell me what {p} {d}", "{p} {d} what"), "{p} {d} the {v}"),
    ("place", ("{p} {d} the {t} in {v}", "in {v} {p} {d} the {t}", "the {t} was {q} in {v} by {p}",
               "it was in {v} that {p} {d} the {t}", "{p} went to {v} and {d} the {t}"),
     ("where did {p} {b} the {t}", "where was the {t} {q}", "in which place did {p} {b} the {t}",
      "tell me where {p} {d} the {t}", "{p} {d} the {t} where", "where has {p} {q} the {t}"),
     "{p} {d} the {t} in {v}"),
    ("place", ("{p} was {q} in {v}", "in {v} {p} was {q}", "they {d} {p} in {v}", "{v} is where {p} was {q}"),
     ("where was {p} {q}", "in which town was {p} {q}", "where did they {b} {p}", "tell me where {p} was {q}"),
     "{p} was {q} in {v}"),
    ("time", ("{p} {d} the {t} at {v}", "at {v} {p} {d} the {t}", "the {t} was {q} at {v} by {p}"),
     ("when did {p} {b} the {t}", "when was the {t} {q}", "at what time did {p} {b} the {t}",
      "tell me when {p} {d} the {t}"), "{p} {d} the {t} at {v}"),
    ("date", ("{p} {d} the {t} on {v}", "on {v} {p} {d} the {t}", "{p} was {q} on {v} with the {t}"),
     ("when did {p} {b} the {t}", "on what day did {p} {b} the {t}", "which date was it with {p} and the {t}"),
     "{p} {d} the {t} on {v}"),
    ("number", ("{p} {d} {v} {n}", "{v} {n} were {q} by {p}", "altogether {p} {d} {v} {n}", "of {n} {p} {d} {v}"),
     ("how many {n} did {p} {b}", "how many {n} were {q} by {p}", "what number of {n} did {p} {b}",
      "tell me how many {n} {p} {d}", "{p} {d} how many {n}"), "{p} {d} {v} {n}"),
)
ATTRIBUTE_QUESTIONS = (
    "what {a} does {o} have", "which {a} does {o} have", "what {a} has {o}", "{o} has which {a}",
    "tell me the {a} that {o} has", "which {a} belongs to {o}", "what sort of {a} is {o}'s", "{o}: {a}",
    "what {a} did I give for {o}", "what is it that {o} has as {a}", "about {o}, which {a} is it",
)
ATTRIBUTE_STATEMENTS = (
    "{o} has {v} as {a}", "{o} has the {a} {v}", "the {a} {v} belongs to {o}", "{o} got {v} for a {a}",
    "when it comes to {a}, {o} has {v}", "{o} goes by {v} as far as {a} is concerned", "{o}'s {a}: {v}",
    "with {o} the {a} is {v}", "{v} is what {o} has for {a}", "about {o}: the {a} is {v}",
)
_SMALL_WORDS = "the a an is was what which did do does you me my of tell please to that it say know remember can could"
DROPPED = frozenset(_SMALL_WORDS.split())
# fmt: on


class Sentences(NamedTuple):
    """One fact: told, asked for in two ways, answered."""

    statement: str
    question: str
    other_question: str
    answer: str
    value: str


class Draw(NamedTuple):
    """The draws of names, things, nouns and values that a relation is filled with (given by `facts.py`)."""

    person: object
    thing: object
    noun: object
    value: object


def attribute(random: Random, draw: Draw) -> str:
    """What something may have: any noun, at times with an adjective, another noun or a tag such as `number`."""
    while True:
        noun = draw.noun()
        made = random.choice((
            noun, noun, noun, f"{random.choice(ADJECTIVES)} {noun}", f"{random.choice(ADJECTIVES)} {noun}",
            f"{noun} {draw.noun()}", f"{noun} {random.choice(TAGS)}", f"{noun} {random.choice(TAGS)}",
            f"{noun}'s {random.choice(TAGS)}",
            f"{random.choice(ADJECTIVES)} {noun} {random.choice(TAGS)}",
        ))  # fmt: skip
        if not NEVER_TRAINED & set(made.replace("'s", "").split()):
            return made


def relation(random: Random, draw: Draw, *, owner: str | None = None, about: str | None = None) -> Sentences:
    """A fact under a relation drawn at random; `owner` and `about` (an attribute) fix parts of it."""
    if owner is None and about is None and random.random() < 0.4:
        return _deed(random, draw) if random.random() < 0.75 else _measure(random, draw)
    return _attribute(random, draw, owner, about or attribute(random, draw))


def kindred(random: Random, draw: Draw, count: int) -> list[Sentences]:
    """`count` facts that share owners and attributes: only both together tell which is meant."""
    owners = ["my", *(draw.person() for _ in range(1 + count // 2))]
    about = [attribute(random, draw) for _ in range(1 + count // 2)]
    pairs = random.sample([(owner, name) for owner in owners for name in about], count)
    return [relation(random, draw, owner=owner, about=name) for owner, name in pairs]


def noisy(random: Random, question: str) -> str:
    """The question as typed in a hurry: small words left out, or its last words first."""
    words = question.split()
    if random.random() < 0.5:
        kept = [word for word in words if word not in DROPPED or random.random() < 0.6]
    else:
        cut = random.randrange(len(words))
        kept = [*words[cut:], *words[:cut]]
    return " ".join(kept) if len(kept) > 1 else question


def _subjects(random: Random, owner: str, name: str) -> str:
    if owner == "my":
        return random.choice((f"my {name}", f"my {name}", f"my own {name}", f"the {name} of mine"))
    if owner.startswith("the "):
        return f"the {name} {random.choice(PREPOSITIONS)} {owner}"
    return random.choice((f"{owner}'s {name}", f"{owner}'s {name}", f"the {name} of {owner}"))


def _attribute(random: Random, draw: Draw, owner: str | None, name: str) -> Sentences:
    if owner is None:
        owner = random.choices(("my", draw.person(), f"the {draw.thing()}"), (3, 4, 3))[0]
    value = draw.value(random.choice(KINDS))
    told = _subjects(random, owner, name)
    # Mostly asked for in the same words, so that answers have one form to learn.
    asked = told if random.random() < 0.7 else _subjects(random, owner, name)
    statement = phrasing.spoken_statement(random, told, value)
    if random.random() < 0.5:
        statement = random.choice(wordings("train").subject_statements).format(s=told, v=value)
    elif owner != "my" and random.random() < 0.3:
        statement = phrasing.loosened(random, random.choice(ATTRIBUTE_STATEMENTS).format(o=owner, a=name, v=value))
    questions = []
    for _ in range(2):
        question = phrasing.spoken_question(random, asked)
        if random.random() < 0.6:
            question = random.choice(wordings("train").subject_questions).format(s=asked)
        elif owner != "my" and random.random() < 0.25:
            question = random.choice(ATTRIBUTE_QUESTIONS).format(o=owner, a=name)
        questions.append(question)
    answered = "your" + asked[2:] if asked.startswith("my ") else asked.replace(" of mine", " of yours")
    return Sentences(statement, *questions, f"{answered} is {value}.", value)


def _deed(random: Random, draw: Draw) -> Sentences:
    names = {"p": draw.person(), "t": draw.thing(), "n": _plural(draw.noun())}
    if random.random() < 0.15:
        tie = random.choice(TIES)
        kind, statements, answer = (
            "name",
            ("{p} is " + tie + " {v}", "{p} was " + tie + " {v}"),
            "{p} is " + tie + " {v}",
        )
        questions = (
            "who is {p} " + tie,
            "tell me who {p} is " + tie,
            "{p} is " + tie + " whom",
            "{p} was " + tie + " who",
        )
        if random.random() < 0.5:
            statements, answer = ("{v} is " + tie + " {p}", "{v} was " + tie + " {p}"), "{v} is " + tie + " {p}"
            questions = ("who is " + tie + " {p}", "tell me who is " + tie + " {p}", "which person is " + tie + " {p}")
    else:
        kind, statements, questions, answer = random.choice(DEED_FAMILIES)
        names |= dict(zip("bdq", random.choice(DEEDS), strict=True))
    names["v"] = draw.thing() if kind == "thing" else draw.value(kind)
    return _filled(random, statements, questions, answer, names)


def _measure(random: Random, draw: Draw) -> Sentences:
    names = {"t": draw.thing(), "v": draw.value("number")}
    if random.random() < 0.5:
        names["a"], units = random.choice(MEASURES)
        names["u"] = random.choice(units)
        statements = ("the {t} is {v} {u} {a}", "{v} {u} is how {a} the {t} is", "the {t} was {v} {u} {a}")
        questions = ("how {a} is the {t}", "how many {u} {a} is the {t}", "tell me how {a} the {t} is")
        return _filled(random, statements, questions, "the {t} is {v} {u} {a}", names)
    names["b"], names["d"] = random.choice(HOLDING)
    names["u"] = _plural(draw.noun())
    statements = ("the {t} {d} {v} {u}", "{v} {u} is what the {t} {d}", "of {u} the {t} {d} {v}")
    questions = ("how many {u} does the {t} {b}", "what number of {u} does the {t} {b}", "the {t} {d} how many {u}")
    return _filled(random, statements, questions, "the {t} {d} {v} {u}", names)


def _filled(random: Random, statements: tuple, questions: tuple, answer: str, names: dict[str, str]) -> Sentences:
    asked = [random.choice(questions).format(**names) for _ in range(2)]
    asked = [phrasing.wrapped(random, question) if random.random() < 0.25 else question for question in asked]
    statement = phrasing.loosened(random, random.choice(statements).format(**names))
    return Sentences(statement, *asked, answer.format(**names) + ".", names["v"])


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else noun + "s"
