"""Keys and values of a model over text, to learn dictionaries from.

Each document is read alone from its first token, as a prompt is, so that keys stand at the positions where a cache
meets them. The module knows nothing of dictionaries.
"""

import gzip
import hashlib
import json
import lzma
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from kvlens.engine.errors import EngineError
from kvlens.engine.model import LoadedModel
from kvlens.engine.rotary import Rotary

SHIPPED_TEXT = Path(__file__).resolve().parents[2] / "assets" / "calibration.jsonl.gz"
"""A text to learn from that comes with the project, so that no download is needed."""

Document = str | list[dict[str, str]]
"""Prose, or a conversation as messages with role and content."""

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_SEED = 20240601


def read_documents(paths: Sequence[Path | str]) -> list[Document]:
    """Documents of text files (`.txt`, `.jsonl`, either as `.gz` or `.xz` too).

    A text file is one document. A line of a JSON-lines file has a `text`, or `turns`: strings that alternate
    between user and assistant. Raises: EngineError if a file cannot be read or says nothing.
    """
    documents = [document for path in paths for document in _read(Path(path))]
    if not documents:
        raise EngineError("there is no text to learn from: the files given are empty")
    return documents


def _read(path: Path) -> Iterator[Document]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
        if ".jsonl" not in path.suffixes:
            yield from filter(None, [text.strip()])
            return
        for line in filter(str.strip, text.split("\n")):
            entry = json.loads(line)
            yield entry["text"] if "text" in entry else _messages(entry["turns"])
    except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path} cannot be read as text ({type(error).__name__}: {error}). Give UTF-8 text files, or JSON lines "
            'with {"text": "..."} or {"turns": ["...", "..."]}.'
        ) from error


def _messages(turns: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": "assistant" if place % 2 else "user", "content": content} for place, content in enumerate(turns)]


def digest(documents: Sequence[Document]) -> str:
    """A short hash by which a card names the text it was learned from."""
    return hashlib.sha256(json.dumps(list(documents)).encode()).hexdigest()[:16]


def rows_of(model: LoadedModel, documents: Sequence[Document], *, num_tokens: int, row_tokens: int) -> list[list[int]]:
    """Token ids to read: documents in a fixed shuffled order, none longer than `row_tokens`, `num_tokens` in all.

    Prose that is longer gives several rows; of a longer conversation the beginning is read. Fewer tokens if the text
    ends before.
    """
    rng = random.Random(_SEED)
    rows: list[list[int]] = []
    # A book must not push the conversations out: its parts are shuffled among them.
    parts = [part for document in documents for part in _parts(document, 8 * row_tokens)]
    rng.shuffle(parts)
    missing = num_tokens
    for part in parts:
        if missing <= 0:
            break
        text = part if isinstance(part, str) else _rendered(model, part)
        tokens = model.encode(text)[: min(row_tokens, missing)]
        if tokens:
            rows.append(tokens)
            missing -= len(tokens)
    return rows


def _parts(document: Document, characters: int) -> Iterator[Document]:
    if isinstance(document, str):
        yield from (document[start : start + characters] for start in range(0, len(document), characters))
    else:
        yield document


def _rendered(model: LoadedModel, messages: list[dict[str, str]]) -> str:
    """The conversation with its last answer inside, as a cache has it when that answer ends."""
    if messages[-1]["role"] != "assistant":
        return model.render_chat(messages)
    return model.render_chat(messages[:-1]) + messages[-1]["content"]


@dataclass(frozen=True)
class Collected:
    """What a model kept for its rows. Shapes: keys (as attention sees them) and values of each layer, fp16
    `[HK, T, D]` on the host; positions int64 `[T]`.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    positions: torch.Tensor
    rotary: Rotary

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    def exact(self, side: str, layer: int, space: str) -> torch.Tensor:
        """One layer's keys (in `space`) or values. Shapes: fp16 `[HK, T, D]`."""
        if side == "values":
            return self.values[layer]
        keys = self.keys[layer]
        return self.rotary.unrotate(keys, self.positions) if space == "pre_rope" else keys

    def mean(self, side: str, layer: int) -> torch.Tensor:
        """The mean of each head, of keys before RoPE. Shapes: float32 `[HK, D]`."""
        return self.exact(side, layer, "pre_rope").float().mean(dim=1)

    def centred(self, side: str, layer: int, space: str, mean: torch.Tensor) -> torch.Tensor:
        """What is left of `exact` without `mean` `[HK, D]`, turned to each position where keys are."""
        means = mean.unsqueeze(1).expand(-1, self.num_tokens, -1)
        if side == "keys" and space == "post_rope":
            means = self.rotary.rotate(means, self.positions)
        return (self.exact(side, layer, space).float() - means).half()


@torch.inference_mode()
def collect(model: LoadedModel, rows: Sequence[Sequence[int]]) -> Iterator[float | Collected]:
    """Reads the rows one by one: the share done after each, and what was collected in the end."""
    rotary = Rotary.of(model.network)
    keys: list[list[torch.Tensor]] = [[] for _ in range(model.shape.num_layers)]
    values: list[list[torch.Tensor]] = [[] for _ in range(model.shape.num_layers)]
    for place, row in enumerate(rows):
        cache = DynamicCache()
        ids = torch.tensor([list(row)], device=model.device)
        model.network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, kept in enumerate(cache.layers):
            keys[layer].append(kept.keys[0].half().cpu())
            values[layer].append(kept.values[0].half().cpu())
        yield (place + 1) / len(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    sides = ([torch.cat(pieces, dim=1) for pieces in layers] for layers in (keys, values))
    yield Collected(*sides, positions, rotary)
