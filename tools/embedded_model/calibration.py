"""Writes the text that dictionaries are learned from: `python -m tools.embedded_model.calibration --data DIR`.

Half is passages of public-domain books, half conversations made by `recall.py`, many of them around such passages,
so that long prompts, chat turns and plain prose are all there. Only training texts are used, so that everything held
out stays unseen. The result may be shipped: it holds nothing but public-domain books and our own words.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from random import Random

from . import recall
from . import wordings as w
from .corpus import RowMaker, read_texts
from .recall import PLAIN_WEIGHT, TOLD_WEIGHT, Conversation

KINDS = ("prose", "passage", "chat", "lookup", "repeat", "sum", "small_talk")
SHARES = (40, 30, 18, 8, 2, 1, 1)
LONGEST_CHARACTERS = 7_000


def documents(maker: RowMaker, *, num_characters: int, seed: int) -> list[dict]:
    """Lines of the file: `{"text": prose}` or `{"turns": [user, assistant, ...]}`, short and long mixed."""
    random = Random(seed)
    lines, written = [], 0
    while written < num_characters:
        room = int(LONGEST_CHARACTERS * (0.06 ** random.random()))
        kind = random.choices(KINDS, SHARES)[0]
        line = {"text": _prose(maker, random, room)} if kind == "prose" else _turns(maker, random, kind, room)
        lines.append(line)
        written += len(line["text"]) if kind == "prose" else sum(map(len, line["turns"]))
    return lines


def _turns(maker: RowMaker, random: Random, kind: str, room: int) -> dict:
    num_facts = max(1, min(12, room // 300))
    if kind == "passage":
        prose = _prose(maker, random, max(200, room - 150 * num_facts))
        made = recall.passage_conversation(random, prose, num_facts=num_facts, split="train")
    elif kind == "chat":
        made = recall.chat_conversation(random, [], num_facts=num_facts, split="train")
    elif kind == "lookup":
        made = recall.lookup_conversation(random, num_pairs=max(2, min(16, room // 90)), split="train")
    elif kind == "repeat":
        made = recall.repeat_conversation(random, "train")
    elif kind == "sum":
        made = recall.sum_conversation(random)
    else:
        made = Conversation()
        for user, assistant in random.sample(w.SMALL_TALK, 3):
            made.say("user", (user, TOLD_WEIGHT))
            made.say("assistant", (assistant, PLAIN_WEIGHT))
    # A line's turns alternate between user and assistant: there is no place for a system turn.
    return {"turns": [message["content"] for message in made.as_messages() if message["role"] != "system"]}


def _prose(maker: RowMaker, random: Random, num_characters: int) -> str:
    # Shorter stretches may come from the stories, which have another licence.
    return maker.prose(random, max(1500, num_characters))[:num_characters]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with books/, stories/, chat/ and questions/")
    parser.add_argument("--out", type=Path, default=Path("assets/calibration.jsonl.gz"))
    parser.add_argument("--characters", type=int, default=950_000)
    options = parser.parse_args()
    train, _ = read_texts(options.data)
    lines = documents(RowMaker(train, None, seed=0), num_characters=options.characters, seed=20240601)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # No time of writing inside: the same texts give the same file.
    options.out.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"wrote {len(lines)} documents, {len(text):,} characters, {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
