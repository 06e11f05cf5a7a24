"""One layer's cache as attention meets it, filled with random numbers: exact, packed (KIVI) and sparse (CSR).

Copies of a layer are rows of one larger batch, their pages shuffled in one pool, as the layers of a cache are. A step
is that of the newest of `tokens` tokens: it reads what was packed before it, and the rest exact.
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
    """A layer of a model; `shape` has that one layer. `tokens` counts the newest, whose step is taken."""

    model: str
    shape: ModelShape
    batch: int
    tokens: int

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
    """Exact keys and values. Shapes: query `[B, HQ, 1, D]`, keys and values `[B, HK, T, D]`."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def dense_layers(case: Case, copies: int, device: torch.device) -> list[DenseLayer]:
    shape, rows = case.shape, case.batch * copies
    query = _random(rows, shape.num_query_heads, 1, shape.head_dim, device=device, dtype=_query_dtype(device))
    past = [
        _random(rows, shape.num_kv_heads, case.tokens, shape.head_dim, device=device, dtype=query.dtype)
        for _ in range(2)
    ]
    return [DenseLayer(*layer) for layer in _each(copies, query, *past)]


def own_dense_step(case: Case, layer: DenseLayer) -> Step:
    """Our own kernel on exact tokens, which reads lengths on the device."""
    query, keys, values = layer.query.squeeze(2), layer.keys, layer.values
    length = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=query.device)
    options = {"scaling": case.scaling, "longest": case.tokens, "is_ragged": False}
    return partial(paths.native, query, keys, values, length, **options)


def kivi_steps(case: Case, config: KiviConfig, copies: int, device: torch.device) -> list[Step]:
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
    counts = (_packed_counts(case, config, side, copies, device) for side in range(2))
    rings = config.residual_length, config.residual_length + config.value_flush
    steps = []
    for query, exact, table_row, *num in _with_exact(case, config, rings, copies, device, table, *counts):
        past = PackedPast(layout, keys, values, table_row, *num)
        steps.append(partial(packed_attend, query, past, exact, scaling=case.scaling))
    return steps


def csr_steps(case: Case, config: CsrConfig, copies: int, device: torch.device) -> list[Step]:
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
    counts = _packed_counts(case, config, 0, copies, device)
    rings = (config.window + config.flush,) * 2
    steps = []
    for query, exact, table_row, num_tokens in _with_exact(case, config, rings, copies, device, table, counts):
        past = SparsePast(layout, *sides, table_row, num_tokens, turn)
        steps.append(partial(sparse_attend, query, past, exact, scaling=case.scaling))
    return steps


def _with_exact(
    case: Case, config: PagedConfig, rings: tuple[int, int], copies: int, device: torch.device, *others: torch.Tensor
) -> Iterator[tuple]:
    """For every copy a query, exact tokens around the packed ones, and its share of the other tensors."""
    shape, rows = case.shape, case.batch * copies
    query = _random(rows, shape.num_query_heads, shape.head_dim, device=device, dtype=_query_dtype(device))
    around = [
        _random(rows, shape.num_kv_heads, count, shape.head_dim, device=device, dtype=torch.float16)
        for count in (*rings, config.num_sinks, config.num_sinks)
    ]
    length = torch.full((rows,), case.tokens, dtype=torch.int32, device=device)
    for own_query, *own in _each(copies, query, *around, length, *others):
        yield own_query, ExactTokens(*own[:5]), *own[5:]


def _packed_counts(case: Case, config: PagedConfig, side: int, copies: int, device: torch.device) -> torch.Tensor:
    """Packed keys (side 0) or values of each row when the newest token comes."""
    count = config.num_packed(side, case.tokens - 1)
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


def _query_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32
