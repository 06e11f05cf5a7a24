"""Sentence parts from which facts, questions and chats are built: read from the folders of `wordings`.

Placeholders: `{s}` subject as the user says it, `{z}` the same as the assistant says it, `{p}` and `{q}` persons,
`{t}` thing, `{v}` value, `{n}` what a story is about. Training never sees a file of `held_out` or `second`. The first
was at hand while `train` grew, and what it failed in was known; `second` was written afterwards by somebody who had
seen neither, and is for measuring alone. What the assistant says has no split and stands below.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("wordings")


@dataclass(frozen=True)
class Family:
    """One kind of fact: how it is told, asked for and answered."""

    value_kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Wordings:
    """The sentence parts of one split; each field is a text file of that name, one part a line.

    `owned` ("my ...", "Marta's ...") and `of_things` ("the ... of the red box") are pairs of an attribute and the
    kind of its value. `new_families` hold relations that no training family tells, `asides` are what a user types
    beside a question: each is there in one split alone.
    """

    subject_statements: tuple[str, ...]
    subject_questions: tuple[str, ...]
    families: tuple[Family, ...]
    new_families: tuple[Family, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    question_openers: tuple[str, ...]
    question_closers: tuple[str, ...]
    asides: tuple[str, ...]
    owned: tuple[tuple[str, str], ...]
    of_things: tuple[tuple[str, str], ...]


@cache
def wordings(split: str) -> Wordings:
    """The wordings of `split`, a folder's name; but for families, what `second` does not have is that of `held_out`."""
    parts = {}
    for name in Wordings.__dataclass_fields__:
        path = FOLDER / split / f"{name}.txt"
        if split == "second" and not path.exists() and not name.endswith("families"):
            path = FOLDER / "held_out" / path.name
        text = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if name.endswith("families"):
            parts[name] = tuple(_family(block) for block in text.split("\n\n") if block)
        elif name in ("owned", "of_things"):
            parts[name] = tuple(tuple(line.rsplit(": ", 1)) for line in text.splitlines())
        else:
            parts[name] = tuple(text.splitlines())
    return Wordings(**parts)


def _family(block: str) -> Family:
    """A family from its block: the kind of value, then lines marked `+` told, `?` asked and `=` answered."""
    kind, *lines = block.splitlines()
    return Family(kind, *(tuple(line[2:] for line in lines if line.startswith(mark)) for mark in "+?="))


SUBJECT_ANSWERS = (
    "{z} is {v}.",
    "{z} is {v}.",
    "{z} is {v}.",
    "{v}.",
    "It is {v}.",
    "You told me that {z} is {v}.",
)

ACKNOWLEDGEMENTS = (
    "Okay.",
    "Got it.",
    "I will remember that.",
    "Thank you, I will keep it in mind.",
    "Noted.",
    "Sure.",
    "All right.",
    "Thanks for telling me.",
    "I see.",
    "Understood.",
)
READING_REQUESTS = (
    "Read this: ",
    "Here is a text. ",
    "Please read the following. ",
    "Read this text and answer my questions. ",
    "Read this and answer. ",
    "",
    "",
    "Listen: ",
    "Here is a page from a book: ",
    "Text: ",
)
READING_ENDINGS = (
    " Tell me when you have read it.",
    " Say so when you are done.",
    " Have you read it?",
    " I will ask you about it.",
    " Wait for my questions.",
)
READING_REPLIES = (
    "I have read it. What would you like to know?",
    "Okay, I have read it.",
    "Thank you. Ask me anything about it.",
    "Done. What is your question?",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Remember what the user tells you.",
    "Answer briefly.",
    "You answer questions about the conversation.",
    "You are a small model that remembers.",
)

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you today?"),
    ("Hi there!", "Hello! Nice to meet you."),
    ("Good morning!", "Good morning! How are you?"),
    ("Good evening.", "Good evening! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("How are you today?", "I am well, thank you. And you?"),
    ("What is your name?", "I am a small language model. I have no name of my own."),
    (
        "Who are you?",
        "I am a very small language model. I can chat, tell short tales and remember what you tell me.",
    ),
    ("What are you?", "I am a small language model, trained to remember what you tell me."),
    ("What can you do?", "I can remember facts from our chat, repeat lists, and tell short stories."),
    ("Are you a human?", "No, I am a small computer program."),
    ("Thank you!", "You are welcome!"),
    ("Thanks a lot.", "You are welcome. Is there anything else?"),
    ("That is great.", "I am glad to hear that."),
    ("Nice.", "Thank you!"),
    ("I am sad today.", "I am sorry to hear that. Do you want to talk about it?"),
    ("I am happy today.", "That is good to hear! What made you happy?"),
    ("I am tired.", "Then you should rest a little."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("Bye", "Bye! See you soon."),
    ("See you later.", "See you later! Take care."),
)
FREE_STORY_REQUESTS = ("Tell me a story.", "Please tell me a story.", "Do you know a story?")
STORY_REQUESTS = (
    "Tell me a story about {n}.",
    "Tell me a story about {n}.",
    "Tell me a story with {n} in it.",
    "Please tell me a tale about {n}.",
    "Can you write a story about {n}?",
    "Write a short story about {n}.",
    "I would like a story about {n}.",
    "Tell a short tale about {n}, please.",
    "A story about {n}, please.",
    "Do you know a story about {n}?",
    "Make up a story about {n}.",
)
# What a story may be about: within a group one can take another's part.
STORY_TOPICS = tuple(
    tuple(group.split())
    for group in (
        "fox bird cat dog bear rabbit frog duck mouse lion bunny squirrel monkey owl elephant puppy kitten turtle wolf "
        "horse pig cow sheep tiger dragon hen goat snake crab hedgehog donkey parrot penguin whale beetle spider crow "
        "deer giraffe hippo butterfly bee ant",
        "ball doll boat car truck kite box hat book toy train robot drum balloon lamp cup ring shell stone key clock "
        "bell basket bucket scarf whistle wagon bicycle ship map flute lantern spoon",
        "tree flower garden park beach forest house castle tower river lake bridge island mountain farm shop cave mill "
        "lighthouse",
        "apple cake cookie banana carrot pie pear sandwich pumpkin potato soup candy pancake melon",
    )
)
