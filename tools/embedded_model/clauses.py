"""Whole clauses drawn at random, for training alone: one deed with several things told about it, any of them asked for.

Told "on May 3 the red box was sold by Tom in Relford for 45 crowns" and asked "for how many crowns did Tom sell it",
only the tie between the question's word and the part of the sentence that fills it can answer: the other parts are
names and numbers too. Told and asked in all orders of words, with any verb and tense.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from . import phrasing
from .deeds import DEEDS, PLACES_OF, USER, USER_ANSWERED, Doer, trained_noun
from .sentences import Draw, Sentences, plural


class Part(NamedTuple):
    """What may be told beside who did what: its role, the kind of its value, how it is said and asked for.

    A clause has each role once at most, so that "when" or "how" means one part. `{u}` is a unit or a preposition.
    """

    role: str
    kind: str
    said: str
    asked: tuple[str, ...]


# fmt: off
PARTS = (
    Part("where", "place", "in {v}", ("where", "in which town", "in what place", "in which place")),
    Part("where", "place", "near {v}", ("where", "near which town", "near what place")),
    Part("where", "place", "on the road to {v}", ("where", "on the road to which town", "on which road")),
    Part("where", "noun", "{i} the {v}", ("where", "{i} what", "{i} which thing")),
    Part("when", "time", "at {v}", ("when", "at what time", "at what hour")),
    Part("when", "time", "shortly before {v}", ("when", "shortly before what time", "shortly before which hour")),
    Part("when", "date", "on {v}", ("when", "on which day", "on what date", "on which date")),
    Part("when", "weekday", "on {v}", ("when", "on which day", "on what day of the week", "on which weekday")),
    Part("when", "noun", "after the {v}", ("when", "after what", "after which event")),
    Part("for", "name", "for {v}", ("for whom", "for which person", "for whose sake")),
    Part("for", "name", "on behalf of {v}", ("on whose behalf", "on behalf of whom", "for whom")),
    Part("beside", "name", "with {v}", ("with whom", "in whose company", "together with whom")),
    Part("beside", "name", "in the company of {v}", ("with whom", "in whose company", "in the company of whom")),
    Part("beside", "animal", "with {v}", ("with which animal", "with what creature")),
    Part("how", "thing", "with the {v}", ("how", "with what", "with which thing", "by means of what")),
    Part("how", "noun", "by means of some {v}", ("how", "with what", "by means of what", "using what")),
    Part("how", "code", "by typing {v}", ("how", "by typing what", "by means of which number", "with which digits")),
    Part("why", "noun", "because of the {v}", ("why", "for what reason", "because of what")),
    Part("why", "name", "to please {v}", ("why", "to please whom", "for whose pleasure")),
    Part("asker", "name", "at the request of {v}", ("at whose request", "at the request of whom")),
    Part("price", "number", "for {v} {c}", ("for how much", "for how many {c}", "at what price")),
    Part("as", "job", "dressed as {v}", ("dressed as what", "in the clothes of what trade")),
    Part("times", "number", "{v} times", ("how often", "how many times")),
)
COINS = ("crowns", "dollars", "pounds", "coins", "pence", "shillings")
MODALS = ("will", "will", "shall", "should", "can", "may", "would")
WHO, WHOM = ("who", "which person", "who was it that"), ("whom", "who", "which person")
WHICH = ("what", "which thing", "what thing")
# fmt: on
# Anybody, as subject and as object; what is told of "one" may be asked of "I", and is answered with "you".
ANYBODY = (("you", "you"), ("one", "one"), ("people", "people"), ("they", "them"), ("we", "us"))
ANYBODY_ASKED = (("you", "you"), ("I", "me"), ("one", "one"), ("people", "people"))
MOST_PARTS = 3
USER_SHARE, ANYBODY_SHARE = 0.3, 0.1
PASSIVE_SHARE, FRONT_SHARE, CLEFT_SHARE, WRAPPED_SHARE = 0.25, 0.35, 0.12, 0.2


@dataclass(frozen=True)
class Tense:
    """The forms of a verb in one tense: after the doer, split around the doer, and the same in the passive."""

    active: str
    auxiliary: str
    rest: str
    passive_auxiliary: str
    passive_rest: str


@dataclass(frozen=True)
class Slot:
    """A part of the clause that may be asked for: as said, its value and the words that ask for it."""

    role: str
    said: str
    value: str
    asked: tuple[str, ...]


def is_anybody(doer: Doer) -> bool:
    """Whether the doer is nobody in particular."""
    return (doer.S, doer.O) in ANYBODY


def third_person(base: str) -> str:
    """The present of he and she: carry, carries."""
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def tense_of(verb: tuple[str, str, str], tense: str, *, is_third: bool, has: str) -> Tense:
    """The forms of `verb` (base, past, participle) in the `past`, `present`, `perfect` or after a modal verb."""
    base, past, participle = verb
    if tense == "past":
        return Tense(past, "did", base, "was", participle)
    if tense == "present":
        return Tense(third_person(base) if is_third else base, "does" if is_third else "do", base, "is", participle)
    if tense == "perfect":
        return Tense(f"{has} {participle}", has, participle, "has", f"been {participle}")
    return Tense(f"{tense} {base}", tense, base, tense, f"be {participle}")


def clause(random: Random, draw: Draw) -> Sentences:
    """A fact of a deed with one to three things told beside it; the doer, the object or one of these is asked for."""
    doer, asking, answering = _doers(random, draw)
    verb = random.choice(DEEDS)
    tense = random.choice(("past", "past", "present", "perfect", random.choice(MODALS)))
    deed, asked_deed, answered_deed, whose_deed = (
        tense_of(verb, tense, is_third=who.has == "has", has=who.has)
        for who in (doer, asking, answering, Doer("", "", ""))
    )
    thing = _object(random, draw)
    parts = _parts(random, draw)
    subject = Slot("doer", doer.S, doer.S, WHO)
    # Who did it, and with what, can only be asked for if the question names the other.
    asked = [thing, subject] if doer is asking and doer is not USER else [thing] if doer is USER else []
    wanted = random.choice([*parts, *parts, *asked])
    statement = _statement(random, doer, deed, thing, parts)
    others = [part for part in parts if part is not wanted]
    questions = []
    for _ in range(2):
        # Part of what was told is named in the question; without the object, something else has to be.
        some = random.sample(others, random.randint(0, len(others)))
        told = " ".join(part.said for part in some)
        if wanted is subject:
            question = _asks_for_doer(random, whose_deed, thing, told)
        elif wanted is thing:
            question = _asks_for_object(random, asking, asked_deed, thing, told)
        else:
            question = _asks_for_part(random, asking, asked_deed, thing, wanted, told)
        question = " ".join(question.split())
        questions.append(phrasing.wrapped(random, question) if random.random() < WRAPPED_SHARE else question)
    # One name or noun may have been drawn twice: then the question would hold its own answer.
    if any(wanted.value in question for question in questions):
        return clause(random, draw)
    beside = f" {wanted.said}" if wanted in parts else ""
    answer = f"{answering.S} {answered_deed.active} {thing.said}{beside}."
    return Sentences(phrasing.loosened(random, statement), *questions, answer, wanted.value)


def _doers(random: Random, draw: Draw) -> tuple[Doer, Doer, Doer]:
    """Who does it as told, as asked and as answered."""
    chance = random.random()
    if chance < USER_SHARE:
        return USER, USER, USER_ANSWERED
    if chance < USER_SHARE + ANYBODY_SHARE:
        told, asked = (
            Doer(subject, thing, "", "were", "has" if subject == "one" else "have")
            for subject, thing in (random.choice(ANYBODY), random.choice(ANYBODY_ASKED))
        )
        return told, asked, USER_ANSWERED
    person = Doer(*(name := draw.person(),) * 2, f"{name}'s")
    return person, person, person


def _object(random: Random, draw: Draw) -> Slot:
    chance = random.random()
    if chance < 0.15:
        return Slot("count", f"{(count := draw.value('number'))} {(things := plural(trained_noun(draw)))}", count,
                    (f"how many {things}", f"what number of {things}"))  # fmt: skip
    if chance < 0.3:
        return Slot("person", (name := draw.person()), name, WHOM)
    if chance < 0.4:
        return Slot("thing", f"some {(noun := trained_noun(draw))}", noun, WHICH)
    return Slot("thing", f"the {(thing := draw.thing())}", thing, WHICH)


def _parts(random: Random, draw: Draw) -> list[Slot]:
    chosen: dict[str, Slot] = {}
    special = {"thing": draw.thing, "noun": lambda: trained_noun(draw)}
    for part in random.sample(PARTS, random.randint(1, MOST_PARTS)):
        fills = {"i": random.choice(PLACES_OF), "c": random.choice(COINS)}
        value = special[part.kind]() if part.kind in special else draw.value(part.kind)
        asked = tuple(words.format(**fills) for words in part.asked)
        chosen.setdefault(part.role, Slot(part.role, part.said.format(v=value, **fills), value, asked))
    return list(chosen.values())


def _it(thing: Slot) -> str:
    return "it" if thing.role == "thing" else "them"


def _core(random: Random, doer: Doer, deed: Tense, thing: Slot, *, needs_doer: bool) -> str:
    if thing.role != "count" and random.random() < PASSIVE_SHARE:
        by = f" by {doer.O}" if needs_doer or random.random() < 0.7 else ""
        return f"{thing.said} {deed.passive_auxiliary} {deed.passive_rest}{by}"
    if random.random() < 0.08:
        return f"{thing.said} {doer.S} {deed.active}"
    return f"{doer.S} {deed.active} {thing.said}"


def _statement(random: Random, doer: Doer, deed: Tense, thing: Slot, parts: list[Slot]) -> str:
    parts = random.sample(parts, len(parts))
    # A question may name the doer, or ask for it: only a doer that is anybody can be left out.
    core = _core(random, doer, deed, thing, needs_doer=not is_anybody(doer))
    if random.random() < CLEFT_SHARE:
        first, *rest = parts
        return " ".join((f"it {random.choice(('was', 'is'))} {first.said} that", core, *(part.said for part in rest)))
    front = [part.said for part in parts if random.random() < FRONT_SHARE]
    back = [part.said for part in parts if part.said not in front]
    if front and random.random() < 0.15:
        # In the old order of words: in Relford did Tom sell the red box.
        core = f"{deed.auxiliary} {doer.S} {deed.rest} {thing.said}"
    return " ".join((*front, core, *back))


def _asks_for_doer(random: Random, deed: Tense, thing: Slot, told: str) -> str:
    who = random.choice(WHO)
    forms = [f"{who} {deed.active} {thing.said} {told}", f"{told} {who} {deed.active} {thing.said}",
             f"tell me who {deed.active} {thing.said} {told}", f"whose deed was it: {deed.active} {thing.said} {told}",
             f"{thing.said}, {who} {deed.active} {_it(thing)} {told}"]  # fmt: skip
    if thing.role != "count":
        forms += [f"by whom {deed.passive_auxiliary} {thing.said} {deed.passive_rest} {told}",
                  f"{told} {thing.said} {deed.passive_auxiliary} {deed.passive_rest} by whom"]  # fmt: skip
    return random.choice(forms)


def _asks_for_object(random: Random, doer: Doer, deed: Tense, thing: Slot, told: str) -> str:
    what = random.choice(thing.asked)
    asking, telling = f"{deed.auxiliary} {doer.S} {deed.rest}", f"{doer.S} {deed.active}"
    forms = [f"{what} {asking} {told}", f"{told} {what} {asking}", f"{telling} {what} {told}",
             f"tell me {what} {telling} {told}", f"{what} was it that {telling} {told}",
             f"{told} {telling} {what}"]  # fmt: skip
    if thing.role != "count":
        forms += [f"{what} {deed.passive_auxiliary} {deed.passive_rest} by {doer.O} {told}"]
    return random.choice(forms)


def _asks_for_part(random: Random, doer: Doer, deed: Tense, thing: Slot, wanted: Slot, told: str) -> str:
    what = random.choice(wanted.asked)
    asking, telling = f"{deed.auxiliary} {doer.S} {deed.rest}", f"{doer.S} {deed.active}"
    forms = [f"{what} {asking} {thing.said} {told}", f"{told} {what} {asking} {thing.said}",
             f"{telling} {thing.said} {told} {what}", f"tell me {what} {telling} {thing.said} {told}",
             f"{what} was it that {telling} {thing.said} {told}", f"{told} {telling} {thing.said} {what}",
             f"{thing.said}, {what} {asking} {_it(thing)} {told}"]  # fmt: skip
    if told or doer.has == "has":
        forms.append(f"{what} {asking} {told}")
    if thing.role != "count":
        by = random.choice((f"by {doer.O}", ""))
        forms += [f"{what} {deed.passive_auxiliary} {thing.said} {deed.passive_rest} {by} {told}",
                  f"{told} {thing.said} {deed.passive_auxiliary} {deed.passive_rest} {by} {what}"]  # fmt: skip
    preposition, _, noun = what.partition(" ")
    if noun in ("whom", "what", "which thing", "which person", "which town"):
        asking = f"{noun} {asking} {thing.said}"
        forms += [f"{asking} {preposition} {told}", f"{asking} {told} {preposition}"]
    return random.choice(forms)
