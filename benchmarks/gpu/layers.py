"""One layer's cache as attention meets it, filled with random numbers: exact, packed (KIVI) and sparse (CSR).

Copies of a layer are rows of one larger batch, their pages shuffled in one pool, as the layers of a cache are. A step
is that of the newest of `tokens` tokens: it reads what was packed before it, and the rest exact. `benchmarks.gpu`
and `benchmarks.tune` run kernels on such layers, `benchmarks.instructions` compiles them for such.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.timing import Step
from kvlens.engine.config import MethodConfig
from kvlens.engine.facts import StandInFacts
from kvlens.engine.methods.csr import PAGE_TOKENS, CsrConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.paged_cache import PagedConfig
from kvlens.engine.shape import ModelShape
from kvlens.kernels.dense_attend import paths
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, packed_attend
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.sparse_attend import KeyTurn, SparseLayout, SparsePast, SparseSide, sparse_attend


@dataclass(frozen=True)
class Case:
    """A layer of a model; `shape` has that one layer. `tokens` counts the newest, whose step is taken.

    `dtype` is that of the query and of exact tokens.
    """

    model: str
    shape: ModelShape
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float16

    @property
    def dense_bytes(self) -> int:
        return self.batch * self.shape.fp16_bytes(self.tokens)

    @property
    def scaling(self) -> float:
        return self.shape.head_dim**-0.5

    def stored_bytes(self, config: MethodConfig) -> int:
        """Bytes that a step must read: what is stored before it by the method's formula, the newest token, atoms."""
        stored = sum(config.estimate(self.shape, self.tokens - 1).values()) + self.shape.fp16_bytes(1)
        atoms = 2 * config.num_atoms * self.shape.head_dim * 4 if isinstance(config, CsrConfig) else 0
        return self.batch * stored + atoms


@dataclass(frozen=True)
class DenseLayer:
    """Exact tokens. Shapes: query `[B, HQ, 1, D]`, keys and values `[B, HK, T, D]`, length int32 `[B]`: T."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What our own kernel takes, which reads lengths on the device."""
        return self.query.squeeze(2), self.keys, self.values, self.length


PackedLayer = tuple[torch.Tensor, PackedPast, ExactTokens]
"""What `packed_attend` takes: query, packed tokens, exact tokens."""

SparseLayer = tuple[torch.Tensor, SparsePast, ExactTokens]
"""What `sparse_attend` takes."""


def dense_layers(case: Case, copies: int, device: torch.device) -> list[DenseLayer]:
    shape, rows = case.shape, case.batch * copies
    query = _random(rows, shape.num_query_heads, 1, shape.head_dim, device=device, dtype=case.dtype)
    past = [
        _random(rows, shape.num_kv_heads, case.tokens, shape.head_dim, device=device, dtype=case.dtype)
        for _ in range(2)
    ]
    return [DenseLayer(*layer) for layer in _each(copies, query, *past, _counts(case, case.tokens, copies, device))]


def own_dense_step(case: Case, layer: DenseLayer) -> Step:
    """Our own kernel on exact tokens."""
    return partial(paths.native, *layer.inputs, scaling=case.scaling, longest=case.tokens, is_ragged=False)


def kivi_steps(case: Case, config: KiviConfig, copies: int, device: torch.device) -> list[Step]:
    layers = kivi_layers(case, config, copies, device)
    return [partial(packed_attend, *layer, scaling=case.scaling) for layer in layers]


def csr_steps(case: Case, config: CsrConfig, copies: int, device: torch.device) -> list[Step]:
    layers = csr_layers(case, config, copies, device)
    return [partial(sparse_attend, *layer, scaling=case.scaling) for layer in layers]


def kivi_layers(case: Case, config: KiviConfig, copies: int, device: torch.device) -> list[PackedLayer]:
    shape, layout = case.shape, config.layout(case.shape.head_dim)
    heads, dim, page = shape.num_kv_heads, shape.head_dim, layout.page_tokens
    table = _table(case, config, page, copies, device)

    def pages(rows: int, row: int, bits: int, group_size: int) -> Packed:
        groups = (table.numel(), heads, rows, row // group_size)
        return Packed(
            _words(table.numel(), heads, rows, row * bits // 16, device=device),
            torch.full(groups, 1 / 2**bits, dtype=torch.float16, device=device),
            torch.full(groups, -0.5, dtype=torch.float16, device=device),
        )

    keys = pages(dim, page, layout.key_bits, layout.key_group_size)
    values = pages(page, dim, layout.value_bits, layout.value_group_size)
    counts = (_counts(case, config.num_packed(side, case.tokens - 1), copies, device) for side in range(2))
    rings = config.residual_length, config.residual_length + config.value_flush
    return [
        (query, PackedPast(layout, keys, values, table_row, *num), exact)
        for query, exact, table_row, *num in _with_exact(case, config, rings, copies, device, table, *counts)
    ]


def csr_layers(case: Case, config: CsrConfig, copies: int, device: torch.device) -> list[SparseLayer]:
    """Random codes over random atoms; every atom is as likely as any other, which is the worst for caches."""
    shape, facts = case.shape, StandInFacts(case.shape, device=device)
    found = facts.dictionary(config.kind)
    table = _table(case, config, PAGE_TOKENS, copies, device)
    recipes = [config.recipe(shape.head_dim, parts) for parts in (1, config.value_parts)]
    layout = SparseLayout(PAGE_TOKENS, recipes[0].atoms, recipes[1].atoms, config.value_parts, config.coefficient_bits)
    sides = []
    for recipe, atoms, means in zip(
        recipes, (found.keys, found.values), (found.key_means, found.value_means), strict=True
    ):
        size = (table.numel(), shape.num_kv_heads, recipe.slots, PAGE_TOKENS)
        words = _words(*size, device=device)
        if not config.is_packed:
            words %= config.num_atoms
        weights = (size[0], size[1], size[3]) if config.is_packed else size
        scales = torch.full(weights, 0.1, dtype=torch.float16, device=device)
        sides.append(SparseSide(words, scales, atoms[0], None if means is None else means[0]))
    turn = None if config.is_after_rope else facts.rotary.turn
    turn = turn and KeyTurn(turn.inverse_frequencies.to(device), turn.scale)
    counts = _counts(case, config.num_packed(0, case.tokens - 1), copies, device)
    rings = (config.window + config.flush,) * 2
    return [
        (query, SparsePast(layout, *sides, table_row, num_tokens, turn), exact)
        for query, exact, table_row, num_tokens in _with_exact(case, config, rings, copies, device, table, counts)
    ]


def _with_exact(
    case: Case, config: PagedConfig, rings: tuple[int, int], copies: int, device: torch.device, *others: torch.Tensor
) -> Iterator[tuple]:
    """For every copy a query, exact tokens around the packed ones, and its share of the other tensors."""
    shape, rows = case.shape, case.batch * copies
    query = _random(rows, shape.num_query_heads, shape.head_dim, device=device, dtype=case.dtype)
    around = [
        _random(rows, shape.num_kv_heads, count, shape.head_dim, device=device, dtype=case.dtype)
        for count in (*rings, config.num_sinks, config.num_sinks)
    ]
    length = _counts(case, case.tokens, copies, device)
    for own_query, *own in _each(copies, query, *around, length, *others):
        yield own_query, ExactTokens(*own[:5]), *own[5:]


def _counts(case: Case, count: int, copies: int, device: torch.device) -> torch.Tensor:
    """The same count of tokens for each row."""
    return torch.full((case.batch * copies,), count, dtype=torch.int32, device=device)


def _table(case: Case, config: PagedConfig, page_tokens: int, copies: int, device: torch.device) -> torch.Tensor:
    """Shuffled pages for everything packed. Shapes: int32 `[B * copies, pages a row]`."""
    rows = case.batch * copies
    most = max(config.num_packed(side, case.tokens - 1) for side in range(2))
    pages = torch.randperm(rows * -(-most // page_tokens), device=device)
    return pages.to(torch.int32).view(rows, -1)


def _each(copies: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Each copy's rows of every tensor."""
    return zip(*(tensor.chunk(copies) for tensor in tensors), strict=True)


def _words(*size: int, device: torch.device) -> torch.Tensor:
    """Random 16-bit words: any of them is a code."""
    return torch.randint(-(2**15), 2**15, size, dtype=torch.int16, device=device)


def _random(*size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, device=device, dtype=dtype)
