"""Deeds and scenes drawn at random, for training alone: who did what to whom, where, when, with what and for whom.

Any verb, any noun, of a person or of the user. Each kind of scene is told and asked for in several builds of sentence,
so that a question is answered by what the text tells, not by a phrase learned for one verb.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from .sentences import Draw, Sentences, filled, plural

# Words of the held-out attributes and families of `wordings.py` that training must not see as a relation.
_HELD_OUT_WORDS = (
    "instrument train appointment wake-up horse drink library card garage hiding combination guardian label "
    "home weigh weighs weighed weight heavy pounds marry marries married see seen saw meet met"
)
NEVER_TRAINED = frozenset(_HELD_OUT_WORDS.split())

# fmt: off
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
    "throw/threw/thrown collect/collected/collected count/counted/counted forget/forgot/forgotten "
    "write/wrote/written read/read/read cook/cooked/cooked measure/measured/measured move/moved/moved "
    "lift/lifted/lifted pull/pulled/pulled touch/touched/touched mark/marked/marked check/checked/checked "
    "print/printed/printed fold/folded/folded cut/cut/cut tie/tied/tied lock/locked/locked unlock/unlocked/unlocked "
    "start/started/started stop/stopped/stopped cross/crossed/crossed reach/reached/reached leave/left/left "
    "enter/entered/entered question/questioned/questioned examine/examined/examined answer/answered/answered "
    "enjoy/enjoyed/enjoyed prefer/preferred/preferred need/needed/needed want/wanted/wanted "
    "notice/noticed/noticed miss/missed/missed welcome/welcomed/welcomed join/joined/joined lead/led/led "
    "rule/ruled/ruled own/owned/owned decorate/decorated/decorated offer/offered/offered refuse/refused/refused "
    "accept/accepted/accepted change/changed/changed feed/fed/fed fill/filled/filled hold/held/held "
    "honour/honoured/honoured hurt/hurt/hurt imitate/imitated/imitated like/liked/liked obey/obeyed/obeyed "
    "pass/passed/passed pay/paid/paid polish/polished/polished promise/promised/promised raise/raised/raised "
    "remember/remembered/remembered ride/rode/ridden sign/signed/signed sketch/sketched/sketched "
    "spoil/spoiled/spoiled support/supported/supported surprise/surprised/surprised taste/tasted/tasted "
    "understand/understood/understood use/used/used wake/woke/woken wrap/wrapped/wrapped"
)
DEEDS = tuple(tuple(verb.split("/")) for verb in _VERBS.split() if verb.split("/")[0] not in NEVER_TRAINED)
TIES = (
    "engaged to", "related to", "afraid of", "in love with", "angry with", "known to", "proud of", "jealous of",
    "loyal to", "kind to", "the cousin of", "the friend of", "the uncle of", "the rival of", "the partner of",
    "the guest of", "the heir of", "the pupil of", "the successor of", "next to", "taller than", "older than",
    "stronger than", "sitting beside", "waiting for", "working with", "living with", "the same age as", "fond of",
    "the boss of", "the teacher of", "tired of", "looking for", "named after", "compared with", "in debt to",
)
PLACES_OF = ("in", "behind", "under", "beside", "near", "on", "over", "inside", "below", "next to", "opposite")


class Scene(NamedTuple):
    """One kind of scene: the kind of its value, how it is told and asked for, and the answer.

    `{S}`, `{O}` and `{G}` are the doer as subject, object and owner (Tom, Tom, Tom's; I, me, my), `{was}`, `{has}` and
    `{does}` agree with it. `{b}`, `{d}` and `{q}` are base, past and participle of a verb, `{n}` a noun, `{u}` a
    plural, `{i}` a preposition, `{t}` a thing and `{v}` the value.
    """

    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


SCENES = tuple(Scene(*scene) for scene in (
    ("name", ("{S} {d} {v}", "{v} was {q} by {O}", "it was {v} that {S} {d}", "{S} once {d} {v}"),
     ("who did {S} {b}", "whom did {S} {b}", "who was {q} by {O}", "{S} {d} whom", "tell me who {S} {d}",
      "which person did {S} {b}", "do you remember who {S} {d}", "who is the one that {S} {d}"), "{S} {d} {v}"),
    ("name", ("{v} {d} {O}", "{S} {was} {q} by {v}", "it was {v} who {d} {O}", "{v} once {d} {O}"),
     ("who {d} {O}", "by whom {was} {S} {q}", "{S} {was} {q} by whom", "who was it that {d} {O}", "tell me who {d} {O}",
      "who has {q} {O}", "whose deed was it that {S} {was} {q}"), "{v} {d} {O}"),
    ("name", ("{v} {d} the {t}", "the {t} was {q} by {v}", "it was {v} who {d} the {t}", "{v} has {q} the {t}"),
     ("who {d} the {t}", "by whom was the {t} {q}", "the {t} was {q} by whom", "who has {q} the {t}",
      "tell me who {d} the {t}", "which person {d} the {t}", "who is it that {d} the {t}"), "{v} {d} the {t}"),
    ("thing", ("{S} {d} the {v}", "the {v} was {q} by {O}", "what {S} {d} was the {v}", "{S} {has} {q} the {v}"),
     ("what did {S} {b}", "what was {q} by {O}", "which thing did {S} {b}", "what {has} {S} {q}",
      "tell me what {S} {d}", "{S} {d} what", "what is it that {S} {d}"), "{S} {d} the {v}"),
    ("place", ("{S} {d} the {t} in {v}", "in {v} {S} {d} the {t}", "the {t} was {q} in {v} by {O}",
               "it was in {v} that {S} {d} the {t}", "{S} went to {v} and {d} the {t}"),
     ("where did {S} {b} the {t}", "where was the {t} {q}", "in which place did {S} {b} the {t}",
      "tell me where {S} {d} the {t}", "{S} {d} the {t} where", "where {has} {S} {q} the {t}",
      "what town was it where {S} {d} the {t}"), "{S} {d} the {t} in {v}"),
    ("place", ("{S} {was} {q} in {v}", "in {v} {S} {was} {q}", "they {d} {O} in {v}", "{v} is where {S} {was} {q}"),
     ("where {was} {S} {q}", "in which town {was} {S} {q}", "where did they {b} {O}", "tell me where {S} {was} {q}",
      "in what place did they {b} {O}"), "{S} {was} {q} in {v}"),
    ("time", ("{S} {d} the {t} at {v}", "at {v} {S} {d} the {t}", "the {t} was {q} at {v} by {O}"),
     ("when did {S} {b} the {t}", "when was the {t} {q}", "at what time did {S} {b} the {t}",
      "tell me when {S} {d} the {t}", "what did the clock say when {S} {d} the {t}"), "{S} {d} the {t} at {v}"),
    ("date", ("{S} {d} the {t} on {v}", "on {v} {S} {d} the {t}", "{S} {was} {q} on {v} with the {t}"),
     ("when did {S} {b} the {t}", "on what day did {S} {b} the {t}", "which date was it with {O} and the {t}",
      "on what date was it that {S} {d} the {t}"), "{S} {d} the {t} on {v}"),
    ("number", ("{S} {d} {v} {u}", "{v} {u} were {q} by {O}", "altogether {S} {d} {v} {u}", "of {u} {S} {d} {v}"),
     ("how many {u} did {S} {b}", "how many {u} were {q} by {O}", "what number of {u} did {S} {b}",
      "tell me how many {u} {S} {d}", "{S} {d} how many {u}", "how many did {S} {b}", "{u}: how many did {S} {b}"),
     "{S} {d} {v} {u}"),
    # With what, why, with whom, for whom.
    ("thing", ("{S} {d} the {t} with the {v}", "with the {v} {S} {d} the {t}",
               "the {v} helped {O} when {S} {d} the {t}",
               "to {b} the {t} {S} took the {v}", "the {t} was {q} by {O} with the {v}"),
     ("with what did {S} {b} the {t}", "what did {S} {b} the {t} with", "what did {S} take to {b} the {t}",
      "what did {S} use on the {t}", "how did {S} manage to {b} the {t}", "by means of what did {S} {b} the {t}",
      "what was needed to {b} the {t}"), "{S} {d} the {t} with the {v}"),
    ("thing", ("because of the {v} {S} {d} the {t}", "{S} {d} the {t} on account of the {v}",
               "the {v} is the reason why {S} {d} the {t}", "it was for the sake of the {v} that {S} {d} the {t}"),
     ("why did {S} {b} the {t}", "for what reason did {S} {b} the {t}", "what made {O} {b} the {t}",
      "what was the cause that {S} {d} the {t}", "what for did {S} {b} the {t}"),
     "{S} {d} the {t} because of the {v}"),
    ("name", ("{S} {d} the {t} together with {v}", "{v} and {S} {d} the {t}", "{v} helped {O} to {b} the {t}",
              "{S} and {v} {d} the {t} side by side", "in {v}'s company {S} {d} the {t}"),
     ("with whom did {S} {b} the {t}", "who helped {O} to {b} the {t}", "in whose company did {S} {b} the {t}",
      "who was there when {S} {d} the {t}", "{S} and who else {d} the {t}"), "{S} {d} the {t} with {v}"),
    ("name", ("{S} {d} the {t} for {v}", "for {v} {S} {d} the {t}", "to please {v} {S} {d} the {t}",
              "{v} was the one for whom {S} {d} the {t}", "it was for {v} that {S} {d} the {t}"),
     ("for whom did {S} {b} the {t}", "who was it that {S} {d} the {t} for", "whom did {S} want to please with the {t}",
      "for whose sake was the {t} {q}", "who had asked {O} to {b} the {t}"), "{S} {d} the {t} for {v}"),
    # What is where at somebody's.
    ("noun", ("{i} {G} {n} there is a {v}", "there is a {v} {i} {G} {n}", "a {v} stands {i} {G} {n}",
              "{i} {G} {n} you find a {v}", "{S} {has} a {v} {i} the {n}", "a {v} is what {S} {has} {i} the {n}",
              "somebody left a {v} {i} {G} {n}", "{G} {n} has a {v} {i} it"),
     ("what is {i} {G} {n}", "what stands {i} {G} {n}", "what can one find {i} {G} {n}", "what is there {i} {G} {n}",
      "{i} {G} {n}, what is there", "what {has} {S} {i} the {n}", "what does {G} {n} have {i} it",
      "what would I see {i} {G} {n}", "which thing is it that one finds {i} {G} {n}"), "{G} {n} has a {v} {i} it"),
    ("animal", ("{v} lives {i} {G} {n}", "{i} {G} {n} lives {v}", "{S} {has} {v} {i} the {n}", "{v} sleeps {i} {G} {n}",
                "{i} {G} {n} they saw {v}", "{v} made its home {i} {G} {n}"),
     ("which animal lives {i} {G} {n}", "what creature is {i} {G} {n}", "what sleeps {i} {G} {n}",
      "what kind of animal {has} {S} {i} the {n}", "what made its home {i} {G} {n}"), "{v} lives {i} {G} {n}"),
    ("name", ("{G} {n} is called {v}", "{S} {has} a {n} called {v}", "{S} {has} a {n} named {v}",
              "{S} named the {n} {v}",
              "{v} is the name of {G} {n}", "{S} {d} a {n} and called it {v}", "{G} {n} answers to {v}",
              "{S} came with {v}, a {n}", "{S} never went out without {v}, the {n}"),
     ("what is {G} {n} called", "what is the name of {G} {n}", "how is {G} {n} called", "what name does {G} {n} have",
      "by what name {does} {S} call the {n}", "how did {S} name the {n}", "what do they call {G} {n}",
      "what name did {S} give the {n}", "to what name does {G} {n} answer"), "{G} {n} is called {v}"),
    # Offices and ties.
    ("name", ("{v} is the {n} of the {t}", "the {n} of the {t} is {v}", "as {n} of the {t} they chose {v}",
              "the {t} has {v} as {n}", "{v} serves the {t} as {n}"),
     ("who is the {n} of the {t}", "whom did they choose as {n} of the {t}", "who serves the {t} as {n}",
      "which person is {n} of the {t}", "whom does the {t} have for a {n}"), "{v} is the {n} of the {t}"),
    ("name", ("{v} is a {n} to {O}", "{S} {has} {v} for a {n}", "{S} took {v} as {n}", "{v} became {G} {n}",
              "{v} works for {O} as {n}"),
     ("who is {G} {n}", "whom {does} {S} have for a {n}", "who became {G} {n}", "who works for {O} as {n}",
      "what is {G} {n}'s name", "whom did {S} take as {n}"), "{v} is {G} {n}"),
    # Times, dates, numbers of somebody's affairs.
    ("time", ("{G} {n} begins at {v}", "at {v} {S} {has} the {n}", "the {n} with {O} is at {v}",
              "{v} is when {G} {n} starts",
              "{S} {has} to be at the {n} by {v}"),
     ("when does {G} {n} begin", "at what hour is {G} {n}", "when {has} {S} the {n}", "what time is the {n} with {O}",
      "by when {has} {S} to be at the {n}", "what hour was set for {G} {n}"), "{G} {n} begins at {v}"),
    ("date", ("{G} {n} is on {v}", "on {v} {S} {has} the {n}", "{v} is the day of {G} {n}", "they set {G} {n} for {v}"),
     ("when is {G} {n}", "on which day {has} {S} the {n}", "what date was set for {G} {n}",
      "what is the day of {G} {n}",
      "on what date is {G} {n}", "which day is kept for {G} {n}"), "{G} {n} is on {v}"),
    ("number", ("{v} {u} stand {i} {G} {n}", "{i} {G} {n} there are {v} {u}", "{G} {n} has {v} {u}",
                "{S} {has} {v} {u} {i} the {n}",
                "one can count {v} {u} {i} {G} {n}"),
     ("how many {u} stand {i} {G} {n}", "how many {u} are {i} {G} {n}", "what is the number of {u} {i} {G} {n}",
      "how many {u} {has} {S} {i} the {n}", "how many {u} can one count {i} {G} {n}"), "{G} {n} has {v} {u}"),
    ("code", ("to {b} the {t} you need {v}", "{v} will {b} the {t}", "whoever types {v} can {b} the {t}",
              "the {t} can be {q} with {v}", "nobody can {b} the {t} without {v}"),
     ("how can I {b} the {t}", "what do I type to {b} the {t}", "which number lets me {b} the {t}",
      "what do I need to {b} the {t}", "what digits does one use to {b} the {t}"), "the {t} can be {q} with {v}"),
    ("place", ("{G} {n} is in {v}", "{S} {has} a {n} in {v}", "{v} is the town with {G} {n}", "in {v} stands {G} {n}",
               "one finds {G} {n} in {v}"),
     ("where is {G} {n}", "in which town is {G} {n}", "where {has} {S} the {n}",
      "where would I look for {G} {n}",
      "what place has {G} {n}", "any idea where {S} {has} the {n}"), "{G} {n} is in {v}"),
    ("noun", ("{S} {d} the {v} more than anything", "the {v} is what {S} {d} most", "above all {S} {d} the {v}"),
     ("what did {S} {b} most", "what did {S} {b} more than anything", "above all, what did {S} {b}",
      "what was it that {S} {d} most"), "{S} {d} the {v} most"),
))
TIE_SCENES = (
    Scene("name", ("{S} {was} {tie} {v}", "it was {v} that {S} {was} {tie}"),
          ("who {was} {S} {tie}", "tell me who {S} {was} {tie}", "{S} {was} {tie} whom", "{S} {was} {tie} who"),
          "{S} {was} {tie} {v}"),
    Scene("name", ("{v} was {tie} {O}", "it was {v} who was {tie} {O}"),
          ("who was {tie} {O}", "tell me who was {tie} {O}", "which person was {tie} {O}"), "{v} was {tie} {O}"),
)
# fmt: on
USER_SHARE = 0.35
TIE_SHARE = 0.12


class Doer(NamedTuple):
    """The forms of who does something: subject, object, owner, and the verbs that agree."""

    S: str
    O: str  # noqa: E741 - the name of the placeholder
    G: str
    was: str = "was"
    has: str = "has"
    does: str = "does"


USER, USER_ANSWERED = Doer("I", "me", "my", "was", "have", "do"), Doer("you", "you", "your", "were", "have", "do")


def deed(random: Random, draw: Draw) -> Sentences:
    """A fact about what a person, or the user, did, has or is to somebody."""
    scene = _tie(random) if random.random() < TIE_SHARE else random.choice(SCENES)
    doer = USER if random.random() < USER_SHARE else Doer(*(name := draw.person(),) * 2, f"{name}'s")
    names = dict(zip("bdq", random.choice(DEEDS), strict=True))
    names |= {"t": draw.thing(), "n": trained_noun(draw), "u": plural(trained_noun(draw))}
    names["i"] = random.choice(PLACES_OF)
    special = {"thing": draw.thing, "noun": draw.noun}.get(scene.kind)
    names["v"] = special() if special else draw.value(scene.kind)
    answered = USER_ANSWERED if doer is USER else doer
    answer = scene.answer.format(**names, **answered._asdict())
    return filled(random, scene.statements, scene.questions, answer, names | doer._asdict())


def trained_noun(draw: Draw) -> str:
    """A noun that training may see."""
    while (noun := draw.noun()) in NEVER_TRAINED:
        pass
    return noun


def _tie(random: Random) -> Scene:
    """Somebody's tie to the person named, or the person's to somebody."""
    scene, tie = random.choice(TIE_SCENES), random.choice(TIES)
    told, asked = (tuple(text.replace("{tie}", tie) for text in texts) for texts in scene[1:3])
    return Scene("name", told, asked, scene.answer.replace("{tie}", tie))
