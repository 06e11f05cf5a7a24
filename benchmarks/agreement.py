"""How far a packed cache moves the model's answers: the same prompts, exact against each method.

    python -m benchmarks.agreement [--model NAME] [--prompts 24] [--tokens 200]

Two questions. *Free*: both write greedily by themselves; how many first tokens are the same? *Forced*: both
read the exact lane's answer token by token, through the cache; how often is the likeliest token the same, and
how far apart are the distributions (KL divergence of the method from the exact cache, nats a token)? Prompts
are long enough that most of what is attended to is packed.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import report
from kvlens.engine.config import MethodConfig
from kvlens.engine.estimate import bits_per_value
from kvlens.engine.generate import forward, prefill
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available

NAMES = ("Ada", "Ben", "Cora", "Dan", "Ella", "Finn", "Greta", "Hugo", "Ida", "Jonas", "Kate", "Leo")
THINGS = ("lamp", "kite", "boat", "clock", "violin", "map", "coat", "basket", "ladder", "drum")
PLACES = ("by the river", "in the old barn", "under the bridge", "at the station", "in the attic", "on the hill")


@dataclass(frozen=True)
class Row:
    """Means over the prompts. Units: `kl_nats` nats a token; `same_first_tokens` tokens before the answers part."""

    method: str
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    bits_per_value: float
    times_smaller: float
    same_answers: float
    same_first_tokens: float
    same_top_token: float
    kl_nats: float


@dataclass(frozen=True)
class Exact:
    """What the exact cache answered. Shapes: log_probs fp32 `[T, V]` for its own T tokens."""

    prompt: list[int]
    tokens: list[int]
    log_probs: torch.Tensor


def make_prompt(seed: int) -> list[dict[str, str]]:
    """A chat message of some 400 words: who left what where, then a request."""
    rng = random.Random(seed)
    facts = [
        f"{rng.choice(NAMES)} left a {rng.choice(THINGS)} {rng.choice(PLACES)} and went home at {rng.randint(1, 12)}."
        for _ in range(30)
    ]
    request = rng.choice(("Tell me a story about it.", "What happened here?", "Who was there, and what did they do?"))
    return [{"role": "user", "content": " ".join([*facts, request])}]


def exact_answer(model: LoadedModel, prompt: list[int], num_tokens: int) -> Exact:
    """The greedy answer with the plain cache; it does not end before `num_tokens`."""
    cache = model.new_cache("dense", DenseConfig())
    *_, result = prefill(model, cache, prompt)
    tokens, log_probs = [], []
    for _ in range(num_tokens):
        log_probs.append(result.logits.float().log_softmax(dim=-1))
        tokens.append(int(result.logits.argmax()))
        result = forward(model, cache, tokens[-1:])
    cache.free()
    return Exact(prompt, tokens, torch.stack(log_probs))


def compare(model: LoadedModel, method: str, config: MethodConfig, answers: Sequence[Exact], title: str) -> Row:
    """One method on all prompts."""
    free, top, kl, footprint = [], [], [], None
    for answer in answers:
        forced, footprint = _forced(model, method, config, answer)
        top.append((forced.argmax(dim=-1) == answer.log_probs.argmax(dim=-1)).float().mean().item())
        kl.append((answer.log_probs.exp() * (answer.log_probs - forced)).sum(dim=-1).mean().item())
        free.append(_same_first_tokens(model, method, config, answer))
    bits = bits_per_value(footprint, model.shape)
    return Row(
        title, len(answers), round(statistics.mean(len(answer.prompt) for answer in answers)), len(answers[0].tokens),
        bits, 16 / bits, statistics.mean(count == len(answers[0].tokens) for count in free), statistics.mean(free),
        statistics.mean(top), statistics.mean(kl),
    )  # fmt: skip


def _forced(model: LoadedModel, method: str, config: MethodConfig, answer: Exact):
    """Log-probabilities along the exact answer, and the cache's footprint at its end."""
    cache = model.new_cache(method, config)
    *_, result = prefill(model, cache, answer.prompt)
    log_probs = [result.logits.float().log_softmax(dim=-1)]
    for token in answer.tokens[:-1]:
        log_probs.append(forward(model, cache, [token]).logits.float().log_softmax(dim=-1))
    footprint = cache.footprint()
    cache.free()
    return torch.stack(log_probs), footprint


def _same_first_tokens(model: LoadedModel, method: str, config: MethodConfig, answer: Exact) -> int:
    cache = model.new_cache(method, config)
    *_, result = prefill(model, cache, answer.prompt)
    same = 0
    for token in answer.tokens:
        if int(result.logits.argmax()) != token:
            break
        same += 1
        result = forward(model, cache, [token])
    cache.free()
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    prompts = [model.encode(model.render_chat(make_prompt(seed))) for seed in range(arguments.prompts)]
    answers = [exact_answer(model, prompt, arguments.tokens) for prompt in prompts]
    rows = [
        compare(model, entry.name, config, answers, preset)
        for entry in available().values()
        for preset, config in entry.presets.items()
    ]
    print(f"{model.name} on {model.device_name}")
    report.show(rows)
    report.save("agreement", rows, model.device)


if __name__ == "__main__":
    main()
