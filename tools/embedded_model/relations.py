"""Facts whose relation is drawn at random, for training alone: any noun as attribute, any verb as deed.

With a short list of attributes a model learns the list: it recalled 90 % of values told under attributes it knew
and 47 % under new ones, while new ways of telling and asking cost little. Here a relation means nothing, so only
reading can answer. `facts.py` decides when these are used; no word that only held-out relations use is drawn.
"""

from __future__ import annotations

from random import Random

from . import phrasing
from .clauses import clause
from .deeds import NEVER_TRAINED, deed
from .sentences import Draw, Sentences, filled, plural
from .wordings import wordings

# fmt: off
PREPOSITIONS = ("of", "of", "of", "for", "for", "on", "in", "behind", "under", "beside", "near", "inside")
KINDS = ("code", "code", "number", "age", "phone", "time", "date", "name", "name", "place", "place", "word", "word",
         "colour", "food", "animal", "object", "job", "instrument")
TAGS = ("number", "code", "name", "colour", "place", "time", "day", "word", "size", "price", "owner", "key", "sign")
ADJECTIVES = (
    "favourite", "first", "last", "next", "old", "new", "secret", "second", "real", "main", "other", "best", "usual",
    "spare", "official", "private", "public", "daily", "final", "early", "late", "common", "hidden", "lucky", "true",
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
# The other relations are attributes of a person, a thing or the user.
DEED_SHARE = 0.55
DEED_SHARES = (50, 38, 12)


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
    if owner is None and about is None and random.random() < DEED_SHARE:
        return random.choices((deed, clause, _measure), DEED_SHARES)[0](random, draw)
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


def _measure(random: Random, draw: Draw) -> Sentences:
    names = {"t": draw.thing(), "v": draw.value("number")}
    if random.random() < 0.5:
        names["a"], units = random.choice(MEASURES)
        names["u"] = random.choice(units)
        statements = ("the {t} is {v} {u} {a}", "{v} {u} is how {a} the {t} is", "the {t} was {v} {u} {a}")
        questions = ("how {a} is the {t}", "how many {u} {a} is the {t}", "tell me how {a} the {t} is")
        return filled(random, statements, questions, "the {t} is {v} {u} {a}", names)
    names["b"], names["d"] = random.choice(HOLDING)
    names["u"] = plural(draw.noun())
    statements = ("the {t} {d} {v} {u}", "{v} {u} is what the {t} {d}", "of {u} the {t} {d} {v}")
    questions = ("how many {u} does the {t} {b}", "what number of {u} does the {t} {b}", "the {t} {d} how many {u}")
    return filled(random, statements, questions, "the {t} {d} {v} {u}", names)
