"""One decode step of attention on the CPU: compressed caches against the best dense attention torch has.

    python -m benchmarks.packed_attend_cpu [--tokens 512 4096 16384] [--shapes mha gqa embedded] [--rounds 7]

Each method walks through as many layers as fill `--megabytes` of its own cache, so that no cache level
keeps what the next round reads; in a round every method has its turn. Given are the median over all layers
and rounds, and the tenth percentile, which a busy machine disturbs less. Before it is timed, a compressed
method must agree with its reference. The kernels' own entry is timed; the checks and the dispatch of the public
function add about 13 us a call. CSR reads a pair of fp32 dictionaries in every layer, which count in its size.
Prints a table and writes `benchmarks/results/packed_attend_cpu.csv` with the conditions in every row.

What "dense" means: `sdpa` is torch's scaled_dot_product_attention (grouped heads by enable_gqa), `matmul`
two matrix products and a softmax with the query viewed as [HK, G, D], `bmm` the same flattened, and
`repeat_kv` what a DynamicCache model does: expand the heads, then sdpa.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numba
import torch
import torch.nn.functional as F

from kvlens.kernels.native import jit
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout
from kvlens.kernels.packed_attend import reference as packed_reference
from kvlens.kernels.packed_attend.cpu import packed_attend
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.sparse_attend import KeyTurn, SparseLayout, SparsePast, SparseSide
from kvlens.kernels.sparse_attend import reference as sparse_reference
from kvlens.kernels.sparse_attend.cpu import sparse_attend

RESULTS = Path(__file__).parent / "results" / "packed_attend_cpu.csv"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAGE_TOKENS = 128


@dataclass(frozen=True)
class Shape:
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {"mha": Shape(32, 32, 128), "gqa": Shape(32, 8, 128), "embedded": Shape(4, 2, 64)}


@dataclass(frozen=True)
class Kivi:
    bits: int
    group_size: int = 32
    residual_tokens: int = 128

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits} R={self.residual_tokens}"


@dataclass(frozen=True)
class Csr:
    """`atoms` a key and, over all its parts, a value; coefficients of 6 bits in the word, or fp16 apart.

    `is_before_rope`: keys are restored and turned; else their scores are looked up.
    """

    label: str
    atoms: int
    is_before_rope: bool = False
    value_parts: int = 1
    coefficient_bits: int = 6
    num_atoms: int = 1024
    residual_tokens: int = 128

    @property
    def name(self) -> str:
        return f"CSR {self.label}, s={self.atoms}"

    @property
    def vector_bytes(self) -> int:
        """Of a coded key or value: a word an atom and a scale, or a word and a coefficient an atom."""
        return 4 * self.atoms if self.coefficient_bits == 16 else 2 * self.atoms + 2


CSR_FORMS = (
    Csr("compact", 7, is_before_rope=True),
    Csr("look-up", 7),
    Csr("paper", 8, is_before_rope=True, value_parts=2, coefficient_bits=16),
)


@dataclass(frozen=True)
class Contender:
    """A method with a cache of many layers: `step(layer)` attends once."""

    name: str
    dtype: str
    layer_bytes: int
    num_layers: int
    step: Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Row:
    shape: str
    tokens: int
    method: str
    dtype: str
    layer_megabytes: float
    layers: int
    median_ms: float
    tenth_percentile_ms: float
    gigabytes_per_second: float
    speedup_of_median: float
    speedup_of_tenth_percentile: float


def dense_contenders(shape: Shape, tokens: int, total_bytes: int) -> Iterator[Contender]:
    """Every way that torch attends densely, in three dtypes."""
    heads, groups, dim = shape.num_kv_heads, shape.num_query_heads // shape.num_kv_heads, shape.head_dim
    for dtype_name, dtype in DTYPES.items():
        layer_bytes = 2 * heads * tokens * dim * dtype.itemsize
        num_layers = max(2, round(total_bytes / layer_bytes))
        cache = torch.empty(num_layers, 2, 1, heads, tokens, dim, dtype=dtype).normal_()
        query = torch.randn(1, heads * groups, 1, dim, dtype=dtype)

        def sdpa(layer, cache=cache, query=query, is_grouped=groups > 1):
            keys, values = cache[layer]
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=is_grouped)

        def matmul(layer, cache=cache, query=query):
            keys, values = cache[layer]
            scores = torch.matmul(query.view(1, heads, groups, dim), keys.transpose(-1, -2)) * dim**-0.5
            return torch.matmul(scores.softmax(dim=-1), values)

        def bmm(layer, cache=cache, query=query):
            keys, values = cache[layer, :, 0]
            scores = torch.bmm(query.view(heads, groups, dim), keys.transpose(-1, -2)) * dim**-0.5
            return torch.bmm(scores.softmax(dim=-1), values)

        def repeat_kv(layer, cache=cache, query=query):
            keys, values = (each.repeat_interleave(groups, dim=1) for each in cache[layer])
            return F.scaled_dot_product_attention(query, keys, values)

        methods = [sdpa, matmul, bmm] + ([repeat_kv] if groups > 1 else [])
        for method in methods:
            yield Contender(method.__name__, dtype_name, layer_bytes, num_layers, method)


def packed_contender(shape: Shape, tokens: int, kivi: Kivi, total_bytes: int) -> Contender:
    """A KIVI cache just before the window of `residual_tokens` bf16 tokens is flushed."""
    heads, dim = shape.num_kv_heads, shape.head_dim
    vector_bytes = dim * (kivi.bits + 32 / kivi.group_size) / 8
    cache = _Window(shape, tokens, kivi.residual_tokens, vector_bytes, total_bytes)
    keys = _random_pages(cache.num_pages, heads, dim, PAGE_TOKENS, kivi)
    values = _random_pages(cache.num_pages, heads, PAGE_TOKENS, dim, kivi)
    layout = PageLayout(PAGE_TOKENS, kivi.bits, kivi.bits, kivi.group_size, kivi.group_size)
    pasts = [PackedPast(layout, keys, values, table, cache.count, cache.count) for table in cache.tables]
    return cache.contender(kivi.name, packed_attend, packed_reference.packed_attend, pasts)


def sparse_contender(shape: Shape, tokens: int, csr: Csr, total_bytes: int) -> Contender:
    """A CSR cache with a full window, and dictionaries of its own in every layer."""
    heads, dim, parts = shape.num_kv_heads, shape.head_dim, csr.value_parts
    dictionary_bytes = 4 * csr.num_atoms * (dim + dim // parts)
    cache = _Window(shape, tokens, csr.residual_tokens, csr.vector_bytes, total_bytes, dictionary_bytes)
    slots = (cache.num_pages, heads, csr.atoms, PAGE_TOKENS)

    # The paper's form has no means.
    means = torch.randn(heads, dim) if csr.is_before_rope and csr.coefficient_bits == 6 else None
    turn = KeyTurn(10_000.0 ** (-torch.arange(dim // 2) / (dim // 2))) if csr.is_before_rope else None

    def sides(width: int) -> list[SparseSide]:
        words = torch.empty(slots, dtype=torch.int16).random_(csr.num_atoms)
        if csr.coefficient_bits == 6:
            words |= torch.empty(slots, dtype=torch.int16).random_(-31, 32) << 10
        sizes = slots if csr.coefficient_bits == 16 else (*slots[:2], PAGE_TOKENS)
        coefficients = torch.empty(sizes).uniform_(0.1, 1.0).half()
        dictionaries = F.normalize(torch.empty(cache.num_layers, csr.num_atoms, width).normal_(), dim=-1)
        return [SparseSide(words, coefficients, dictionary, means) for dictionary in dictionaries]

    layout = SparseLayout(PAGE_TOKENS, csr.atoms, csr.atoms // parts, parts, csr.coefficient_bits)
    pasts = [
        SparsePast(layout, keys, values, table, cache.count, turn)
        for keys, values, table in zip(sides(dim), sides(dim // parts), cache.tables, strict=True)
    ]
    return cache.contender(csr.name, sparse_attend, sparse_reference.sparse_attend, pasts)


class _Window:
    """What compressed caches of many layers have in common: page tables, a bf16 window, a query."""

    def __init__(
        self, shape: Shape, tokens: int, residual_tokens: int, vector_bytes: float, total_bytes: int,
        dictionary_bytes: int = 0,
    ):  # fmt: skip
        window = (tokens - 1) % residual_tokens + 1
        heads, dim, num_packed = shape.num_kv_heads, shape.head_dim, tokens - window
        pages = -(-num_packed // PAGE_TOKENS)
        self.layer_bytes = int(2 * heads * (num_packed * vector_bytes + window * dim * 2)) + dictionary_bytes
        self.num_layers = max(2, round(total_bytes / self.layer_bytes))
        self.num_pages = self.num_layers * pages
        self.tables = torch.arange(self.num_pages, dtype=torch.int32).view(self.num_layers, 1, pages)
        self.count, length = (torch.tensor([number], dtype=torch.int32) for number in (num_packed, tokens))
        rings = torch.empty(self.num_layers, 2, 1, heads, window, dim, dtype=torch.bfloat16).normal_()
        no_sinks = torch.zeros(1, heads, 0, dim, dtype=torch.bfloat16)
        self.exact = [ExactTokens(*ring, no_sinks, no_sinks, length) for ring in rings]
        self.query = torch.randn(1, shape.num_query_heads, dim, dtype=torch.bfloat16)
        self.scaling = dim**-0.5

    def contender(self, name: str, attend: Callable, reference: Callable, pasts: list) -> Contender:
        """Raises: AssertionError where the kernel and its reference do not agree."""

        def run(function: Callable, layer: int) -> torch.Tensor:
            return function(self.query, pasts[layer], self.exact[layer], scaling=self.scaling).output

        torch.testing.assert_close(run(attend, 0), run(reference, 0), atol=2e-2, rtol=2e-2)
        return Contender(name, "bf16", self.layer_bytes, self.num_layers, lambda layer: run(attend, layer))


def _random_pages(num_pages: int, heads: int, num_rows: int, row: int, kivi: Kivi) -> Packed:
    shape = (num_pages, heads, num_rows)
    codes = torch.empty(*shape, row * kivi.bits // 16, dtype=torch.int16).random_(-(2**15), 2**15)
    scale = torch.empty(*shape, row // kivi.group_size).uniform_(0.1, 1.0).half()
    return Packed(codes, scale, -2 * scale)


def time_layers(contenders: list[Contender], rounds: int) -> list[list[float]]:
    """Milliseconds of every layer in every round, by contender; contenders take turns."""
    times: list[list[float]] = [[] for _ in contenders]
    for index in range(rounds + 1):
        for contender, kept in zip(contenders, times, strict=True):
            for layer in range(contender.num_layers):
                start = time.perf_counter()
                contender.step(layer)
                if index > 0:  # the first round warms up
                    kept.append((time.perf_counter() - start) * 1e3)
    return times


def tenth_percentile(times: list[float]) -> float:
    return statistics.quantiles(times, n=10)[0]


def measure(shape_name: str, tokens: int, rounds: int, total_bytes: int) -> list[Row]:
    shape = SHAPES[shape_name]
    contenders = list(dense_contenders(shape, tokens, total_bytes))
    num_dense = len(contenders)
    for kivi in (Kivi(2), Kivi(4), Kivi(2, residual_tokens=32)):
        contenders.append(packed_contender(shape, tokens, kivi, total_bytes))
    for csr in CSR_FORMS:
        contenders.append(sparse_contender(shape, tokens, csr, total_bytes))
    times = time_layers(contenders, rounds)
    best_median = min(statistics.median(kept) for kept in times[:num_dense])
    best_tenth = min(tenth_percentile(kept) for kept in times[:num_dense])
    return [
        Row(
            shape=shape_name,
            tokens=tokens,
            method=contender.name,
            dtype=contender.dtype,
            layer_megabytes=round(contender.layer_bytes / 1e6, 3),
            layers=contender.num_layers,
            median_ms=round(statistics.median(kept), 4),
            tenth_percentile_ms=round(tenth_percentile(kept), 4),
            gigabytes_per_second=round(contender.layer_bytes / statistics.median(kept) / 1e6, 2),
            speedup_of_median=round(best_median / statistics.median(kept), 2),
            speedup_of_tenth_percentile=round(best_tenth / tenth_percentile(kept), 2),
        )
        for contender, kept in zip(contenders, times, strict=True)
    ]


def conditions() -> dict[str, str]:
    """What a reader needs to judge a row: date, commit, processor, threads, versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "lookups": str(jit.has_lookups()),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=512, help="of cache that every method walks through")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    torch.manual_seed(0)
    rows: list[Row] = []
    for shape in options.shapes:
        for tokens in options.tokens:
            print(f"\n{shape} {SHAPES[shape]}, {tokens} tokens")
            print("method            dtype  MB/layer  median ms    p10 ms   GB/s  speed-up  of p10")
            for row in measure(shape, tokens, options.rounds, options.megabytes * 10**6):
                print(
                    f"{row.method:17} {row.dtype:5} {row.layer_megabytes:9.2f} {row.median_ms:10.3f} "
                    f"{row.tenth_percentile_ms:9.3f} {row.gigabytes_per_second:6.1f} "
                    f"{row.speedup_of_median:8.2f}x {row.speedup_of_tenth_percentile:6.2f}x",
                    flush=True,
                )
                rows.append(row)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*asdict(rows[0]), *conditions()])
        writer.writeheader()
        writer.writerows({**asdict(row), **conditions()} for row in rows)
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
