"""The training texts: read from a folder, split once by a fixed seed, packed into rows of weighted tokens.

A row is a function of `(seed, step, row)` alone, so a stopped run resumes with the very rows it would have
seen. The module does not know the model.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from . import recall
from . import wordings as w
from .recall import PLAIN_WEIGHT, TOLD_WEIGHT, Conversation
from .tokenizer import BOS, END, ROLE_TOKENS

SPLIT_SEED = 20240601
HELD_OUT_SHARE = 0.02
MAX_HELD_OUT_ITEMS = 400
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "_": None, "\ufeff": None})
DIALOGUE_USER_WEIGHT = 0.5
NOUN_PHRASE = re.compile(
    r"\b(?:a|an|the) ([a-z]{3,})(?=[.,!?;]| (?:and|was|is|had|in|on|that|who|named|called|to|with|for|said|saw)\b)"
)
# Words that look like what a story is about and are not.
_NO_TOPICS = (
    "little big old young time day other end lot the she they one but then his her and when once let yes you can"
)
NO_TOPICS = frozenset(_NO_TOPICS.split()) | frozenset(_NO_TOPICS.title().split())


@dataclass(frozen=True)
class Texts:
    """Texts by kind: prose as strings, chats as lists of turns `(role, text)`."""

    books: list[str]
    stories: list[str]
    dialogues: dict[str, list[list[tuple[str, str]]]]


@dataclass(frozen=True)
class Row:
    """Token ids of one row and the loss weight of each as a target."""

    token_ids: np.ndarray
    weights: np.ndarray


def read_xz(path: Path) -> str:
    """The unpacked text of an .xz file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.read()


def flowing(text: str) -> str:
    """Prose with plain quotes, its lines joined to paragraphs, one newline between paragraphs."""
    text = text.translate(QUOTES).replace("\r", "")
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return re.sub(r"[ \t]*\n\s*", "\n", re.sub(r" {2,}", " ", text)).strip()


def read_texts(folder: Path) -> tuple[Texts, Texts]:
    """Training and held-out texts of a folder laid out as `README.md` says; `eval/` is never opened."""
    books = [
        flowing(book)
        for path in sorted((folder / "books").glob("*.xz"))
        for book in read_xz(path).split("<|endofbook|>")
    ]
    stories = [
        flowing(story)
        for path in sorted((folder / "stories").glob("*.xz"))
        for story in read_xz(path).split("<|endoftext|>")
    ]
    dialogues = {
        path.name.split(".")[0]: list(_dialogues(path)) for path in sorted((folder / "chat").glob("*.jsonl.xz"))
    }
    dialogues |= {
        path.name.split(".")[0]: list(_questions(path)) for path in sorted((folder / "questions").glob("*.jsonl.xz"))
    }
    books_split = _split([book for book in books if len(book) > 5_000])
    stories_split = _split([story for story in stories if len(story) > 100])
    dialogues_split = {kind: _split(items) for kind, items in dialogues.items()}
    return tuple(
        Texts(
            books_split[part],
            stories_split[part],
            {kind: split[part] for kind, split in dialogues_split.items()},
        )
        for part in (0, 1)
    )


def _split(items: list) -> tuple[list, list]:
    items = list(items)
    Random(SPLIT_SEED).shuffle(items)
    num_held_out = min(MAX_HELD_OUT_ITEMS, max(1, int(len(items) * HELD_OUT_SHARE)))
    return items[num_held_out:], items[:num_held_out]


def _dialogues(path: Path) -> Iterator[list[tuple[str, str]]]:
    for line in filter(None, read_xz(path).split("\n")):
        turns = json.loads(line)["turns"]
        if turns and isinstance(turns[0], str):
            turns = [("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(turns)]
        yield [(role, text.translate(QUOTES)) for role, text in turns if role in ROLE_TOKENS and text]


def _questions(path: Path) -> Iterator[list[tuple[str, str]]]:
    for line in filter(None, read_xz(path).split("\n")):
        item = json.loads(line)
        question, answer = (
            item["question"].translate(QUOTES),
            re.sub(r"<<.*?>>", "", str(item["answer"])).translate(QUOTES),
        )
        if item.get("options"):
            question += " " + ", ".join(map(str, item["options"])) + "?"
        yield [("user", question), ("assistant", answer.replace("\n####", "\nThe answer is"))]


def sample_for_tokenizer(texts: Texts, *, num_characters: int) -> Iterator[str]:
    """A mixed sample of the training texts and of generated chats to learn the vocabulary from."""
    random = Random(SPLIT_SEED)
    kinds = [dialogues for name, dialogues in texts.dialogues.items() if name not in ("open_trivia", "gsm8k_train")]
    given = 0
    while given < num_characters:
        book = random.choice(texts.books)
        start = random.randrange(len(book))
        pieces = [book[start : start + 3000], *random.sample(texts.stories, 2)]
        pieces += [" ".join(text for _, text in random.choice(kind)) for kind in kinds]
        pieces.append(" ".join(m["content"] for m in recall.chat_conversation(random, [], num_facts=6).as_messages()))
        given += sum(map(len, pieces))
        yield from pieces


class RowMaker:
    """Makes rows of a given length from the texts and from generated conversations.

    The mixture is by conversations drawn; facts are hidden in most of the prose, so that reading and recall
    are learned together. Stories are few (0.8 million tokens): a run that read them 14 times learned them by heart
    and was worse on new ones, so they make about a tenth of the tokens.
    """

    KINDS = ("passage", "chat", "lookup", "repeat", "sum", "dialogue", "story", "book", "small_talk")
    SHARES = (45, 14, 6, 5, 8, 13, 10, 4, 1.5)
    STORY_PROSE_SHARE = 0.1
    # Stories without a request, and requests without a topic.
    BARE_STORY_SHARE = 0.15
    FREE_STORY_SHARE = 0.1
    # Stories told about another animal or thing than the book's: the topic has to come from the request.
    RECAST_SHARE = 0.6
    # The first mentions of the topic weigh more: where all of them did, foxes met foxes.
    TOPIC_WEIGHT, NUM_TOPIC_MENTIONS = 3.0, 2
    STORY_NOISE = 0.15

    def __init__(self, texts: Texts, tokenizer: Tokenizer, *, seed: int, split: str = "train") -> None:
        self.texts, self.tokenizer, self.seed, self.split = texts, tokenizer, seed, split
        self._dialogue_kinds = {kind: items for kind, items in texts.dialogues.items() if items}
        self._chats = [
            items for kind, items in self._dialogue_kinds.items() if kind not in ("open_trivia", "gsm8k_train")
        ]
        self._makers: dict[str, Callable[[Random, int], Conversation | str]] = {
            "passage": self._passage,
            "chat": self._chat,
            "lookup": lambda random, room: recall.lookup_conversation(
                random, num_pairs=random.randint(2, max(3, min(16, room // 90))), split=split
            ),
            "repeat": lambda random, room: recall.repeat_conversation(random, split),
            "sum": lambda random, room: recall.sum_conversation(random),
            "dialogue": self._dialogue,
            "story": self._story,
            "book": lambda random, room: self.prose(random, room),
            "small_talk": self._small_talk,
        }

    def rows(self, *, step: int, num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target weights, each `(num_rows, length + 1)`, of one training step."""
        rows = [self.row(Random(f"{self.seed}/{step}/{index}"), length + 1) for index in range(num_rows)]
        return np.stack([row.token_ids for row in rows]), np.stack([row.weights for row in rows])

    def row(self, random: Random, length: int) -> Row:
        """Conversations and texts one after another, each opened by the begin token, cut at `length`."""
        token_ids, weights = [], []
        used = 0
        while used < length:
            room = int((length - used) * recall.CHARACTERS_PER_TOKEN * 0.85)
            kind = random.choices(self.KINDS, self.SHARES)[0] if room > 150 else "lookup"
            made = self._makers[kind](random, room)
            ids, target_weights = self.encode(made)
            if kind == "story" and self.split == "train":
                ids, target_weights = self._noised(random, ids, target_weights)
            token_ids.append(ids)
            weights.append(target_weights)
            used += len(ids)
        return Row(np.concatenate(token_ids)[:length], np.concatenate(weights)[:length])

    def encode(self, made: Conversation | str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and weights of a conversation (with the chat template's tokens) or of plain prose."""
        pieces = [(BOS, 0.0)]
        if isinstance(made, str):
            pieces += [(made, PLAIN_WEIGHT), (END, PLAIN_WEIGHT)]
        else:
            for role, parts in made.messages:
                pieces += [
                    (ROLE_TOKENS[role], 0.1),
                    *parts,
                    (END, PLAIN_WEIGHT if role == "assistant" else TOLD_WEIGHT),
                ]
        encoding = self.tokenizer.encode("".join(text for text, _ in pieces), add_special_tokens=False)
        ends = np.cumsum([len(text) for text, _ in pieces])
        offsets = np.array([end for _, end in encoding.offsets])
        # A token belongs to the piece in which it ends: the blank before a word is part of that word's token.
        owners = np.searchsorted(ends, offsets, side="left").clip(max=len(pieces) - 1)
        return np.array(encoding.ids, dtype=np.int64), np.array([weight for _, weight in pieces], dtype=np.float32)[
            owners
        ]

    def prose(self, random: Random, num_characters: int) -> str:
        """A stretch of a random book, starting at a sentence."""
        book = random.choice(self.texts.books)
        start = random.randrange(max(1, len(book) - num_characters - 300))
        first = re.compile(r"[.!?\"] |\n").search(book, start, start + 300)
        start = first.end() if first else start
        prose = book[start : start + num_characters].rstrip()
        return recall.whole_sentences(prose) if random.random() < 0.8 else prose

    def _reading(self, random: Random, num_characters: int) -> str:
        if random.random() >= self.STORY_PROSE_SHARE:
            return self.prose(random, num_characters)
        stories: list[str] = []
        while sum(map(len, stories)) < num_characters:
            stories.append(random.choice(self.texts.stories))
        return recall.whole_sentences("\n".join(stories)[:num_characters])

    def _target(self, random: Random, room: int) -> int:
        # Half of the conversations fill the row, the others are of any shorter length.
        return room if random.random() < 0.5 else int(150 * (max(room, 151) / 150) ** random.random())

    def _passage(self, random: Random, room: int) -> Conversation:
        target = self._target(random, room)
        num_facts = max(1, min(16, round(target / random.choice((160, 250, 400, 700)))))
        prose = self._reading(random, max(0, target - 150 * num_facts)) if random.random() < 0.9 else ""
        return recall.passage_conversation(random, prose, num_facts=num_facts, split=self.split)

    def _chat(self, random: Random, room: int) -> Conversation:
        target = self._target(random, room)
        talk: list[str] = []
        num_facts = max(1, min(12, round(target / random.choice((170, 250, 400)))))
        while sum(map(len, talk)) < target - 170 * num_facts - 200:
            turns = [text for _, text in random.choice(random.choice(self._chats))]
            talk += turns[: len(turns) // 2 * 2]
        return recall.chat_conversation(random, talk, num_facts=num_facts, split=self.split)

    def _dialogue(self, random: Random, room: int) -> Conversation:
        kind = random.choices(
            list(self._dialogue_kinds),
            [0.3 if name in ("gsm8k_train", "taskmaster4") else 1 for name in self._dialogue_kinds],
        )[0]
        conversation = Conversation()
        for role, text in random.choice(self._dialogue_kinds[kind]):
            conversation.say(role, (text, PLAIN_WEIGHT if role == "assistant" else DIALOGUE_USER_WEIGHT))
        return conversation

    def _story(self, random: Random, room: int) -> Conversation | str:
        story = random.choice(self.texts.stories)
        if random.random() < self.BARE_STORY_SHARE:
            return story
        topic = None if random.random() < self.FREE_STORY_SHARE else story_topic(random, story)
        conversation = Conversation()
        if topic is None:
            conversation.say("user", (random.choice(w.FREE_STORY_REQUESTS), TOLD_WEIGHT))
            conversation.say("assistant", (story, PLAIN_WEIGHT))
            return conversation
        if random.random() < self.RECAST_SHARE:
            topic, story = recast(random, story, topic)
        named = topic if topic[0].isupper() else f"{'an' if topic[0] in 'aeiou' else 'a'} {topic}"
        conversation.say("user", (random.choice(w.STORY_REQUESTS).format(n=named), TOLD_WEIGHT))
        pieces = re.split(rf"\b({topic})", story)
        weights = dict.fromkeys(range(1, 2 * self.NUM_TOPIC_MENTIONS, 2), self.TOPIC_WEIGHT)
        conversation.say("assistant", *((text, weights.get(i, PLAIN_WEIGHT)) for i, text in enumerate(pieces) if text))
        return conversation

    def _noised(self, random: Random, token_ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some of a story's tokens become tokens of another story, and nobody is asked to predict those.

        Read thirty times as it is, a story is learned by heart. Noise like this keeps a model from that (Xie et al.,
        Data Noising as Smoothing in Neural Network Language Models, arXiv 1703.02573).
        """
        others = self.tokenizer.encode(random.choice(self.texts.stories), add_special_tokens=False).ids
        token_ids, weights = token_ids.copy(), weights.copy()
        for at in np.flatnonzero(weights == PLAIN_WEIGHT)[:-1]:  # the last is the end token
            if random.random() < self.STORY_NOISE:
                token_ids[at], weights[at] = random.choice(others), 0.0
        return token_ids, weights

    def _small_talk(self, random: Random, room: int) -> Conversation:
        conversation = Conversation()
        for user, assistant in random.sample(w.SMALL_TALK, random.randint(1, 3)):
            conversation.say("user", (user, TOLD_WEIGHT))
            conversation.say("assistant", (assistant, PLAIN_WEIGHT))
        return conversation


def story_topic(random: Random, story: str) -> str | None:
    """A noun or a name which the story is about: told of early and again and again; None if there is none."""
    early = story[: len(story) // 2]
    nouns = [noun for noun in re.findall(NOUN_PHRASE, early) if noun not in NO_TOPICS]
    names = [name for name in re.findall(r"\b[A-Z][a-z]{2,}\b", early) if name not in NO_TOPICS]
    counts = {word: story.count(word) for word in (*nouns, *names) if story.count(word) >= 3}
    known = [word for word in counts if any(word in group for group in w.STORY_TOPICS)]
    if known and random.random() < 0.7:
        return random.choice(known)
    shares = [count if word.islower() else 1 for word, count in counts.items()]
    return random.choices(list(counts), shares)[0] if counts else None


def recast(random: Random, story: str, topic: str) -> tuple[str, str]:
    """Another topic of the same kind, if there is one, and the story told about that."""
    group = next((group for group in w.STORY_TOPICS if topic in group), (topic,))
    new = random.choice(group)
    if re.search(rf"\b{new}", story):
        return topic, story
    article = "an" if new[0] in "aeiou" else "a"
    story = re.sub(rf"\b([Aa])n? {topic}\b", lambda m: m[1] + article[1:] + " " + new, story)
    story = re.sub(rf"\b{topic}(?=s?\b)", new, story)
    return new, re.sub(rf"\b{topic.capitalize()}(?=s?\b)", new.capitalize(), story)
