"""What packing costs recall: the same questions, answered with the exact cache and with each method's.

    python -m benchmarks.recall --data DIR [--questions 1000] [--tokens 500 1000 2000] [--methods PRESET ...]
        [--processes 2]

A fact lies between the sentences of a book that the embedded model has not read, in words that it has not read
either, and is asked for at the end (tools/embedded_model/recall.py). Answers are greedy. Questions are paired: what
counts is which of them a method loses and gains against the exact cache. Nothing is timed: on a CPU a process for each
core is the fastest. DIR is laid out as tools/embedded_model/README.md says.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from transformers import DynamicCache

from benchmarks import report
from kvlens.engine.config import MethodConfig
from kvlens.engine.estimate import bits_per_value
from kvlens.engine.generate import forward
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available
from tools.embedded_model.corpus import read_texts
from tools.embedded_model.evaluate import DEPTHS, MAX_ANSWER_TOKENS, is_recalled
from tools.embedded_model.recall import RecallQuestion, recall_questions
from tools.processes import dealt

Presets = dict[str, tuple[str, MethodConfig]]
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


@dataclass
class Answers:
    """Which questions a method answered right, and its bits a value when each answer ended."""

    is_right: list[bool] = field(default_factory=list)
    bits_per_value: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Prompt:
    """A prompt that the network has read. Shapes: logits `[V]` after it; each layer's keys, values `[1, HK, T, D]`."""

    logits: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor]]


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


def read_prompt(model: LoadedModel, messages: Sequence[dict[str, str]]) -> Prompt:
    """One forward pass over the question: no method changes it, so all of them share it."""
    ids = torch.tensor([model.encode(model.render_chat(messages))], device=model.device)
    with torch.inference_mode():
        result = model.network(ids, past_key_values=DynamicCache(), logits_to_keep=1)
    return Prompt(result.logits[0, -1], [(layer.keys, layer.values) for layer in result.past_key_values.layers])


def answer_from(model: LoadedModel, method: str, config: MethodConfig, prompt: Prompt) -> tuple[str, float]:
    """The greedy answer from a cache of that method, and its bits a value at the end."""
    cache = model.new_cache(method, config)
    with cache.prefill():
        for layer, (keys, values) in enumerate(prompt.layers):
            cache.append(layer, keys, values)
    tokens, logits = [], prompt.logits
    while (token := int(logits.argmax())) not in model.end_tokens and len(tokens) < MAX_ANSWER_TOKENS:
        tokens.append(token)
        logits = forward(model, cache, [token]).logits
    bits = bits_per_value(cache.footprint(), model.shape)
    cache.free()
    return model.decode(tokens), bits


def ask_all(model: LoadedModel, presets: Presets, questions: Iterable[RecallQuestion]) -> dict[str, Answers]:
    """Every question to every preset."""
    found = {title: Answers() for title in presets}
    for question in questions:
        prompt = read_prompt(model, question.messages)
        for title, (method, config) in presets.items():
            reply, bits = answer_from(model, method, config, prompt)
            found[title].is_right.append(is_recalled(question, reply))
            found[title].bits_per_value.append(bits)
    return found


def _ask_part(name: str | None, presets: Presets, questions: Sequence[RecallQuestion]) -> dict[str, Answers]:
    return ask_all(load_model(name), presets, questions)


def ask_in_processes(
    name: str | None, presets: Presets, questions: Sequence[RecallQuestion], count: int
) -> dict[str, Answers]:
    """`ask_all` by `count` processes; the answers come in another order, the same for every preset."""
    parts = dealt(partial(_ask_part, name, presets), questions, count)
    return {title: together(part[title] for part in parts) for title in presets}


def paired(method: str, prompt_tokens: int | None, answers: Answers, exact: Answers) -> Row:
    """The method's row. The error is that of a difference of paired shares: only questions that change count."""
    count = len(answers.is_right)
    pairs = list(zip(exact.is_right, answers.is_right, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    difference = (gained - lost) / count
    error = 1.96 * math.sqrt(((gained + lost) / count - difference**2) / count)
    return Row(
        method, prompt_tokens, count, mean(answers.bits_per_value), sum(answers.is_right) / count,
        sum(exact.is_right) / count, lost, gained, 100 * difference, 100 * error,
    )  # fmt: skip


def together(parts: Iterable[Answers]) -> Answers:
    """The answers of several parts as one."""
    whole = Answers()
    for part in parts:
        whole.is_right += part.is_right
        whole.bits_per_value += part.bits_per_value
    return whole


def rows_of(found: dict[int, dict[str, Answers]]) -> list[Row]:
    """For each preset a row a length, then one of all."""
    rows = []
    for title in next(iter(found.values())):
        rows += [paired(title, length, answers[title], answers[EXACT]) for length, answers in found.items()]
        own, exact = (together(answers[name] for answers in found.values()) for name in (title, EXACT))
        rows.append(paired(title, None, own, exact))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with books/, of which some are held out")
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--questions", type=int, default=1000, help="at least so many for each method")
    parser.add_argument("--tokens", type=int, nargs="+", default=(500, 1000, 2000), help="lengths of the prompts")
    parser.add_argument("--methods", nargs="+", help="names of presets; all of them without it")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the questions, a thread each")
    options = parser.parse_args()
    presets = {title: (entry.name, config) for entry in available().values() for title, config in entry.presets.items()}
    if unknown := {*(options.methods or ())} - {*presets}:
        raise SystemExit(f"--methods must be presets, got {sorted(unknown)}; there are: {', '.join(presets)}")
    if options.methods:
        presets = {title: presets[title] for title in dict.fromkeys((EXACT, *options.methods))}
    _, held_out = read_texts(options.data)
    model = load_model(options.model)
    print(f"{model.name} on {model.device_name}")
    questions = questions_of(model, "\n".join(held_out.books), options.tokens, options.questions)
    found: dict[int, dict[str, Answers]] = {}
    for length, asked in questions.items():
        if options.processes > 1:
            found[length] = ask_in_processes(options.model, presets, asked, options.processes)
        else:
            found[length] = ask_all(model, presets, asked)
        rows = rows_of(found)
        report.show([row for row in rows if row.prompt_tokens == length])
        report.save("recall", rows, model.device)
    report.show([row for row in rows if row.prompt_tokens is None])


if __name__ == "__main__":
    main()
