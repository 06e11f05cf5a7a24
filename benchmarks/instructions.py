"""What the Triton kernels become on a GPU, found without one: registers, spills, instructions per value.

    python -m benchmarks.instructions [--arch 90]

A decode kernel that streams packed pages at full bandwidth has few instructions for each value it reads.
On an H200 (4.8 TB/s, 132 multiprocessors at 1.76 to 1.98 GHz, 128 instructions a cycle) KIVI-2 streams 12.8
trillion values a second, which leaves 2.3 to 2.6 instructions a value; KIVI-4 has 3.9 to 4.4. Counted is the
machine code of the page loop: one pass reads a tile of keys and of values.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout
from kvlens.kernels.packed_attend import triton as packed_attend
from kvlens.kernels.quantize_pack import Packed

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Shape:
    """A model's attention and a cache for it; `window` is the capacity of the exact rings."""

    bits: int
    head_dim: int = 128
    num_query_heads: int = 32
    num_kv_heads: int = 32
    dtype: torch.dtype = torch.float16
    page_tokens: int = 128
    group_size: int = 32
    num_sinks: int = 4
    window: int = 128

    def __str__(self) -> str:
        heads = f"{self.num_query_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"KIVI-{self.bits} {heads} {str(self.dtype).removeprefix('torch.')}"


SHIPPED = [
    Shape(bits, head_dim, num_kv_heads=num_kv_heads, dtype=dtype)
    for head_dim in (128, 64)
    for bits in (2, 4)
    for num_kv_heads in (32, 8)
    for dtype in (torch.float16, torch.bfloat16)
]


@dataclass(frozen=True)
class Compiled:
    """Of one kernel: registers a thread, bytes spilled, bytes of shared memory, the instructions of its longest
    loop by name, and how many values one pass of that loop reads."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    loop: Counter
    num_values: int

    @property
    def per_value(self) -> float:
        """Instructions of a thread for each stored value: 32 threads read them together."""
        return 32 * self.loop.total() / self.num_values


def compile_attend(shape: Shape, arch: int) -> Compiled:
    """The attention kernel for `shape`, compiled for compute capability `arch`."""
    _, (attend, _) = packed_attend.prepare(*empty_inputs(shape), scaling=1.0, arch=arch)
    tiling = attend.arguments["TILING"]
    kernel = attend.compile(arch)
    code = disassemble(kernel.asm["cubin"])
    usage = inspect(kernel.asm["cubin"])
    return Compiled(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=kernel.metadata.shared,
        loop=Counter(longest_loop(code)),
        num_values=2 * tiling.tile_tokens * tiling.head_dim,
    )


def empty_inputs(shape: Shape, num_pages: int = 8) -> tuple[torch.Tensor, PackedPast, ExactTokens]:
    """Tensors of the shapes, strides and dtypes that a launch of batch 1 has. Their contents are not set."""
    heads, dim, tokens = shape.num_kv_heads, shape.head_dim, shape.page_tokens
    group, half = shape.group_size, torch.float16

    def pages(rows: int, row: int) -> Packed:
        lead = (num_pages, heads, rows)
        return Packed(
            torch.empty(*lead, row * shape.bits // 16, dtype=torch.int16),
            torch.empty(*lead, row // group, dtype=half),
            torch.empty(*lead, row // group, dtype=half),
        )

    past = PackedPast(
        PageLayout(tokens, shape.bits, shape.bits, group, group),
        pages(dim, tokens),
        pages(tokens, dim),
        *(torch.empty(size, dtype=torch.int32) for size in ((1, num_pages), 1, 1)),
    )
    rings = [torch.empty(1, heads, size, dim, dtype=shape.dtype) for size in (shape.window, shape.num_sinks)]
    exact = ExactTokens(rings[0], rings[0], rings[1], rings[1], torch.empty(1, dtype=torch.int32))
    return torch.empty(1, shape.num_query_heads, dim, dtype=shape.dtype), past, exact


def disassemble(cubin: bytes) -> str:
    return _run("nvdisasm", "-c", cubin)


def inspect(cubin: bytes) -> dict[str, int]:
    """`cuobjdump -res-usage` of a single kernel: REG, STACK, SHARED, LOCAL and others."""
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", _run("cuobjdump", "-res-usage", cubin))}


def longest_loop(code: str) -> list[str]:
    """The instructions, by name, between the farthest backward branch of a disassembly and its target."""
    names, labels, longest = [], {}, (0, 0)
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        if instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            names.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[0] in labels:
                longest = max(longest, (labels[target[0]], len(names)), key=lambda ends: ends[1] - ends[0])
    return names[slice(*longest)]


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability (default: 90, H100 and H200)")
    parser.add_argument("--mix", action="store_true", help="also print which instructions the loop is made of")
    options = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{options.arch}")
    print(f"{'':36}{'registers':>10}{'spilled':>9}{'shared':>8}{'loop':>7}{'per value':>11}")
    for shape in SHIPPED:
        compiled = compile_attend(shape, options.arch)
        print(
            f"{shape!s:36}{compiled.registers:>10}{compiled.stack_bytes:>9}{compiled.shared_bytes:>8}"
            f"{compiled.loop.total():>7}{compiled.per_value:>11.2f}"
        )
        if options.mix:
            print("   ", ", ".join(f"{name} {count}" for name, count in compiled.loop.most_common(24)))


if __name__ == "__main__":
    main()
