"""CSR: keys and values as a few atoms of a learned dictionary (arXiv 2412.11741), faithful and then better.

Source: the paper; its authors have published no code. Theirs, and the `paper` presets: keys before RoPE, whole;
values in two halves of half the atoms each; Matching Pursuit of exactly s iterations; an fp16 coefficient and
an int16 index an atom, so 32·s/D bits a value; dictionaries learned offline for every layer, with atoms of the
prompt (`sampled_atoms`, `guard_atoms`) as an option; every token coded at once, none kept exact; attention
over what the codes restore.

Open in the paper and decided here: coefficients are signed and an atom chosen twice counts twice; a token
attends to itself exactly and is coded afterwards; where half of s is no whole number it is rounded up.

Ours, and the `compact` presets (each is a setting): 16 bits an atom (10 of index, 6 of coefficient) and one fp16
scale a vector, so twice the atoms; one least-squares fit after the pursuit; each head's mean apart; values whole; the
first and the newest tokens exact; tokens coded in blocks. The `look-up` preset codes keys after RoPE: scores
are then read from one table of q·D and no key is restored, for a larger error. All measured in docs/csr.md.

With n tokens, floor(max(0, n - sinks - window) / flush) * flush of them are coded: a pure function of n.
Dictionaries that are learned offline are read by all conversations and count as the model's weights do: beside
the cache (`shared_bytes`). Atoms of the prompt belong to the conversation and count in it.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import ceil
from typing import Any

import torch

from kvlens.engine.atoms import CodedVectors
from kvlens.engine.config import setting
from kvlens.engine.dictionaries.store import DictionaryKind
from kvlens.engine.errors import EngineError
from kvlens.engine.paged_cache import PagedCache, PagedConfig
from kvlens.engine.prompt_atoms import PromptAtoms
from kvlens.engine.registry import register
from kvlens.engine.shape import ModelShape
from kvlens.engine.sparse_coder import PURSUITS, SparseCoder, SparseRecipe
from kvlens.engine.sparse_pages import SparsePages
from kvlens.kernels import dispatch
from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.pursuit import MAX_SPARSITY
from kvlens.kernels.sparse_attend import KeyTurn, SparseLayout, SparsePast, SparseSide, sparse_attend
from kvlens.kernels.sparse_attend.tasks import CHANNELS, step_tasks

PAGE_TOKENS = 64

PACKED_ATOMS = 1024
"""The largest dictionary whose index fits the 10 bits that a packed atom has for it."""

SPACES = {"before RoPE": "pre_rope", "after RoPE": "post_rope"}


@dataclass(frozen=True)
class CsrConfig(PagedConfig):
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
        "before RoPE", label="Keys coded", choices=tuple(SPACES),
        help="Before the position is turned into a key: half the error. After it: scores are looked up, not restored.",
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
    sampled_atoms: int = setting(
        0, label="Atoms of the prompt", unit="atoms", choices=(0, 128, 256, 1024, 4096),
        help="Newest vectors of the prompt that become atoms too. They belong to the conversation and cost its bytes.",
    )  # fmt: skip
    guard_atoms: int = setting(
        0, label="Guard", unit="atoms", choices=(0, 128, 256, 1024, 4096),
        help="Vectors of the prompt that the learned atoms fit worst, as atoms of the conversation.",
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
        if self.is_packed and self.num_atoms + self.prompt_atoms > PACKED_ATOMS:
            raise ValueError(
                f"num_atoms, with atoms of the prompt, must be at most {PACKED_ATOMS} where coefficients have 6 bits, "
                f"so that an atom fits 16; got {self.num_atoms + self.prompt_atoms}. Choose 16 bits or fewer atoms."
            )

    @property
    def is_packed(self) -> bool:
        return self.coefficient_bits == 6

    @property
    def prompt_atoms(self) -> int:
        return self.sampled_atoms + self.guard_atoms

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

    @cached_property
    def flush_rule(self) -> FlushRule:
        window = self.window, self.flush
        return FlushRule(self.num_sinks, *window, *window)

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
        coded, sinks = self.num_packed(0, num_tokens), min(self.num_sinks, num_tokens)
        sides = self.recipe(dim, 1), self.recipe(dim, self.value_parts)
        words, coefficients = ("codes", "scales") if self.is_packed else ("indices", "coefficients")
        return {
            words: heads * coded * sum(side.word_bytes for side in sides),
            coefficients: heads * coded * sum(side.coefficient_bytes for side in sides),
            "window": heads * dim * (num_tokens - sinks - coded) * 2 * 2,
            "sinks": heads * dim * sinks * 2 * 2,
            "dictionary": shape.num_layers * self.prompt_atoms * (dim + dim // self.value_parts) * 2 * bool(num_tokens),
            "tables": shape.num_layers * (ceil(coded / PAGE_TOKENS) + 3) * 4,
        }

    def describe(self) -> str:
        kept = f" · window {self.window}" if self.window else ""
        return f"{self.bits:g} bit · N {self.num_atoms} · {self.pursuit} · keys {self.keys}{kept}"


def _paper(bits: float, **extra: int) -> CsrConfig:
    return CsrConfig(
        bits=bits, num_atoms=4096, keys="before RoPE", coefficient_bits=16, value_parts=2, pursuit="MP",
        is_centred=False, window=0, flush=1, num_sinks=0, **extra,
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
        "CSR look-up, 2 bit": CsrConfig(keys="after RoPE", is_centred=False),
        "CSR-4, 1 bit (paper)": _paper(1.0),
        "CSR-6, 1.5 bit (paper)": _paper(1.5),
        "CSR-8, 2 bit (paper)": _paper(2.0),
        "CSR-16, 4 bit (paper)": _paper(4.0),
        "CSR-8 with atoms of the prompt (paper)": _paper(2.0, sampled_atoms=256, guard_atoms=256),
    },
)
class CsrCache(PagedCache):
    """Pages of sparse codes behind an exact window. Shapes of a page: see `SparsePages`."""

    config: CsrConfig

    def __init__(self, shape: ModelShape, config: CsrConfig, **options: Any) -> None:
        super().__init__(shape, config, **options)
        if self.facts is None:
            raise EngineError(
                "CSR needs dictionaries that were learned from a model (LoadedModel.new_cache brings them), or the "
                "random ones of StandInFacts; a shape alone has none"
            )
        self._dictionaries = self.facts.dictionary(config.kind)
        self._coders = self._key_coder(), self._value_coder()
        self._keys, self._values = self._pages = tuple(
            SparsePages(side, coder.recipe, num_heads=shape.num_kv_heads, page_tokens=PAGE_TOKENS)
            for side, coder in zip(("key", "value"), self._coders, strict=True)
        )
        capacity = config.window + config.flush
        self._lay_out(
            self._keys.layout | self._values.layout,
            page_tokens=PAGE_TOKENS,
            key_capacity=capacity,
            value_capacity=capacity,
        )
        self._layout = SparseLayout(
            PAGE_TOKENS, self._keys.recipe.atoms, self._values.recipe.atoms, config.value_parts, config.coefficient_bits
        )

    def _key_coder(self) -> SparseCoder:
        config, found = self.config, self._dictionaries
        rotary = self.facts.rotary if config.is_centred or not config.is_after_rope else None
        turns = {"turned_means": rotary} if config.is_after_rope else {"unturned": rotary}
        return SparseCoder(config.recipe(self.shape.head_dim, 1), found.keys, found.key_means, **turns)

    def _value_coder(self) -> SparseCoder:
        config, found = self.config, self._dictionaries
        return SparseCoder(config.recipe(self.shape.head_dim, config.value_parts), found.values, found.value_means)

    # ------------------------------------------------------------------ storing

    def reserve(self, num_tokens: int) -> None:
        super().reserve(num_tokens)
        for coder in self._coders:
            if self.config.prompt_atoms and coder.prompt is None:
                coder.prompt = PromptAtoms(
                    self.shape.num_layers,
                    self.max_rows,
                    coder.learned[0].shape[1],
                    num_sampled=self.config.sampled_atoms,
                    num_guarded=self.config.guard_atoms,
                    allocate=self.allocate,
                )

    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.lengths[layer][row] == 0:
            for coder, tokens in zip(self._coders, (keys, values), strict=True):
                coder.learn_prompt(layer, row, tokens)
        super().store(layer, row, keys, values)

    def _pack(self, layer: int, row: int, side: int, packed: int, tokens: torch.Tensor) -> None:
        codes = self._coders[side].encode(layer, row, tokens, self.config.num_sinks + packed)
        self._pages[side].write(self._table.pool, self._table.of(layer, row), packed, codes)

    def _attend_pages(self, layer: int, query: torch.Tensor, *, scaling: float) -> torch.Tensor:
        return sparse_attend(query, self._past(layer), self._exact(layer), scaling=scaling).output

    def step_key(self) -> Hashable | None:
        is_whole = self.shape.head_dim // self.config.value_parts % CHANNELS == 0
        is_prepared = self._reads_pages(0) and (is_whole or self.steps_on_device)
        return (self._memory.num_allocations, self.num_rows) if is_prepared else None

    def step_tasks(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, *,
        scaling: float,
    ) -> list[Any]:  # fmt: skip
        return step_tasks(query, keys, values, output, self._past(layer), self._exact(layer), scaling=scaling)

    def end_tasks(self) -> None:
        """What has left the window is coded here, once a flush is full."""
        super().end_tasks()
        for layer, lengths in enumerate(self.lengths):
            for row, after in enumerate(lengths):
                self._flush(layer, row, after)

    def _past(self, layer: int) -> SparsePast:
        pool = self._table.pool
        keys, values = (
            SparseSide(
                pages.words(pool),
                pages.coefficients(pool),
                coder.learned[layer],
                None if coder.means is None else coder.means[layer],
            )
            for pages, coder in zip(self._pages, self._coders, strict=True)
        )
        page_table, num_coded, _ = self._packed_rows(layer)
        return SparsePast(self._layout, keys, values, page_table, num_coded, self._turn)

    # ------------------------------------------------------------------ reading

    def _unpack(self, layer: int, row: int, side: int, first: int, stop: int) -> torch.Tensor:
        codes = self._pages[side].read(self._table.pool, self._table.of(layer, row), first, stop)
        return self._coders[side].restore(layer, row, codes, self.config.num_sinks + first)

    def coded_vectors(self, layer: int, side: int, row: int = 0) -> CodedVectors:
        first, coder = self.config.num_sinks, self._coders[side]
        coded = self.config.num_packed(side, self.lengths[layer][row])
        codes = self._pages[side].read(self._table.pool, self._table.of(layer, row), 0, coded)
        exact_to_coded = partial(coder.coded, layer, first=first)
        return CodedVectors(first, codes, coder.recipe.parts, coder.atoms(layer, row), exact_to_coded)

    @cached_property
    def _turn(self) -> KeyTurn | None:
        """What attention turns keys by that are coded before RoPE."""
        turn = None if self.config.is_after_rope else self.facts.rotary.turn
        return turn and KeyTurn(turn.inverse_frequencies.to(self.device), turn.scale)

    def _reads_pages(self, layer: int) -> bool:
        return self._reads_codes and super()._reads_pages(layer)

    @property
    def _reads_codes(self) -> bool:
        """Whether attention reads codes as they are, not what they restore."""
        is_plain = self.config.is_after_rope and not self.config.is_centred
        return (is_plain or self._turn is not None) and not self.config.prompt_atoms

    @property
    def attention_path(self) -> str:
        if self._reads_codes:
            return f"{dispatch.describe('sparse_attend', self.device)} on sparse codes"
        return "restored tile by tile"

    def _rows_that_fit(self, max_tokens: int, limit_bytes: int) -> int:
        if self.config.prompt_atoms:
            raise EngineError(
                "sequences that join and leave share one dictionary; atoms of the prompt belong to a single "
                "conversation. Choose a preset without them"
            )
        return super()._rows_that_fit(max_tokens, limit_bytes)

    # ------------------------------------------------------------------ bytes

    @property
    def shared_bytes(self) -> int:
        return self._dictionaries.num_bytes

    def parts(self) -> dict[str, int]:
        words, coefficients = ("codes", "scales") if self.config.is_packed else ("indices", "coefficients")
        live = dict.fromkeys((words, coefficients, "window", "sinks", "dictionary", "tables"), 0)
        if not self._layers:
            return live
        self._count_exact(live)
        pool = self._table.pool
        for length in (length for rows in self.lengths for length in rows):
            coded = self.config.num_packed(0, length)
            for pages in self._pages if coded else ():
                live[words] += pages.words(pool)[0].nbytes * coded // PAGE_TOKENS
                live[coefficients] += pages.coefficients(pool)[0].nbytes * coded // PAGE_TOKENS
            live["dictionary"] += sum(prompt.row_bytes for prompt in self._prompts()) * bool(length)
        return live

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from super().tensors()
        for prompt in self._prompts():
            yield from prompt.tensors()

    def release(self) -> None:
        super().release()
        for coder in self._coders:
            coder.prompt = None

    def _prompts(self) -> list[PromptAtoms]:
        return [coder.prompt for coder in self._coders if coder.prompt is not None]
