"""Conversations that tell facts and ask for them later, for training and for measuring recall.

Every value is drawn at random, so an answer can only come from the context. The module knows nothing of token
ids; lengths are counted by the caller's tokenizer or estimated from characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random

from . import wordings as w
from .facts import Fact, capitalised, distinct_facts, draw_echo, draw_noun, draw_person, draw_thing, draw_value
from .wordings import wordings

ANSWER_WEIGHT = 4.0
PLAIN_WEIGHT = 1.0
# What a user says is random by design: little is learned from predicting it.
TOLD_WEIGHT = 0.25
CHARACTERS_PER_TOKEN = 3.6
# Training passages in which sentences of the prose itself are asked for.
ECHO_SHARE = 0.4
# Training questions with something beside them that is none of their business.
ASIDE_SHARE = 0.3
SCRAP_SHARE = 0.25
STRAY_END_SHARE = 0.15
STRAY_PREPOSITIONS = ("at", "by the", "with the", "near the", "without", "in the", "on the", "under the", "for the")
# Facts told in a chat with nothing before or behind them.
BARE_SHARE = 0.35
# Training facts at the very start of a text, of all places the one most often forgotten: among many sentences chance
# seldom chooses it.
FIRST_SHARE = 0.2
# Facts that are asked for a second time, in other words.
ASKED_AGAIN_SHARE = 0.25


@dataclass
class Conversation:
    """Turns of a chat as pieces `(role, text, weight)`; pieces with the same turn number form one message."""

    messages: list[tuple[str, list[tuple[str, float]]]] = field(default_factory=list)

    def say(self, role: str, *pieces: tuple[str, float]) -> None:
        """Adds one message made of `(text, loss weight)` pieces."""
        self.messages.append((role, list(pieces)))

    def as_messages(self) -> list[dict[str, str]]:
        """The chat in the form that `apply_chat_template` takes."""
        return [{"role": role, "content": "".join(text for text, _ in pieces)} for role, pieces in self.messages]

    def num_characters(self) -> int:
        """Length of all that is said."""
        return sum(len(text) for _, pieces in self.messages for text, _ in pieces)


@dataclass(frozen=True)
class RecallQuestion:
    """A chat that ends with a question, and the value that a right answer contains."""

    messages: list[dict[str, str]]
    value: str
    depth: float
    num_tokens: int


def told(random: Random, fact: Fact, split: str, *, is_bare: bool = False) -> str:
    """The fact as a sentence, with an opener and a closer unless `is_bare`."""
    if is_bare:
        return capitalised(fact.statement) + "."
    opener = random.choice(wordings(split).openers if random.random() < 0.6 else ("",))
    closer = random.choice(wordings(split).closers)
    return capitalised(f"{opener} {fact.statement}".lstrip()) + f". {closer}"


def asked(random: Random, fact: Fact, split: str, *, prose: str = "") -> str:
    """The question as a user types it; in training often with a remark or a scrap of `prose` before it."""
    opener = random.choice(wordings(split).question_openers if random.random() < 0.7 else ("",))
    closer = random.choice(wordings(split).question_closers if random.random() < 0.4 else ("",))
    question = f"{opener} {fact.question}".lstrip() + (closer if closer.startswith(",") else f" {closer}").rstrip()
    if split == "train" and random.random() < STRAY_END_SHARE:
        question += f" {random.choice(STRAY_PREPOSITIONS)} {draw_noun(random, split)}"
    question = capitalised(question) + random.choice("??????. ").strip()
    if split == "train" and random.random() < ASIDE_SHARE:
        question = f"{random.choice(wordings(split).asides)} {question}"
    if split == "train" and prose and random.random() < SCRAP_SHARE:
        question = f"{_scrap(random, prose)} {question}"
    return question


def _scrap(random: Random, prose: str) -> str:
    """Some words of the prose, cut anywhere."""
    words = prose.split()
    start = random.randrange(len(words))
    return " ".join(words[start : start + random.randint(2, 14)]) + random.choice(("", "", ".", ";", ","))


def weighted_answer(fact: Fact) -> list[tuple[str, float]]:
    """The answer in pieces; only the tokens that have to be copied weigh more."""
    before, value, after = fact.answer.partition(fact.value)
    return [
        piece
        for piece in (
            (capitalised(before), PLAIN_WEIGHT),
            (value if before else capitalised(value), ANSWER_WEIGHT),
            (after, PLAIN_WEIGHT),
        )
        if piece[0]
    ]


def ask_for(conversation: Conversation, random: Random, fact: Fact, split: str) -> None:
    """Adds the question about `fact` and its answer."""
    conversation.say("user", (asked(random, fact, split), TOLD_WEIGHT))
    conversation.say("assistant", *weighted_answer(fact))


def with_second_questions(random: Random, facts: list[Fact]) -> list[Fact]:
    """The facts in a random order, some of them twice: the second time with their other question."""
    facts = [*facts, *(f for f in facts if f.other_question and random.random() < ASKED_AGAIN_SHARE)]
    random.shuffle(facts)
    seen: set[int] = set()
    return [replace(f, question=f.other_question) if id(f) in seen else seen.add(id(f)) or f for f in facts]


def sentences_of(prose: str) -> list[str]:
    """Prose cut after full stops, marks and paragraphs; the pieces joined give the prose back."""
    pieces, start = [], 0
    for end in range(1, len(prose)):
        if prose[end] in " \n" and prose[end - 1] in '.!?”"' and end - start > 20:
            pieces.append(prose[start:end])
            start = end
    pieces.append(prose[start:])
    return pieces


def whole_sentences(prose: str) -> str:
    """The prose up to the end of its last whole sentence."""
    end = max(prose.rfind(mark) for mark in (". ", "! ", "? ", '." ', ".\n", '"\n'))
    return prose[: end + 2].rstrip() if end > len(prose) // 2 else prose


def hide_facts(
    random: Random, prose: str, facts: list[Fact], split: str, *, depth: float | None = None
) -> list[tuple[str, float]]:
    """Weighted pieces of prose, facts between its sentences: anywhere, or at `depth` (0 start, 1 end)."""
    pieces = sentences_of(prose)
    slots: dict[int, list[Fact]] = {}
    for fact in facts:
        slot = random.randint(0, len(pieces)) if depth is None else _slot_at(pieces, depth)
        if split == "train" and depth is None and random.random() < FIRST_SHARE:
            slot = 0
        slots.setdefault(slot, []).append(fact)
    result: list[tuple[str, float]] = []
    for slot in range(len(pieces) + 1):
        for fact in slots.get(slot, ()):
            sentence = told(random, fact, split, is_bare=random.random() < 0.5)
            # All pieces but the first open with their own blank or line break.
            result.append((sentence + " " if slot == 0 else " " + sentence, TOLD_WEIGHT))
        if slot < len(pieces):
            result.append((pieces[slot], PLAIN_WEIGHT))
    return result


def with_echoes(random: Random, prose: str, count: int) -> tuple[str, list[Fact]]:
    """The prose with a word replaced in up to `count` of its sentences, and the facts that these now tell."""
    pieces = sentences_of(prose)
    facts: list[Fact] = []
    for index in random.sample(range(len(pieces)), min(count, len(pieces))):
        if echo := draw_echo(random, pieces[index]):
            pieces[index], fact = echo
            facts.append(fact)
    return "".join(pieces), facts


def _slot_at(pieces: list[str], depth: float) -> int:
    wanted, seen = depth * sum(map(len, pieces)), 0
    for slot, piece in enumerate(pieces):
        if seen + len(piece) / 2 >= wanted:
            return slot
        seen += len(piece)
    return len(pieces)


def passage_conversation(random: Random, prose: str, *, num_facts: int, split: str = "train") -> Conversation:
    """A text with facts hidden in it, then a question about each."""
    conversation = Conversation()
    if random.random() < 0.2:
        conversation.say("system", (random.choice(w.SYSTEM_PROMPTS), TOLD_WEIGHT))
    facts = distinct_facts(random, split, num_facts)
    echoed: list[Fact] = []
    if split == "train" and random.random() < ECHO_SHARE:
        prose, echoed = with_echoes(random, prose, random.randint(1, 1 + num_facts // 2))
    pieces = hide_facts(random, prose, facts, split)
    facts = with_second_questions(random, [*facts, *echoed])
    request = random.choice(w.READING_REQUESTS)
    # Only a plain request to wait is answered with "I have read it": whatever else ends a text is a question.
    if random.random() < 0.75:
        first = facts[0]
        question = " " + asked(random, first, split, prose=prose)
        conversation.say("user", (request, TOLD_WEIGHT), *pieces, (question, TOLD_WEIGHT))
        conversation.say("assistant", *weighted_answer(first))
        facts = facts[1:]
    else:
        ending = random.choice(w.READING_ENDINGS)
        conversation.say("user", (request, TOLD_WEIGHT), *pieces, (ending, TOLD_WEIGHT))
        conversation.say("assistant", (random.choice(w.READING_REPLIES), TOLD_WEIGHT))
    for fact in facts:
        ask_for(conversation, random, fact, split)
    return conversation


def chat_conversation(random: Random, small_talk: list[str], *, num_facts: int, split: str = "train") -> Conversation:
    """Facts told over the turns of a chat (with other talk between, if given), asked for in another order."""
    conversation = Conversation()
    facts = distinct_facts(random, split, num_facts)
    waiting: list[Fact] = []
    for fact in facts:
        is_bare = random.random() < BARE_SHARE
        conversation.say("user", (told(random, fact, split, is_bare=is_bare), TOLD_WEIGHT))
        conversation.say("assistant", (random.choice(w.ACKNOWLEDGEMENTS), TOLD_WEIGHT))
        waiting.append(fact)
        for _ in range(min(len(small_talk) // 2, random.choice((0, 0, 1, 2)))):
            conversation.say("user", (small_talk.pop(0), TOLD_WEIGHT))
            conversation.say("assistant", (small_talk.pop(0), PLAIN_WEIGHT))
        if random.random() < 0.25:
            ask_for(conversation, random, waiting.pop(random.randrange(len(waiting))), split)
    while len(small_talk) >= 2:
        conversation.say("user", (small_talk.pop(0), TOLD_WEIGHT))
        conversation.say("assistant", (small_talk.pop(0), PLAIN_WEIGHT))
    for fact in with_second_questions(random, waiting):
        ask_for(conversation, random, fact, split)
    return conversation


def lookup_conversation(random: Random, *, num_pairs: int, split: str = "train") -> Conversation:
    """A table of names and values in one message, then many look-ups: the densest lesson in recall."""
    kind = random.choice(("code", "code", "word", "place", "colour", "number", "name"))
    keys: dict[str, str] = {}
    while len(keys) < num_pairs:
        key = draw_person(random, split) if random.random() < 0.5 else draw_thing(random, split)
        keys.setdefault(key, draw_value(random, kind, split))
    mark, gap = (
        random.choice((": ", " = ", " has ", " - ", " is ", " -> ")),
        random.choice((", ", "; ", "\n", ". ")),
    )
    conversation = Conversation()
    conversation.say(
        "user",
        ("Remember: " + gap.join(key + mark + value for key, value in keys.items()) + ".", TOLD_WEIGHT),
    )
    conversation.say("assistant", (random.choice(w.ACKNOWLEDGEMENTS), TOLD_WEIGHT))
    order = list(keys)
    random.shuffle(order)
    question = random.choice(("{}?", "{}", "What goes with {}?", "Which one is {}?", "And {}?"))
    for key in order:
        conversation.say("user", (question.format(key), TOLD_WEIGHT))
        start = capitalised(key) + mark if random.random() < 0.5 else ""
        conversation.say(
            "assistant",
            *((start, PLAIN_WEIGHT),) * bool(start),
            (keys[key], ANSWER_WEIGHT),
            (".", PLAIN_WEIGHT),
        )
    return conversation


def repeat_conversation(random: Random, split: str = "train") -> Conversation:
    """Lists and strings of words to be repeated."""
    kind = random.choice(("word", "food", "name", "place", "code", "animal"))
    items = [draw_value(random, kind, split) for _ in range(random.randint(3, 8))]
    text = ", ".join(items)
    conversation = Conversation()
    request, later = random.choice(
        (
            ("Repeat this: {}", "Say it again."),
            ("My list is: {}.", "What is on my list?"),
            ("Say these words: {}", "Once more, please."),
            ("I have to buy {}.", "What do I have to buy?"),
        )
    )
    conversation.say("user", (request.format(text), TOLD_WEIGHT))
    if request.startswith(("Repeat", "Say")):
        conversation.say("assistant", (text, ANSWER_WEIGHT), (".", PLAIN_WEIGHT))
    else:
        conversation.say("assistant", (random.choice(w.ACKNOWLEDGEMENTS), TOLD_WEIGHT))
    conversation.say("user", (later, TOLD_WEIGHT))
    conversation.say("assistant", (text, ANSWER_WEIGHT), (".", PLAIN_WEIGHT))
    return conversation


def sum_conversation(random: Random) -> Conversation:
    """Small sums and comparisons."""
    conversation = Conversation()
    for _ in range(random.randint(1, 4)):
        first, second = random.randint(0, 20), random.randint(0, 20)
        sign, result = random.choice((("+", first + second), ("-", max(first, second) - min(first, second))))
        if sign == "-":
            first, second = max(first, second), min(first, second)
        spoken = {"+": "plus", "-": "minus"}[sign]
        question = random.choice(
            (
                f"What is {first} {sign} {second}?",
                f"How much is {first} {spoken} {second}?",
                f"{first} {sign} {second} =",
            )
        )
        conversation.say("user", (question, TOLD_WEIGHT))
        conversation.say(
            "assistant",
            (f"{first} {sign} {second} = ", PLAIN_WEIGHT),
            (str(result), ANSWER_WEIGHT),
            (".", PLAIN_WEIGHT),
        )
    return conversation


def recall_questions(
    *,
    prose: str,
    num_tokens: int,
    depth: float,
    count: int,
    seed: int,
    count_tokens: Callable[[list[dict[str, str]]], int],
    split: str = "held_out",
    subjects: str | None = None,
    num_facts: int = 1,
) -> Iterator[RecallQuestion]:
    """`count` questions about a fact at `depth` (0 start, 1 end) of a text; the same for the same seed.

    `count_tokens` gives the number of tokens of a chat with its generation prompt. `num_facts - 1` further
    facts lie elsewhere in the prose. The prose is cut until the whole chat has at most `num_tokens` tokens.
    Sentences, names and values are of `split`, attributes and things of `subjects` (the same if None).
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must lie in 0..1, got {depth}")
    for index in range(count):
        random = Random(f"{seed}/{num_tokens}/{depth}/{index}")
        facts = distinct_facts(random, split, num_facts, subjects=subjects)
        start = random.randrange(max(1, len(prose) - 6 * num_tokens))
        start = prose.find(" ", start) + 1
        question, layout = asked(random, facts[0], split), random.getstate()
        length = int(num_tokens * CHARACTERS_PER_TOKEN * 1.3)
        while True:
            random.setstate(layout)
            text = whole_sentences(prose[start : start + length])
            hidden = hide_facts(random, text, facts[:1], split, depth=depth)
            body = "".join(piece for piece, _ in hidden)
            if num_facts > 1:
                body = "".join(piece for piece, _ in hide_facts(random, body, facts[1:], split))
            messages = [{"role": "user", "content": f"Read this: {body} {question}"}]
            total = count_tokens(messages)
            if total <= num_tokens or length < 40:
                break
            length = min(length - 10, int(length * num_tokens / total))
        yield RecallQuestion(messages, facts[0].value, depth, total)
