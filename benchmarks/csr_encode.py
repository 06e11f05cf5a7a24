"""What packing a prompt costs beside reading it: the share of every method's packing in the time of the prefill.

    python -m benchmarks.csr_encode [--model NAME] [--tokens 512 2048]

The prompt is read once a round with a cache of each method, in turn; the forward pass and `end_prefill` are timed
apart. Medians. For sparse codes the arithmetic is about 2N(D + s) operations a vector by way of the Gram matrix, and
`2 * layers * kv_heads` vectors a token.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks import report
from kvlens.engine.errors import EngineError
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.registry import available

ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """Medians. Units: milliseconds of the forward passes and of the packing; microseconds a vector."""

    method: str
    prompt_tokens: int
    prefill_ms: float
    packing_ms: float
    share: float
    vector_us: float


def timed(model: LoadedModel, name: str, config, num_tokens: int) -> tuple[float, float]:
    """Milliseconds of the prompt's forward pass, and of packing it."""
    cache = model.new_cache(name, config)
    tokens = torch.tensor([[40 + 7 * position % 400 for position in range(num_tokens)]], device=model.device)
    try:
        with torch.inference_mode():
            begin = time.perf_counter()
            model.network(tokens, past_key_values=cache, logits_to_keep=1)
            read = time.perf_counter()
            cache.end_prefill()
            return 1000 * (read - begin), 1000 * (time.perf_counter() - read)
    finally:
        cache.free()


def measure(model: LoadedModel, num_tokens: int) -> list[Row]:
    """Every preset of every method at one length of prompt."""
    found: dict[str, list[tuple[float, float]]] = {}
    presets = [(label, entry.name, config) for entry in available().values() for label, config in entry.presets.items()]
    for _ in range(ROUNDS + 1):
        for label, name, config in presets:
            try:
                found.setdefault(label, []).append(timed(model, name, config, num_tokens))
            except EngineError as error:
                print(f"{label} is left out: {error}")
    # The forward pass is the same for all; the first round warms up.
    reading = statistics.median(read for times in found.values() for read, _ in times[1:])
    num_vectors = 2 * model.shape.num_layers * model.shape.num_kv_heads * num_tokens
    rows = []
    for label, times in found.items():
        packing = statistics.median(pack for _, pack in times[1:])
        rows.append(Row(label, num_tokens, reading, packing, packing / reading, 1000 * packing / num_vectors))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face name or folder; the embedded model without it")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    model = load_model(options.model)
    rows = [row for num_tokens in options.tokens for row in measure(model, num_tokens)]
    report.show(rows)
    report.save("csr_encode", rows, model.device)


if __name__ == "__main__":
    main()
