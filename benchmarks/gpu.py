"""One decode step of attention on a GPU: packed caches against the best dense fp16 attention there.

    python -m benchmarks.gpu                 the GPU tests, then every case; writes results/gpu.csv
    python -m benchmarks.gpu --tune          also try other stages and programs a multiprocessor
    python -m benchmarks.gpu --dry-run       tiny shapes on the CPU with the reference: checks this program

Each method walks through copies of a layer until they are several times the second-level cache, inside one
CUDA graph, so that neither that cache nor launching flatters it; given is the median time of one layer.
"Dense" is every backend of torch's scaled_dot_product_attention (for grouped heads also with the query heads
of a key/value head folded into rows, which reads each key once) and FlashAttention if it is installed;
packed methods are compared with the fastest of them. `copy` is the bandwidth of copying a large tensor.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout
from kvlens.kernels.quantize_pack import Packed

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    model: str
    num_query_heads: int
    num_kv_heads: int
    batch: int
    tokens: int
    head_dim: int = 128


LLAMA_2, LLAMA_3 = ("Llama-2-7B", 32, 32), ("Llama-3.1-8B", 32, 8)
SIZES = [(1, 4096), (1, 32768), (1, 131072), (32, 4096)]
CASES = [Case(*model, batch, tokens) for model in (LLAMA_2, LLAMA_3) for batch, tokens in SIZES]
TINY = [Case("tiny", 4, 4, 1, 384, 32), Case("tiny grouped", 4, 2, 2, 256, 32)]


@dataclass(frozen=True)
class Kivi:
    """A packed cache; its window holds the newest `residual_tokens`."""

    bits: int
    group_size: int = 32
    residual_tokens: int = 128

    @property
    def name(self) -> str:
        return f"KIVI-{self.bits} G={self.group_size} R={self.residual_tokens}"


@dataclass(frozen=True)
class Row:
    """What the CSV says. `layer_bytes` are those that one step must read of the cache."""

    model: str
    batch: int
    tokens: int
    method: str
    ms: float
    layer_bytes: int
    gigabytes_per_second: float
    share_of_copy: float
    times_best_dense: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU with the reference")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the GPU tests first")
    parser.add_argument("--tune", action="store_true", help="also try other configurations of the kernel")
    options = parser.parse_args()
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            save(list(measure(TINY, torch.device("cpu"))), torch.device("cpu"), Path(folder) / "gpu.csv")
        return 0
    if not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU, and torch sees none. `--dry-run` checks the program without one.")
        return 2
    if (
        not options.skip_tests
        and subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-m",
                "gpu",
                "--confcutdir=tests/kernels",
                "tests/kernels/test_gpu.py",
            ],
            cwd=ROOT,
        ).returncode
    ):
        print("The GPU tests failed; times of wrong kernels are not worth having (--skip-tests runs them anyway).")
        return 1
    device = torch.device("cuda")
    save(list(measure(CASES, device)), device, ROOT / "benchmarks" / "results" / "gpu.csv")
    if options.tune:
        tune(CASES, device)
    return 0


def measure(cases: list[Case], device: torch.device) -> Iterator[Row]:
    """Every method on every case, printed as it is found."""
    copy = copy_gigabytes_per_second(device)
    print(f"{device_name(device)}: copying moves {copy:.0f} GB/s")
    for case in cases:
        dense_bytes = 2 * case.batch * case.num_kv_heads * case.tokens * case.head_dim * 2
        times: dict[str, tuple[float, int]] = {}
        for name, build in dense_methods(case, device):
            try:
                times[name] = (time_ms(build, dense_bytes, device), dense_bytes)
            except (RuntimeError, NotImplementedError) as error:
                print(f"  {name} cannot run this: {str(error).splitlines()[0][:100]}")
        best_dense = min(ms for ms, _ in times.values())
        for kivi in (Kivi(2), Kivi(4)):
            size = packed_bytes(case, kivi)
            times[kivi.name] = (time_ms(partial(kivi_step, case, kivi, device), size, device), size)
        for name, (ms, size) in times.items():
            speed = size / ms / 1e6
            row = Row(case.model, case.batch, case.tokens, name, ms, size, speed, speed / copy, best_dense / ms)
            print(
                f"  {row.model:13} B={row.batch:<3} L={row.tokens:<7} {row.method:22} {row.ms:9.4f} ms"
                f" {row.gigabytes_per_second:7.0f} GB/s {row.share_of_copy:6.1%} of copy"
                f" {row.times_best_dense:6.2f} x dense"
            )
            yield row


def dense_methods(case: Case, device: torch.device) -> Iterator[tuple[str, Callable[[], Step]]]:
    """The dense candidates by name; each builds a step over a cache of its own."""
    is_grouped = case.num_query_heads != case.num_kv_heads
    for backend in (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    ):  # fmt: skip
        name = "sdpa " + backend.name.removesuffix("_ATTENTION").lower()
        yield name, partial(sdpa_step, case, device, backend, is_folded=False)
        if is_grouped:
            yield f"{name} folded", partial(sdpa_step, case, device, backend, is_folded=True)
    try:
        import flash_attn
    except ImportError:
        return
    yield f"flash-attn {flash_attn.__version__}", partial(flash_step, case, device)


def sdpa_step(case: Case, device: torch.device, backend: SDPBackend, *, is_folded: bool) -> Step:
    query, keys, values = dense_inputs(case, device)
    if is_folded:
        query = query.view(case.batch, case.num_kv_heads, -1, case.head_dim)
    is_grouped = query.shape[1] != keys.shape[1]

    def step() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=is_grouped)

    return step


def flash_step(case: Case, device: torch.device) -> Step:
    from flash_attn import flash_attn_with_kvcache

    query, keys, values = (tensor.transpose(1, 2).contiguous() for tensor in dense_inputs(case, device))
    return partial(flash_attn_with_kvcache, query, keys, values)


def dense_inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shape = (case.batch, case.num_kv_heads, case.tokens, case.head_dim)
    query = torch.randn(case.batch, case.num_query_heads, 1, case.head_dim, device=device, dtype=dtype)
    return query, *(torch.randn(shape, device=device, dtype=dtype) for _ in range(2))


def kivi_step(case: Case, kivi: Kivi, device: torch.device) -> Step:
    """A step over a packed cache of random codes in shuffled pages, by the kernel itself: no dispatch."""
    if device.type == "cuda":
        from kvlens.kernels.packed_attend.triton import packed_attend
    else:
        from kvlens.kernels.packed_attend.reference import packed_attend
    return partial(packed_attend, *kivi_inputs(case, kivi, device), scaling=case.head_dim**-0.5)


def kivi_inputs(case: Case, kivi: Kivi, device: torch.device) -> tuple[torch.Tensor, PackedPast, ExactTokens]:
    page, heads, dim = kivi.residual_tokens, case.num_kv_heads, case.head_dim
    num_packed = case.tokens - kivi.residual_tokens
    pages_each = num_packed // page
    num_pages = case.batch * pages_each
    dtype = torch.float16 if device.type == "cuda" else torch.float32

    def pages(rows: int, row: int) -> Packed:
        groups = (num_pages, heads, rows, row // kivi.group_size)
        codes = (num_pages, heads, rows, row * kivi.bits // 16)
        return Packed(
            torch.randint(-(2**15), 2**15, codes, dtype=torch.int16, device=device),
            torch.full(groups, 1 / 2**kivi.bits, dtype=torch.float16, device=device),
            torch.full(groups, -0.5, dtype=torch.float16, device=device),
        )

    def same(number: int) -> torch.Tensor:
        return torch.full((case.batch,), number, dtype=torch.int32, device=device)

    table = torch.randperm(num_pages, device=device).to(torch.int32).view(case.batch, pages_each)
    layout = PageLayout(page, kivi.bits, kivi.bits, kivi.group_size, kivi.group_size)
    past = PackedPast(layout, pages(dim, page), pages(page, dim), table, same(num_packed), same(num_packed))
    ring, sinks = (case.batch, heads, page, dim), (case.batch, heads, 0, dim)
    exact = ExactTokens(
        *(torch.randn(ring, device=device, dtype=dtype) for _ in range(2)),
        *(torch.empty(sinks, device=device, dtype=dtype) for _ in range(2)),
        same(case.tokens),
    )
    return torch.randn(case.batch, case.num_query_heads, dim, device=device, dtype=dtype), past, exact


def packed_bytes(case: Case, kivi: Kivi) -> int:
    """Bytes of keys and values that a step reads: codes, a scale and a minimum a group, the fp16 window."""
    bits_per_value = kivi.bits + 32 / kivi.group_size
    num_packed = case.tokens - kivi.residual_tokens
    bits = num_packed * bits_per_value + kivi.residual_tokens * 16
    return round(2 * case.batch * case.num_kv_heads * case.head_dim * bits / 8)


def time_ms(build: Callable[[], Step], layer_bytes: int, device: torch.device, seconds: float = 0.5) -> float:
    """Milliseconds of one step: the median over rounds through enough copies to outgrow the L2 cache."""
    if device.type == "cpu":
        step = build()
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    steps = [build() for _ in range(max(1, min(64, -(-4 * l2_bytes // layer_bytes))))]
    for step in steps[:1] * 3:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    rounds, until = [], time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / len(steps))
    return statistics.median(rounds)


def copy_gigabytes_per_second(device: torch.device) -> float:
    """Bytes read and written by copying a tensor far larger than any cache."""
    size = 2**31 if device.type == "cuda" else 2**24
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_ms(lambda: partial(target.copy_, source), size, device) / 1e6


def tune(cases: list[Case], device: torch.device) -> None:
    """Print the time of every case by stages and programs; edit `CONFIGURATIONS` after what it shows."""
    from kvlens.kernels.packed_attend import tiling

    shipped = tiling.CONFIGURATIONS
    print("\nms by (stages, programs a multiprocessor)")
    for case in cases:
        for kivi in (Kivi(2), Kivi(4)):
            found = {}
            for stages in (2, 3, 4):
                for programs in (4, 8, 16):
                    choice = tiling.Configuration(num_stages=stages, programs=programs)
                    tiling.CONFIGURATIONS = (((80, None, None), choice),)
                    tiling._tiling.cache_clear()
                    found[stages, programs] = time_ms(
                        partial(kivi_step, case, kivi, device), packed_bytes(case, kivi), device, seconds=0.1
                    )
            best = sorted(found, key=found.get)
            print(f"  {case.model:13} B={case.batch:<3} L={case.tokens:<7} {kivi.name:18}", end=" ")
            print(", ".join(f"{choice} {found[choice]:.4f}" for choice in best))
    tiling.CONFIGURATIONS = shipped
    tiling._tiling.cache_clear()


def save(rows: list[Row], device: torch.device, path: Path) -> None:
    """Write the rows, each with the conditions that it was measured under."""
    conditions = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": first_line_of("git", "rev-parse", "--short", "HEAD"),
        "device": device_name(device),
        "driver": first_line_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
    }
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *conditions])
        writer.writeheader()
        writer.writerows(asdict(row) | conditions for row in rows)
    print(f"saved {len(rows)} rows to {path}")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry run)"


def first_line_of(*command: str) -> str:
    """What a program says first; nothing where it is not installed or fails."""
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return said.stdout.partition("\n")[0] if said.returncode == 0 else ""


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


if __name__ == "__main__":
    sys.exit(main())
