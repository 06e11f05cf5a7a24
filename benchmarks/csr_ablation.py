"""What each choice of CSR is worth, on real keys and values: one command, one table, one picture.

    python -m benchmarks.csr_ablation --data DIR [--prompts 8] [--tokens 80000] [--groups modes atoms ...]

Dictionaries are learned from the shipped calibration text (kept in build/csr_ablation) and measured on prompts of
held-out text. The prompt's keys and values are coded and restored; the model then reads the next 64 tokens with them
and with the exact ones. DIR is laid out as tools/embedded_model/README.md says.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from transformers import DynamicCache

from benchmarks import report
from benchmarks.csr_coding import Coder, Variant, squared_error
from benchmarks.csr_variants import variants
from kvlens.engine.dictionaries import DictionaryKind, DictionarySet, DictionaryStore, MissingDictionary, fingerprint
from kvlens.engine.dictionaries.calibration import SHIPPED_TEXT, read_documents
from kvlens.engine.dictionaries.learn import LearnOptions, learn
from kvlens.engine.model import LoadedModel, load_model
from kvlens.engine.rotary import Rotary

WORK = Path("build/csr_ablation")
READ_ON_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """Means over prompts (and layers). Errors are squared and relative; `kl_nats` are nats a token read on."""

    group: str
    variant: str
    bits_per_value: float
    key_bits: float
    value_bits: float
    key_error: float
    value_error: float
    attention_error: float
    kl_nats: float
    same_top_token: float
    dictionary_mib: float


@dataclass(frozen=True)
class Prompt:
    """A prompt and what follows. Shapes: keys, values of each layer `[HK, T, D]`; log_probs `[64, V]`;
    outputs of each layer's attention `[64, HQ * D]`, both with the exact 16-bit cache."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    following: torch.Tensor
    log_probs: torch.Tensor
    outputs: list[torch.Tensor]


def held_out_rows(model: LoadedModel, data: Path, count: int) -> list[list[int]]:
    """Token ids of prompts of 1,100 to 2,048 tokens from texts that neither model nor dictionaries have seen."""
    from tools.embedded_model.corpus import RowMaker, read_texts

    _, held_out = read_texts(data)
    maker = RowMaker(held_out, None, seed=0, split="held_out")
    random, rows = Random(5), []
    while len(rows) < count:
        kind = random.choices(maker.KINDS, maker.SHARES)[0]
        made = maker._makers[kind](random, random.randint(4500, 6500))
        text = made if isinstance(made, str) else model.render_chat(made.as_messages())
        tokens = model.encode(text)
        if len(tokens) >= 1100:
            rows.append(tokens[:2048])
    return rows


def read_on(model: LoadedModel, keys, values, following: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities and attention outputs of the tokens after a prompt, with the given keys and values."""
    cache, outputs = DynamicCache(), []
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key.float().unsqueeze(0), value.float().unsqueeze(0), layer)
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0]))
        for layer in model.network.model.layers
    ]
    logits = model.network(following.unsqueeze(0), past_key_values=cache).logits[0]
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(dim=-1), outputs


def prepare(model: LoadedModel, rows: Sequence[list[int]]) -> Iterator[Prompt]:
    """Prompts with what the exact cache gives."""
    for row in rows:
        cache = DynamicCache()
        model.network(torch.tensor([row[:-READ_ON_TOKENS]]), past_key_values=cache)
        keys, values = ([getattr(layer, side)[0].half() for layer in cache.layers] for side in ("keys", "values"))
        following = torch.tensor(row[-READ_ON_TOKENS:])
        yield Prompt(keys, values, following, *read_on(model, keys, values, following))


def measure(model: LoadedModel, variant: Variant, dictionaries: DictionarySet | None, prompts: Sequence[Prompt]) -> Row:
    """One variant on all prompts."""
    coder = Coder(variant, dictionaries, Rotary.of(model.network))
    shape = model.shape
    found: dict[str, list[float]] = {name: [] for name in ("keys", "values", "attention", "kl", "top", "kb", "vb")}
    for prompt in prompts:
        sides = {}
        for side, layers in (("keys", prompt.keys), ("values", prompt.values)):
            sides[side] = [coder.restored(side, layer, exact) for layer, exact in enumerate(layers)]
            found[side] += [
                squared_error(exact, back).mean().item() for exact, back in zip(layers, sides[side], strict=True)
            ]
        log_probs, outputs = read_on(model, sides["keys"], sides["values"], prompt.following)
        found["attention"] += [
            squared_error(exact, ours).mean().item() for exact, ours in zip(prompt.outputs, outputs, strict=True)
        ]
        found["kl"].append((prompt.log_probs.exp() * (prompt.log_probs - log_probs)).sum(dim=-1).mean().item())
        found["top"].append((prompt.log_probs.argmax(dim=-1) == log_probs.argmax(dim=-1)).float().mean().item())
        bits = variant.bits_per_value(prompt.keys[0].shape[1], shape.num_kv_heads, shape.head_dim)
        found["kb"].append(bits["keys"])
        found["vb"].append(bits["values"])
    mean = {name: statistics.mean(values) for name, values in found.items()}
    size = 0.0 if dictionaries is None else dictionaries.num_bytes / 2 / 2**20
    return Row(
        variant.group, variant.name, (mean["kb"] + mean["vb"]) / 2, mean["kb"], mean["vb"], mean["keys"],
        mean["values"], mean["attention"], mean["kl"], mean["top"], size,
    )  # fmt: skip


def dictionaries_for(
    model: LoadedModel, wanted: Sequence[Variant], options: LearnOptions, text: Path
) -> dict[DictionaryKind, DictionarySet]:
    """Every dictionary that the variants need; those that are missing are learned first."""
    store = DictionaryStore([WORK], fingerprint(model.network), model_name="embedded")
    kinds = dict.fromkeys(variant.kind for variant in wanted if variant.kind is not None)
    available = store.available()
    missing = sorted((kind for kind in kinds if kind not in available), key=lambda kind: kind.num_atoms)
    if missing:
        for progress in learn(model, read_documents([text]), missing, options, unfinished=WORK / "unfinished"):
            print(f"\rlearning {progress.share:6.1%}", end="", flush=True)
            if progress.dictionaries is not None:
                store.save(progress.dictionaries)
                error = {side: statistics.mean(errors) for side, errors in progress.dictionaries.card["error"].items()}
                print(f"\r{progress.kind.name:30} {progress.dictionaries.card['seconds']:.0f} s {error}")
    try:
        return {kind: store.find(kind) for kind in kinds}
    except MissingDictionary as error:
        raise SystemExit(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=SHIPPED_TEXT, help="what the dictionaries are learned from")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=LearnOptions.num_tokens, help="tokens to learn dictionaries from")
    parser.add_argument("--epochs", type=int, default=LearnOptions.epochs)
    parser.add_argument("--groups", nargs="+", help="only these groups of variants; nothing is saved then")
    options = parser.parse_args()
    wanted = [variant for variant in variants() if options.groups is None or variant.group in options.groups]
    model = load_model(None, device="cpu")
    learning = LearnOptions(num_tokens=options.tokens, epochs=options.epochs)
    dictionaries = dictionaries_for(model, wanted, learning, options.text)
    rows = []
    with torch.inference_mode():
        prompts = list(prepare(model, held_out_rows(model, options.data, options.prompts)))
        for variant in wanted:
            rows.append(measure(model, variant, dictionaries.get(variant.kind), prompts))
            print(json.dumps(asdict(rows[-1])), flush=True)
    report.show(rows)
    if options.groups is None:
        report.save("csr_ablation", rows)


if __name__ == "__main__":
    main()
