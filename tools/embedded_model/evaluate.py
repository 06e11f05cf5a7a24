"""Measures an exported model: `python -m tools.embedded_model.evaluate --data DIR --model assets/model`.

Runs plain transformers and writes `evaluation.json`: perplexity by kind of text, recall by depth and length,
outlier channels of the cached keys, samples with a fixed seed. It does not know how the model was trained.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tools.processes import dealt

from .corpus import Texts, flowing, read_texts
from .recall import RecallQuestion, recall_questions

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS_TOKENS = (250, 500, 1000, 2000, 4000)
# Name of a table in `evaluation.json`, and what its questions are made of. "Wording" is every sentence part (statement,
# question, openers, closers), "subject" every attribute, thing and adjective; names and values are always fresh.
RECALL_TABLES = {
    "recall_one_fact_unseen_wording": {"num_facts": 1, "split": "held_out", "subjects": "train"},
    "recall_one_fact_second_wording": {"num_facts": 1, "split": "second", "subjects": "train"},
    "recall_one_fact_unseen_wording_and_subject": {"num_facts": 1, "split": "held_out", "subjects": "held_out"},
    "recall_one_fact_seen_wording": {"num_facts": 1, "split": "train", "subjects": "train"},
    "recall_four_facts_unseen_wording": {"num_facts": 4, "split": "held_out", "subjects": "train"},
}
MAX_ANSWER_TOKENS = 28
Cell = tuple[str, int, float]  # name of the table, length in tokens, depth
SAMPLE_PROMPTS = (
    "Hello! Who are you?",
    "Tell me a story about a fox.",
    "Tell me a story about a boat.",
    "My sister's name is Tilda and my locker code is 58213. What is my locker code?",
    "I have to buy milk, lemons, rice and candles. What do I have to buy?",
    "What is 7 + 5?",
    "What is the capital of France?",
    "Write a poem about the sea in four lines.",
)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Token ids `(1, T)` of a chat with the prompt for the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    max_tokens: int,
    window: int = 1024,
) -> dict[str, float]:
    """Nats a token and bits a character over the texts, read in windows of `window` tokens."""
    nats, num_tokens, num_characters = 0.0, 0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window]
            if len(piece) < 8:
                continue
            row = (
                torch.cat([torch.tensor([tokenizer.bos_token_id]), piece])[None]
                if piece[0] != tokenizer.bos_token_id
                else piece[None]
            )
            logits = model(input_ids=row[:, :-1]).logits.float()
            nats += functional.cross_entropy(logits[0], row[0, 1:], reduction="sum").item()
            num_tokens += row.shape[1] - 1
            num_characters += len(tokenizer.decode(piece, skip_special_tokens=True))
        if num_tokens >= max_tokens:
            break
    bits_per_character = nats / max(1, num_characters) / torch.log(torch.tensor(2.0)).item()
    return {
        "nats_per_token": round(nats / num_tokens, 4),
        "perplexity": round(float(torch.tensor(nats / num_tokens).exp()), 2),
        "bits_per_character": round(bits_per_character, 4),
        "num_tokens": num_tokens,
    }


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Texts,
    eval_folder: Path,
    *,
    max_tokens: int,
) -> dict[str, dict]:
    """Losses by kind of text, on texts kept out of the training and on sets never trained on."""

    def chats(dialogues: list[list[tuple[str, str]]]) -> list[str]:
        return [
            tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in turns], tokenize=False)
            for turns in dialogues
        ]

    kinds = {"books": [book[20_000:60_000] for book in held_out.books], "stories": held_out.stories}
    kinds |= {name: chats(dialogues) for name, dialogues in held_out.dialogues.items()}
    gsm8k = [json.loads(line) for line in (eval_folder / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    with (eval_folder / "truthfulqa.csv").open(encoding="utf-8", newline="") as file:
        truthful = [f"{row['Question']} {row['Best Answer']}" for row in csv.DictReader(file)]
    kinds |= {
        "eval: WikiText-2 validation": [
            flowing((eval_folder / "wikitext2_valid.txt").read_text(encoding="utf-8"))[:200_000]
        ],
        "eval: Shakespeare": [flowing((eval_folder / "shakespeare.txt").read_text(encoding="utf-8"))[:200_000]],
        "eval: GSM8K test": [f"{item['question']} {item['answer']}" for item in gsm8k],
        "eval: TruthfulQA": truthful,
    }
    return {kind: mean_loss(model, tokenizer, texts, max_tokens=max_tokens) for kind, texts in kinds.items()}


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    max_new_tokens: int,
    **sampling: float,
) -> str:
    """The model's reply, greedy unless sampling settings are given."""
    ids = render(tokenizer, messages)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=bool(sampling),
        **sampling,
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def is_recalled(question: RecallQuestion, reply: str) -> bool:
    """Whether the reply holds the value as a word or number of its own."""
    padded = f" {reply.lower()} "
    position = padded.find(question.value.lower())
    if position < 0:
        return False
    after = padded[position + len(question.value)]
    return not after.isalnum() and not padded[position - 1].isalnum()


def load(model_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The exported model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_folder)


def recall_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prose: str,
    cells: Iterable[Cell],
    *,
    count: int,
    seed: int = 7,
) -> dict[Cell, float]:
    """Share of recalled values in each cell, of `count` questions; greedy answers with the exact cache."""
    shares: dict[Cell, float] = {}
    for table, num_tokens, depth in cells:
        questions = recall_questions(
            prose=prose,
            num_tokens=num_tokens,
            depth=depth,
            count=count,
            seed=seed,
            count_tokens=lambda messages: render(tokenizer, messages).shape[1],
            **RECALL_TABLES[table],
        )
        right = [
            is_recalled(q, answer(model, tokenizer, q.messages, max_new_tokens=MAX_ANSWER_TOKENS)) for q in questions
        ]
        shares[table, num_tokens, depth] = round(sum(right) / len(right), 4)
        print(table, num_tokens, depth, shares[table, num_tokens, depth], flush=True)
    return shares


def _shares(model_folder: Path, prose: str, count: int, cells: Sequence[Cell]) -> dict[Cell, float]:
    return recall_shares(*load(model_folder), prose, cells, count=count)


def recall_tables(
    model_folder: Path, prose: str, *, lengths: Sequence[int], count: int, processes: int = 1
) -> dict[str, dict[str, dict[str, float]]]:
    """Every recall table: shares by length in tokens and depth, and their mean."""
    cells = [(table, num_tokens, depth) for table in RECALL_TABLES for num_tokens in lengths for depth in DEPTHS]
    ask = partial(_shares, model_folder, prose, count)
    parts = dealt(ask, cells, processes) if processes > 1 else [ask(cells)]
    shares = {cell: share for part in parts for cell, share in part.items()}
    tables: dict[str, dict[str, dict[str, float]]] = {table: {} for table in RECALL_TABLES}
    for table, row in tables.items():
        for num_tokens in lengths:
            by_depth = {f"{depth:.2f}": shares[table, num_tokens, depth] for depth in DEPTHS}
            row[str(num_tokens)] = by_depth | {"mean": round(mean(by_depth.values()), 4)}
    return tables


@torch.inference_mode()
def channel_outliers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prose: str, *, num_tokens: int = 1024
) -> list[dict]:
    """Per layer: the largest channel maximum of |K| over the median channel's, per head, and the same for V.

    Source: the premise of KIVI (Liu et al., 2024, section 3): keys have outlier channels, values have none.
    Keys are taken as cached, after the rotary embedding.
    """
    ids = tokenizer(prose, return_tensors="pt", add_special_tokens=False).input_ids[:, :num_tokens]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    result = []
    for index, layer in enumerate(cache.layers):
        ratios = {}
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            maxima = tensor[0].float().abs().amax(dim=1)
            ratios[name] = [round((head.max() / head.median()).item(), 2) for head in maxima]
        result.append(
            {
                "layer": index,
                "keys_max_over_median": ratios["keys"],
                "values_max_over_median": ratios["values"],
            }
        )
    return result


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> list[dict[str, str]]:
    """Replies to fixed prompts, drawn at temperature 0.7 with a fixed seed."""
    result = []
    for prompt in SAMPLE_PROMPTS:
        torch.manual_seed(seed)
        messages = [{"role": "user", "content": prompt}]
        result.append(
            {
                "prompt": prompt,
                "reply": answer(model, tokenizer, messages, max_new_tokens=120, temperature=0.7, top_k=40),
            }
        )
    return result


@torch.inference_mode()
def decode_speed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, num_tokens: int = 100, rounds: int = 5
) -> float:
    """Greedy tokens a second through `generate`, batch 1, after a short prompt: the median of some rounds."""
    ids = render(tokenizer, [{"role": "user", "content": "Tell me a story about a fox."}])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    model.generate(ids, max_new_tokens=8, **settings)
    speeds = []
    for _ in range(rounds):
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **settings)
        speeds.append(num_tokens / (time.perf_counter() - started))
    return round(median(speeds), 1)


def evaluate(
    model_folder: Path, data: Path, *, count: int, max_tokens: int, lengths: Sequence[int], processes: int = 1
) -> dict:
    """All figures of the model card. Processes share the recall questions alone: nothing in them is timed."""
    started = time.perf_counter()
    model, tokenizer = load(model_folder)
    load_seconds = round(time.perf_counter() - started, 2)
    _, held_out = read_texts(data)
    prose = "\n".join(held_out.books)
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"CPU ({platform.machine()}), {torch.get_num_threads()} threads, float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "load_seconds": load_seconds,
        "num_recall_questions": count,
        "decode_tokens_per_second": decode_speed(model, tokenizer),
        "perplexity": perplexities(model, tokenizer, held_out, data / "eval", max_tokens=max_tokens),
        **recall_tables(model_folder, prose, lengths=lengths, count=count, processes=processes),
        "channel_outliers": channel_outliers(model, tokenizer, prose[40_000:60_000]),
        "samples": samples(model, tokenizer),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with books/, stories/, chat/, questions/ and eval/"
    )
    parser.add_argument("--model", type=Path, default=Path("assets/model"))
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON to write (default: evaluation.json beside the model)"
    )
    parser.add_argument("--count", type=int, default=40, help="questions per depth and length")
    parser.add_argument("--max-tokens", type=int, default=40_000, help="tokens per kind of text for perplexity")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS_TOKENS, help="context lengths in tokens, for recall"
    )
    parser.add_argument("--processes", type=int, default=1, help="processes that share the questions, a thread each")
    options = parser.parse_args()
    figures = evaluate(
        options.model,
        options.data,
        count=options.count,
        max_tokens=options.max_tokens,
        lengths=options.lengths,
        processes=options.processes,
    )
    out = options.out or options.model / "evaluation.json"
    out.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
