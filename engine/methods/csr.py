"""CSR: keys and values as a few atoms of a learned dictionary (arXiv 2412.11741), faithful and then better.

Source: the paper; its authors have published no code. Theirs, and the `paper` presets: keys before RoPE, whole;
values in two halves of half the atoms each; Matching Pursuit of exactly s iterations; an fp16 coefficient and
an int16 index an atom, so 32·s/D bits a value; dictionaries learned offline for every layer, with atoms of the
prompt (`sampled_atoms`, `guard_atoms`) as an option; every token coded at once, none kept exact; attention
over what the codes restore.

Open in the paper and decided here: coefficients are signed and an atom chosen twice counts twice; a token
attends to itself exactly and is coded afterwards; where half of s is no whole number it is rounded up.

Ours, and the `compact` presets (each is a setting): keys after RoPE, so that scores are read from one table of
q·D and nothing is restored; 16 bits an atom (10 of index, 6 of coefficient) and one fp16 scale a vector; one
least-squares fit after the pursuit; the first and the newest tokens exact; tokens coded in blocks.

With n tokens, floor(max(0, n - sinks - window) / flush) * flush of them are coded: a pure function of n.
Dictionaries that are learned offline are read by all conversations and count as the model's weights do: beside
the cache (`shared_bytes`). Atoms of the prompt belong to the conversation and count in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig, setting
from kvlens.engine.dictionaries.store import DictionaryKind
from kvlens.engine.errors import EngineError
from kvlens.engine.registry import register
from kvlens.engine.segments import Tile
from kvlens.engine.shape import ModelShape
from kvlens.engine.sparse_pages import PURSUITS, SparsePages, SparseRecipe
from kvlens.engine.storage import ExactWindow, PagePool, PageTable, Ring
from kvlens.kernels import dispatch
from kvlens.kernels.pursuit import MAX_SPARSITY
from kvlens.kernels.sparse_attend import ExactTokens, SparseLayout, SparsePast, SparseSide, sparse_attend

PAGE_TOKENS = 64

PACKED_ATOMS = 1024
"""The largest dictionary whose index fits the 10 bits that a packed atom has for it."""

SPACES = {"after RoPE": "post_rope", "before RoPE": "pre_rope"}


@dataclass(frozen=True)
class CsrConfig(MethodConfig):
    """Settings of CSR. The defaults are our compact mode."""

    bits: float = setting(
        2.0, label="Bits a value", unit="bits", choices=(0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        help="How many atoms a vector gets: as many as fit into so many bits for each of its values.",
    )  # fmt: skip
    num_atoms: int = setting(
        1024, label="Dictionary N", unit="atoms", choices=(256, 512, 1024, 2048, 4096),
        help="Atoms to choose from. A larger dictionary fits better and takes longer to search.",
    )  # fmt: skip
    keys: str = setting(
        "after RoPE", label="Keys coded", choices=tuple(SPACES),
        help="Before the position is turned into a key (the paper), or after it: scores then need no restoring.",
    )  # fmt: skip
    coefficient_bits: int = setting(
        6, label="Coefficient", unit="bits", choices=(6, 16),
        help="16: fp16 beside an int16 index, the paper. 6: atom and coefficient in one 16-bit word.",
    )  # fmt: skip
    value_parts: int = setting(
        1, label="Value parts", unit="parts", choices=(1, 2),
        help="2 cuts a value into halves that have atoms of their own: the paper.",
    )  # fmt: skip
    pursuit: str = setting(
        "MP + fit", label="Pursuit", choices=tuple(PURSUITS),
        help="How atoms are chosen: one after the other (MP, the paper), fitted once at the end, or after each (OMP).",
    )  # fmt: skip
    is_centred: bool = setting(
        True, label="Means apart",
        help="Most of a key before RoPE is the mean of its head. Taking it out saves atoms; the paper leaves it in.",
    )  # fmt: skip
    window: int = setting(
        64, label="Window", unit="tokens", minimum=0, maximum=1024, step=16,
        help="How many of the newest tokens stay exact. 0 is the paper.",
    )  # fmt: skip
    flush: int = setting(
        32, label="Flush", unit="tokens", choices=(1, 8, 16, 32, 64),
        help="How many tokens are coded at a time. 1 is the paper.",
    )  # fmt: skip
    num_sinks: int = setting(
        4, label="Sinks", unit="tokens", minimum=0, maximum=64, step=1,
        help="First tokens that stay exact for ever. 0 is the paper.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_packed and self.num_atoms > PACKED_ATOMS:
            raise ValueError(
                f"num_atoms must be at most {PACKED_ATOMS} with coefficients of 6 bits, so that an atom fits 16; "
                f"got {self.num_atoms}. Choose 16 bits a coefficient or fewer atoms."
            )

    @property
    def is_packed(self) -> bool:
        return self.coefficient_bits == 6

    @property
    def kind(self) -> DictionaryKind:
        """The dictionaries that these settings need."""
        return DictionaryKind(SPACES[self.keys], self.num_atoms, self.value_parts, self.is_centred)

    @property
    def is_after_rope(self) -> bool:
        return self.kind.space == "post_rope"

    def recipe(self, head_dim: int, parts: int) -> SparseRecipe:
        """How a vector of `head_dim` channels in `parts` parts is coded: at least one atom a part."""
        budget = self.bits * head_dim
        atoms = (budget - 16) // 16 if self.is_packed else budget // 32
        return SparseRecipe(max(1, ceil(atoms / parts)), parts, self.is_packed, self.pursuit)

    def num_coded(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens are coded; they follow the sinks."""
        return max(0, num_tokens - self.num_sinks - self.window) // self.flush * self.flush

    def check(self, shape: ModelShape) -> None:
        if shape.head_dim % self.value_parts != 0:
            raise ValueError(f"value_parts must divide the head of {shape.head_dim} channels; got {self.value_parts}")
        most = self.recipe(shape.head_dim, 1).atoms
        if most > MAX_SPARSITY:
            raise ValueError(
                f"bits must leave at most {MAX_SPARSITY} atoms a vector; {self.bits:g} bits of a head of "
                f"{shape.head_dim} channels are {most}. Choose fewer bits."
            )

    def estimate(self, shape: ModelShape, num_tokens: int) -> dict[str, int]:
        heads, dim = shape.num_layers * shape.num_kv_heads, shape.head_dim
        coded, sinks = self.num_coded(num_tokens), min(self.num_sinks, num_tokens)
        sides = self.recipe(dim, 1), self.recipe(dim, self.value_parts)
        words, coefficients = ("codes", "scales") if self.is_packed else ("indices", "coefficients")
        return {
            words: heads * coded * sum(side.word_bytes for side in sides),
            coefficients: heads * coded * sum(side.coefficient_bytes for side in sides),
            "window": heads * dim * (num_tokens - sinks - coded) * 2 * 2,
            "sinks": heads * dim * sinks * 2 * 2,
            "tables": shape.num_layers * (ceil(coded / PAGE_TOKENS) + 3) * 4,
        }

    def describe(self) -> str:
        kept = f" · window {self.window}" if self.window else ""
        return f"{self.bits:g} bit · N {self.num_atoms} · {self.pursuit} · keys {self.keys}{kept}"


def _paper(bits: float) -> CsrConfig:
    return CsrConfig(
        bits=bits, num_atoms=4096, keys="before RoPE", coefficient_bits=16, value_parts=2, pursuit="MP",
        is_centred=False, window=0, flush=1, num_sinks=0,
    )  # fmt: skip


@register(
    "csr",
    title="CSR",
    summary="Keys and values as a few atoms of a dictionary learned from the model's own.",
    source="Zhang et al., CSR, AAAI 2025, arXiv 2412.11741",
    config=CsrConfig,
    presets={
        "CSR compact, 2 bit": CsrConfig(),
        "CSR compact, 1 bit": CsrConfig(bits=1.0),
        "CSR compact, 4 bit": CsrConfig(bits=4.0),
        "CSR-4, 1 bit (paper)": _paper(1.0),
        "CSR-6, 1.5 bit (paper)": _paper(1.5),
        "CSR-8, 2 bit (paper)": _paper(2.0),
        "CSR-16, 4 bit (paper)": _paper(4.0),
    },
)
class CsrCache(KVCache):
    """Pages of sparse codes behind an exact window. Shapes of a page: see `SparsePages`."""

    config: CsrConfig

    def __init__(self, shape: ModelShape, config: CsrConfig, **options: Any) -> None:
        super().__init__(shape, config, **options)
        if self.facts is None:
            raise EngineError("CSR needs a model's dictionaries; make its cache with LoadedModel.new_cache")
        self._dictionaries = self.facts.dictionary(config.kind)
        self._keys, self._values = (
            SparsePages(
                side, config.recipe(shape.head_dim, parts), num_heads=shape.num_kv_heads, page_tokens=PAGE_TOKENS
            )
            for side, parts in (("key", 1), ("value", config.value_parts))
        )
        pool = PagePool(self._keys.layout | self._values.layout, allocate=self.allocate, discard=self.discard)
        self._table = PageTable(shape.num_layers, self.num_rows, pool, allocate=self.allocate, discard=self.discard)
        self._layers: list[ExactWindow] = []
        self._layout = SparseLayout(
            PAGE_TOKENS, self._keys.recipe.atoms, self._values.recipe.atoms, config.value_parts, config.coefficient_bits
        )

    # ------------------------------------------------------------------ storing

    def reserve(self, num_tokens: int) -> None:
        if not self._layers:
            capacity = self.config.window + self.config.flush
            self._layers = [
                ExactWindow(
                    self.num_rows,
                    self.shape.num_kv_heads,
                    self.shape.head_dim,
                    key_capacity=capacity,
                    value_capacity=capacity,
                    num_sinks=self.config.num_sinks,
                    dtype=self.dtype,
                    allocate=self.allocate,
                )
                for _ in range(self.shape.num_layers)
            ]
        self._table.reserve(ceil(self.config.num_coded(num_tokens) / PAGE_TOKENS))

    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = self.lengths[layer][row]
        after = before + keys.shape[1]
        state = self._layers[layer]
        state.write_sinks(row, before, keys, values)
        coded, due = self.config.num_coded(before), self.config.num_coded(after)
        keys = self._with_window(state.keys, row, coded, before, keys)
        values = self._with_window(state.values, row, coded, before, values)
        if due > coded:
            self._code(layer, row, coded, keys[:, : due - coded], values[:, : due - coded])
            keys, values = keys[:, due - coded :], values[:, due - coded :]
        state.keys.write(row, after - keys.shape[1], keys)
        state.values.write(row, after - values.shape[1], values)
        state.set_lengths(row, after, due, due)

    def step(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        state, lengths = self._layers[layer], self.lengths[layer]
        if not self._reads_codes or min(lengths) < self.config.num_sinks:
            return super().step(layer, query, keys, values, scaling=scaling)
        for row, length in enumerate(lengths):
            state.keys.tensor[row, :, length % state.keys.capacity] = keys[row]
            state.values.tensor[row, :, length % state.values.capacity] = values[row]
        state.length.add_(1)
        exact = ExactTokens(state.keys.tensor, state.values.tensor, state.sink_keys, state.sink_values, state.length)
        output = sparse_attend(query, self._past(layer), exact, scaling=scaling).output
        for row, length in enumerate(lengths):
            self._flush(layer, row, length, length + 1)
            lengths[row] = length + 1
        return output

    def _past(self, layer: int) -> SparsePast:
        pool, state = self._table.pool, self._layers[layer]
        keys, values = (
            SparseSide(pages.words(pool), pages.coefficients(pool), atoms[layer])
            for pages, atoms in ((self._keys, self._dictionaries.keys), (self._values, self._dictionaries.values))
        )
        return SparsePast(self._layout, keys, values, self._table.tensor[layer], state.num_keys)

    def _flush(self, layer: int, row: int, before: int, after: int) -> None:
        """Code what the step from `before` to `after` tokens has pushed out of the exact window."""
        coded, due = self.config.num_coded(before), self.config.num_coded(after)
        if due > coded:
            state, first = self._layers[layer], self.config.num_sinks
            at = (row, first + coded, first + due)
            self._code(layer, row, coded, state.keys.read(*at), state.values.read(*at))
            state.num_keys[row] = state.num_values[row] = due

    def _with_window(self, ring: Ring, row: int, coded: int, before: int, fresh: torch.Tensor) -> torch.Tensor:
        """Every exact token that is not a sink: the window, then the fresh ones. Shapes: `[HK, T, D]`."""
        first = self.config.num_sinks + coded
        if before <= first:
            return fresh[:, first - before :]
        return torch.cat([ring.read(row, first, before).to(fresh.dtype), fresh], dim=1)

    def _code(self, layer: int, row: int, coded: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Code exact tokens behind the `coded` ones. Shapes: keys, values `[HK, t, D]`."""
        first = self.config.num_sinks + coded
        keys, values = keys.to(self.dtype), values.to(self.dtype)
        pages = self._table.of(layer, row)
        missing = ceil((coded + keys.shape[1]) / PAGE_TOKENS) - len(pages)
        if missing:
            self._table.add(layer, row, missing)
        for side, pages_of, vectors, atoms in (
            (0, self._keys, self._without_mean(layer, 0, keys, first), self._dictionaries.keys[layer]),
            (1, self._values, self._without_mean(layer, 1, values, first), self._dictionaries.values[layer]),
        ):
            codes = pages_of.recipe.encode(vectors, atoms, self.facts.gram(atoms))
            pages_of.write(self._table.pool, pages, coded, codes)
            if self.probe is not None and row == 0:
                self.probe.stage(layer, side, first, (keys, values)[side])

    # ------------------------------------------------------------------ reading

    def rebuild(self, layer: int, row: int, start: int, stop: int) -> Tile:
        state = self._layers[layer]
        keys, values = self._restored(layer, row, start, stop)
        return Tile(
            self._complete(state.sink_keys[row], state.keys, layer, row, keys, start, stop),
            self._complete(state.sink_values[row], state.values, layer, row, values, start, stop),
        )

    def _restored(self, layer: int, row: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The coded ones among the tokens start..stop-1, in fp32. Shapes: `[HK, t, D]` each."""
        sinks, coded = self.config.num_sinks, self.config.num_coded(self.lengths[layer][row])
        first, last = (min(max(edge - sinks, 0), coded) for edge in (start, stop))
        pool, pages = self._table.pool, self._table.of(layer, row)
        keys = self._keys.recipe.restore(self._keys.read(pool, pages, first, last), self._dictionaries.keys[layer])
        values = self._values.recipe.restore(
            self._values.read(pool, pages, first, last), self._dictionaries.values[layer]
        )
        return self._with_mean(layer, 0, keys, sinks + first), self._with_mean(layer, 1, values, sinks + first)

    def _complete(
        self, sinks: torch.Tensor, ring: Ring, layer: int, row: int, coded: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """The sinks and the exact tokens around the coded ones among start..stop-1, in fp32."""
        num_sinks = self.config.num_sinks
        first_exact = max(start, num_sinks + self.config.num_coded(self.lengths[layer][row]))
        pieces = [sinks[:, start : min(stop, num_sinks)].float(), coded]
        if first_exact < stop:
            pieces.append(ring.read(row, first_exact, stop).float())
        return torch.cat(pieces, dim=1)

    def _without_mean(self, layer: int, side: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """What is coded of keys (side 0) or values, the first of them token `first`. Shapes: `[HK, t, D]`."""
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        tokens, mean = tokens.float(), self._mean(layer, side)
        if side == 0 and not self.config.is_after_rope:
            tokens = self.facts.rotary.unrotate(tokens, places)
        elif side == 0 and mean is not None:
            mean = self.facts.rotary.rotate(mean.expand(-1, len(places), -1), places)
        return tokens if mean is None else tokens - mean

    def _with_mean(self, layer: int, side: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """What attention sees of restored keys or values: the way back from `_without_mean`."""
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        mean = self._mean(layer, side)
        if side == 0 and self.config.is_after_rope and mean is not None:
            mean = self.facts.rotary.rotate(mean.expand(-1, len(places), -1), places)
        tokens = tokens if mean is None else tokens + mean
        return tokens if side == 1 or self.config.is_after_rope else self.facts.rotary.rotate(tokens, places)

    def _mean(self, layer: int, side: int) -> torch.Tensor | None:
        """A head's mean, of keys before RoPE. Shapes: `[HK, 1, D]`."""
        means = (self._dictionaries.key_means, self._dictionaries.value_means)[side]
        return None if means is None else means[layer].unsqueeze(1)

    @property
    def _reads_codes(self) -> bool:
        """Whether attention reads codes as they are, not what they restore."""
        return self.config.is_after_rope and not self.config.is_centred

    @property
    def attention_path(self) -> str:
        if self._reads_codes:
            return f"{dispatch.describe('sparse_attend', self.device)} on sparse codes"
        return "restored tile by tile, as in the paper"

    # ------------------------------------------------------------------ bytes

    @property
    def shared_bytes(self) -> int:
        return self._dictionaries.num_bytes

    def parts(self) -> dict[str, int]:
        words, coefficients = ("codes", "scales") if self.config.is_packed else ("indices", "coefficients")
        live = dict.fromkeys((words, coefficients, "window", "sinks", "tables"), 0)
        if not self._layers:
            return live
        pool, exact_token = self._table.pool, self._layers[0].keys.tensor[0, :, 0].nbytes
        for layer, rows in enumerate(self.lengths):
            for row, length in enumerate(rows):
                coded, sinks = self.config.num_coded(length), min(self.config.num_sinks, length)
                for pages in (self._keys, self._values) if coded else ():
                    live[words] += pages.words(pool)[0].nbytes * coded // PAGE_TOKENS
                    live[coefficients] += pages.coefficients(pool)[0].nbytes * coded // PAGE_TOKENS
                live["window"] += 2 * (length - sinks - coded) * exact_token
                live["sinks"] += 2 * sinks * exact_token
                live["tables"] += (len(self._table.of(layer, row)) + 3) * 4
        return live

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self._table.pool.tensors.values(), self._table.tensor)
        for state in self._layers:
            yield from state.tensors()

    # ------------------------------------------------------------------ going back, and the end

    def save(self) -> Any:
        return [
            [
                tuple(
                    ring.read(row, self.config.num_sinks + self.config.num_coded(length), length).clone()
                    for ring in (state.keys, state.values)
                )
                if length > self.config.num_sinks
                else None
                for row, length in enumerate(self.lengths[layer])
            ]
            for layer, state in enumerate(self._layers)
        ]

    def restore(self, saved: Any, lengths: list[int]) -> None:
        for layer, rows in enumerate(saved):
            state = self._layers[layer]
            for row, window in enumerate(rows):
                length = lengths[row]
                coded = self.config.num_coded(length)
                self._table.cut(layer, row, ceil(coded / PAGE_TOKENS))
                if window is not None:
                    for ring, tokens in zip((state.keys, state.values), window, strict=True):
                        ring.write(row, length - tokens.shape[1], tokens)
                state.set_lengths(row, length, coded, coded)

    def release(self) -> None:
        self._table.release()
        self._layers = []
