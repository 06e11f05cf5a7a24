"""What the Triton kernels become on a GPU, found without one: registers, spills, instructions for each value.

    python -m benchmarks.instructions [--arch 90]

A decode kernel that streams packed pages at full bandwidth has few instructions for each value it reads.
On an H200 (4.8 TB/s, 132 multiprocessors at 1.76 to 1.98 GHz, 128 instructions a cycle) KIVI-2 streams 12.8
trillion values a second, which leaves 2.3 to 2.6 instructions a value; KIVI-4 has 3.9 to 4.4, fp16 12 to 14.

Counted is the machine code of a kernel's longest loop, with the loops within it as often as they run, or all of a
kernel that has none; times the threads, by the values that they handle together. Values are what a cache stores, exact
or as codes, unless a row says otherwise: merging reads parts, tables and outputs of CSR read atoms.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch
import triton

from benchmarks import report
from benchmarks.gpu import layers
from benchmarks.gpu.layers import Case
from benchmarks.gpu.session import gpu_conditions
from benchmarks.machine_code import MachineCode
from kvlens.engine.methods.csr import CsrConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.shape import ModelShape
from kvlens.kernels.append_pack import triton as append_pack
from kvlens.kernels.compiled import Launch
from kvlens.kernels.dense_attend import triton as dense_attend
from kvlens.kernels.packed_attend import triton as packed_attend
from kvlens.kernels.pursuit import triton as pursuit
from kvlens.kernels.quantize_pack import triton as quantize_pack
from kvlens.kernels.sparse_attend import triton as sparse_attend

ARCHS = (80, 90, 120)
CPU = torch.device("cpu")
KIVI = tuple(KiviConfig(key_bits=bits, value_bits=bits) for bits in (2, 4))
CSR = {"compact": CsrConfig(), "look-up": CsrConfig(keys="after RoPE", is_centred=False)}
PURSUITS = {
    "MP": {"distinct": False, "refit": False, "orthogonal": False},
    "MP + fit": {"distinct": True, "refit": True, "orthogonal": False},
    "OMP": {"distinct": True, "refit": False, "orthogonal": True},
}


def case_of(head_dim: int = 128, num_kv_heads: int = 32, dtype: torch.dtype = torch.float16) -> Case:
    shape = ModelShape(1, 32, num_kv_heads, head_dim)
    name = f"32/{num_kv_heads}x{head_dim} {str(dtype).removeprefix('torch.')}"
    return Case(name, shape, batch=1, tokens=4096, dtype=dtype)


CASES = tuple(case_of(head_dim, num_kv_heads) for head_dim in (128, 64, 96, 256) for num_kv_heads in (32, 8))
PACKED = (*product(KIVI, CASES), *product(KIVI, (case_of(num_kv_heads=8, dtype=torch.bfloat16),)))


@dataclass(frozen=True)
class Subject:
    """A launch to count. A pass of its longest loop handles `num_values`, the loops within it running `trips` times;
    `trips` None: there is none, and the whole program handles them."""

    kernel: str
    shape: str
    launch: Launch
    num_values: float | None
    trips: tuple[float, ...] | None = ()
    values: str = "stored"


@dataclass(frozen=True)
class Row:
    """`instructions` of a thread for `num_values` that its program's threads handle together."""

    kernel: str
    shape: str
    arch: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: float
    num_values: float | None
    values: str
    per_value: float | None


def count(subject: Subject, arch: int) -> tuple[Row, MachineCode]:
    """The figures of a subject compiled for compute capability `arch`, and its code."""
    code = MachineCode.of(subject.launch.compile(arch))
    issued = code.num_instructions if subject.trips is None else code.issued(subject.trips)
    threads = 32 * subject.launch.arguments["num_warps"]
    row = Row(
        subject.kernel, subject.shape, arch, code.registers, code.stack_bytes, code.shared_bytes, issued,
        subject.num_values, subject.values, subject.num_values and threads * issued / subject.num_values,
    )  # fmt: skip
    return row, code


def subjects(arch: int) -> Iterator[Subject]:
    """Every kernel on the shapes that matter."""
    for config, case in PACKED:
        yield packed(config, case, arch)
    for case in CASES:
        yield from dense(case, arch)
    for mode, case in product(CSR, CASES[:4]):
        yield from sparse(mode, case, arch)
    for config in KIVI:
        yield from quantizing(config.key_bits)
        yield appending(config)
    for mode in PURSUITS:
        yield from pursuing(mode, arch)
    yield restoring()


def packed(config: KiviConfig, case: Case, arch: int) -> Subject:
    (layer,) = layers.kivi_layers(case, config, 1, CPU)
    _, (attend, _) = packed_attend.prepare(*layer, scaling=case.scaling, arch=arch)
    num_values = 2 * attend.arguments["TILING"].tile_tokens * case.shape.head_dim
    return Subject("packed_attend", f"KIVI-{config.key_bits} {case.model}", attend, num_values)


def dense(case: Case, arch: int) -> Iterator[Subject]:
    """With grouped heads, whose programs are few, parts and the launch that merges them."""
    (layer,) = layers.dense_layers(case, 1, CPU)
    _, (attend, *merge) = dense_attend.prepare(*layer.inputs, scaling=case.scaling, arch=arch)
    yield Subject("dense_attend", case.model, attend, 2 * attend.arguments["TILING"].tile_tokens * case.shape.head_dim)
    for launch in merge:
        num_values = launch.arguments["BLOCK_PARTS"] * case.shape.head_dim
        yield Subject("split_k merge", case.model, launch, num_values, values="of parts")


def sparse(mode: str, case: Case, arch: int) -> Iterator[Subject]:
    (layer,) = layers.csr_layers(case, CSR[mode], 1, CPU)
    _, (table, weigh, scatter, output) = sparse_attend.prepare(*layer, scaling=case.scaling, arch=arch)
    tiling = weigh.arguments["TILING"]
    tile_values = tiling.tile_tokens * tiling.head_dim
    is_turned = tiling.turned_channels > 0
    atom_values = None if is_turned else table.arguments["BLOCK_ATOMS"] * tiling.head_dim  # turned keys have no table
    trips = (tiling.turned_channels / 2 / tiling.turn_channels, tiling.key_atoms) if is_turned else ()
    name = f"CSR {mode} {case.model}"
    yield Subject("sparse_attend table", name, table, atom_values, None, "of atoms")
    yield Subject("sparse_attend weigh", name, weigh, tile_values, trips)
    yield Subject("sparse_attend scatter", name, scatter, tile_values if is_turned else 2 * tile_values)
    num_values = output.arguments["BLOCK_ATOMS"] * tiling.block_channels
    yield Subject("sparse_attend output", name, output, num_values, values="of atoms")


def quantizing(bits: int) -> Iterator[Subject]:
    """Keys are quantized along tokens, values along channels."""
    tokens = torch.empty(1, 32, 128, 128, dtype=torch.float16)
    for side, rows in (("keys", tokens.mT), ("values", tokens)):
        _, (launch,) = quantize_pack.prepare(rows, bits=bits, group_size=32)
        num_values = launch.arguments["BLOCK_ROWS"] * launch.arguments["FORMAT"].length
        yield Subject("quantize_pack", f"{side}, {bits} bit", launch, num_values, None)


def appending(config: KiviConfig) -> Subject:
    """The step in which a block of keys and one token's values fall due."""
    ((_, past, exact),) = layers.kivi_layers(case_of(), config, 1, CPU)
    token = exact.keys[:, :, 0]
    (launch,) = append_pack.prepare(token, token, exact, config.flush_rule, past)
    blocks = launch.arguments["BLOCKS"]
    num_values = sum(side.block_rows * side.row.length for side in (blocks.keys, blocks.values))
    return Subject("append_pack", f"KIVI-{config.key_bits} {case_of().model}", launch, num_values, None)


def pursuing(mode: str, arch: int) -> Iterator[Subject]:
    """Both loops are passed once for each atom of a vector."""
    vectors, dictionary = torch.empty(4096, 128, dtype=torch.float16), torch.empty(1024, 128)
    _, (pursue, *fit) = pursuit.prepare(vectors, dictionary, sparsity=8, gram=None, arch=arch, **PURSUITS[mode])
    arguments = pursue.arguments
    trips = (arguments["NUM_ATOMS"] / arguments["BLOCK_N"],)
    if arguments["ORTHOGONAL"]:
        trips += ((arguments["SPARSITY"] - 1) / 2,)
    name = f"{mode}, 8 of 1024 atoms of 128"
    yield Subject("pursuit", name, pursue, arguments["BLOCK_V"] * 128 / arguments["SPARSITY"], trips)
    for launch in fit:
        yield Subject("pursuit fit", name, launch, launch.arguments["BLOCK_V"] * 128 / arguments["SPARSITY"])


def restoring() -> Subject:
    codes = pursuit.SparseCodes(torch.empty(4096, 8, dtype=torch.int16), torch.empty(4096, 8))
    _, (launch,) = pursuit.prepare_restore(codes, torch.empty(1024, 128))
    return Subject("pursuit restore", "8 of 1024 atoms of 128", launch, launch.arguments["BLOCK_V"] * 128 / 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, metavar="CC",
        help="compute capabilities; all of %(default)s are saved, fewer printed alone",
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="KERNEL", help="kernels with this in their name; saves nothing")
    parser.add_argument("--mix", action="store_true", help="also print which instructions the loops are made of")
    options = parser.parse_args()
    print(f"triton {triton.__version__}")
    rows = []
    for arch in options.arch:
        counted = [count(subject, arch) for subject in subjects(arch) if options.only in subject.kernel]
        report.show([row for row, _ in counted])
        for row, code in counted if options.mix else ():
            print(f"{row.kernel} {row.shape}:", ", ".join(f"{name} {n}" for name, n in code.loop.most_common(24)))
        rows += [row for row, _ in counted]
    if not options.only and {*ARCHS} <= {*options.arch}:
        given = gpu_conditions(CPU)
        report.write(report.RESULTS / "instructions.csv", [asdict(row) | given for row in rows])


if __name__ == "__main__":
    main()
