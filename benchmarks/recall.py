"""What packing costs recall: the same questions, answered with the exact cache and with each method's.

    python -m benchmarks.recall --data DIR [--questions 1000] [--tokens 500 1000 2000] [--methods PRESET ...]

A fact lies between the sentences of a book that the embedded model has not read, in words that it has not read
either, and is asked for at the end (tools/embedded_model/recall.py). Answers are greedy. Questions are paired: what
counts is which of them a method loses and gains against the exact cache. DIR is laid out as
tools/embedded_model/README.md says.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from kvlens.engine.config import MethodConfig
from kvlens.engine.estimate import bits_per_value
from kvlens.engine.generate import generate
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from tools.embedded_model.corpus import read_texts
from tools.embedded_model.evaluate import DEPTHS, MAX_ANSWER_TOKENS, is_recalled
from tools.embedded_model.recall import RecallQuestion, recall_questions

SEED = 23
EXACT = "fp16, exact"


@dataclass(frozen=True)
class Row:
    """One method on the questions of one length, or of all (`prompt_tokens` None).

    Units: `recall` and `exact_recall` shares; `lost` and `gained` questions against the exact cache; `points` the
    difference in percentage points, `points_error` half of its 95 % interval.
    """

    method: str
    prompt_tokens: int | None
    questions: int
    bits_per_value: float
    recall: float
    exact_recall: float
    lost: int
    gained: int
    points: float
    points_error: float


@dataclass(frozen=True)
class Answers:
    """Which questions were answered right, and the cache's mean bits a value when the answers ended."""

    is_right: list[bool]
    bits_per_value: float


def questions_of(model: LoadedModel, prose: str, lengths: Sequence[int], count: int) -> dict[int, list[RecallQuestion]]:
    """At least `count` questions, as many of each length in tokens and of each depth."""
    per_cell = math.ceil(count / (len(lengths) * len(DEPTHS)))
    made: dict[int, list[RecallQuestion]] = {}
    for length in lengths:
        made[length] = [
            question
            for depth in DEPTHS
            for question in recall_questions(
                prose=prose, num_tokens=length, depth=depth, count=per_cell, seed=SEED, split="held_out",
                subjects="train", count_tokens=lambda messages: len(model.encode(model.render_chat(messages))),
            )
        ]  # fmt: skip
    return made


def answer_all(model: LoadedModel, method: str, config: MethodConfig, questions: Sequence[RecallQuestion]) -> Answers:
    """Every question in a cache of its own."""
    is_right, bits = [], 0.0
    for question in questions:
        cache = model.new_cache(method, config)
        prompt = model.encode(model.render_chat(question.messages))
        tokens = [
            token for token in generate(model, cache, prompt, max_new_tokens=MAX_ANSWER_TOKENS)
            if token not in model.end_tokens
        ]  # fmt: skip
        is_right.append(is_recalled(question, model.decode(tokens)))
        bits += bits_per_value(cache.footprint(), model.shape)
        cache.free()
    return Answers(is_right, bits / len(questions))


def paired(method: str, prompt_tokens: int | None, answers: Answers, exact: Answers) -> Row:
    """The method's row. The error is that of a difference of paired shares: only questions that change count."""
    count = len(answers.is_right)
    pairs = list(zip(exact.is_right, answers.is_right, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    difference = (gained - lost) / count
    error = 1.96 * math.sqrt(((gained + lost) / count - difference**2) / count)
    return Row(
        method, prompt_tokens, count, answers.bits_per_value, sum(answers.is_right) / count,
        sum(exact.is_right) / count, lost, gained, 100 * difference, 100 * error,
    )  # fmt: skip


def together(parts: Sequence[Answers]) -> Answers:
    """The answers of several lengths as one; as many questions of each."""
    return Answers(
        [right for part in parts for right in part.is_right],
        sum(part.bits_per_value for part in parts) / len(parts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with books/, of which some are held out")
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--questions", type=int, default=1000, help="at least so many for each method")
    parser.add_argument("--tokens", type=int, nargs="+", default=(500, 1000, 2000), help="lengths of the prompts")
    parser.add_argument("--methods", nargs="+", help="names of presets; all of them without it")
    options = parser.parse_args()
    _, held_out = read_texts(options.data)
    model = load_model(options.model)
    questions = questions_of(model, "\n".join(held_out.books), options.tokens, options.questions)
    presets = {title: (entry.name, config) for entry in available().values() for title, config in entry.presets.items()}
    wanted = [title for title in presets if title != EXACT and (not options.methods or title in options.methods)]
    if unknown := {*(options.methods or ())} - {*presets}:
        raise SystemExit(f"--methods must be presets, got {sorted(unknown)}; there are: {', '.join(presets)}")
    print(f"{model.name} on {model.device_name}")
    exact = {length: answer_all(model, "dense", DenseConfig(), asked) for length, asked in questions.items()}
    rows: list[Row] = []
    for title in (EXACT, *wanted):
        name, config = presets[title]
        found = exact if title == EXACT else {
            length: answer_all(model, name, config, asked) for length, asked in questions.items()
        }  # fmt: skip
        rows += [paired(title, length, found[length], exact[length]) for length in questions]
        rows.append(paired(title, None, together([*found.values()]), together([*exact.values()])))
        report.show(rows[-len(questions) - 1 :])
        report.save("recall", rows, model.device)


if __name__ == "__main__":
    main()
