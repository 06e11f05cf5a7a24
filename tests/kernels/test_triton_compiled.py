"""The Triton kernels compiled for GPUs that need not be here: they compile, spill nothing and stay lean.

The first run compiles (some 4 s a kernel); Triton keeps the results in its cache.
"""

import os
from dataclasses import replace

import pytest
import torch
from append_checks import AppendCase, build_append
from cases import AttendCase, build_attend
from sparse_cases import SparseCase, build_sparse

from benchmarks import instructions
from benchmarks.instructions import KIVI, PACKED, case_of, count
from benchmarks.machine_code import MachineCode, inspect
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.kernels.append_pack import triton as append_pack
from kvlens.kernels.compiled import Launch
from kvlens.kernels.dense_attend import triton as dense_attend
from kvlens.kernels.packed_attend import triton as packed_attend
from kvlens.kernels.packed_attend.tiling import plan_of
from kvlens.kernels.pursuit import triton as pursuit
from kvlens.kernels.quantize_pack import triton as quantize_pack
from kvlens.kernels.sparse_attend import triton as sparse_attend

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# Instructions for each stored value that leave an H200 at its memory bandwidth (see benchmarks/instructions.py)
BUDGET = {2: 2.3, 4: 3.9}
BUDGET_64 = {2: 2.65, 4: 3.9}  # half the channels share the same overhead: 2.58 in fp16, 2.61 in bf16

KIVI_2, KIVI_4 = KIVI
HALF, BRAIN = torch.float16, torch.bfloat16

# On the H100 and H200 a sample of every size, group and dtype; on the A100 and on RTX Blackwell two
TO_COMPILE = [
    *((90, config, case) for config, case in PACKED if case.shape.head_dim in (64, 128)),
    (90, KIVI_2, case_of(64, 8, BRAIN)), (90, KIVI_4, case_of(64, 32, BRAIN)),
    (90, KIVI_2, case_of(96, 32)), (90, KIVI_4, case_of(96, 8, BRAIN)),
    (90, KIVI_2, case_of(256, 8)), (90, KIVI_4, case_of(256, 8, BRAIN)),
    (90, replace(KIVI_2, group_size=64, num_sinks=4), case_of(128, 8)),
    (90, replace(KIVI_2, group_size=128), case_of(128, 32)),
    (90, replace(KIVI_4, group_size=128, num_sinks=4), case_of(128, 8, BRAIN)),
    *((arch, *shape) for arch in (80, 120) for shape in [(KIVI_2, case_of()), (KIVI_4, case_of(128, 8, BRAIN))]),
]  # fmt: skip


def shape_id(given) -> str:
    if isinstance(given, KiviConfig):
        return f"{given.key_bits} bits, G {given.group_size}"
    return getattr(given, "model", f"{given}")


@pytest.mark.parametrize(("arch", "config", "case"), TO_COMPILE, ids=shape_id)
def test_attention_spills_nothing_and_keeps_its_budget(arch, config, case):
    row, code = count(instructions.packed(config, case, arch), arch)
    assert code.registers <= 255
    assert any(name.startswith("HMMA") for name in code.loop), "the products must be on the tensor cores"
    budget = BUDGET_64 if case.shape.head_dim < 128 else BUDGET
    assert row.per_value <= budget[config.key_bits]
    spilled = sum(name.startswith(("LDL", "STL")) for name in code.loop.elements())
    if case.shape.head_dim == 256:  # outputs alone are 64 registers: what is kept across the loop waits in memory
        assert code.stack_bytes <= 96
        assert spilled <= 0.01 * code.loop.total()
    else:
        assert code.stack_bytes == spilled == 0


ANY = AttendCase("any", (40,), (32,), (32,), num_query_heads=32, num_kv_heads=32, num_sinks=4, dtype=torch.float16)


@pytest.mark.parametrize(
    "case",
    [
        replace(ANY, page_tokens=32),
        replace(ANY, key_bits=4, value_bits=4, head_dim=96, num_query_heads=9, num_kv_heads=1, page_tokens=96,
                key_group_size=96, value_group_size=96),
        replace(ANY, head_dim=256, num_query_heads=4, num_kv_heads=1, dtype=torch.bfloat16),
        replace(ANY, key_bits=8, value_bits=8, dtype=torch.float32, num_sinks=0),
        replace(ANY, key_bits=1, value_bits=1, page_tokens=256),
    ],
    ids=str,
)  # fmt: skip
def test_attention_compiles_for_every_layout(case):
    for launch in prepare_attend(case, arch=90):
        assert launch.compile(90).asm["cubin"]


def prepare_attend(case: AttendCase, *, arch: int) -> tuple[Launch, ...]:
    inputs = build_attend(case)
    return packed_attend.prepare(inputs.query, inputs.past, inputs.exact, scaling=1.0, arch=arch)[1]


DENSE_TO_COMPILE = [
    (arch, dim, heads, dtype)
    for arch in (80, 90, 120)
    for dim, heads, dtype in [
        (64, 2, torch.float16), (64, 8, torch.bfloat16), (96, 32, torch.float16), (128, 32, torch.float16),
        (128, 8, torch.bfloat16), (128, 2, torch.float16), (256, 2, torch.bfloat16), (256, 32, torch.float16),
    ]
]  # fmt: skip


@pytest.mark.parametrize("to_compile", DENSE_TO_COMPILE, ids=str)
def test_dense_attention_streams_tiles_and_spills_nothing(to_compile):
    arch, head_dim, num_kv_heads, dtype = to_compile
    query, keys = torch.empty(1, 32, head_dim, dtype=dtype), torch.empty(1, num_kv_heads, 4096, head_dim, dtype=dtype)
    length = torch.empty(1, dtype=torch.int32)
    _, launches = dense_attend.prepare(query, keys, keys, length, scaling=1.0, arch=arch)
    codes = [MachineCode.of(launch.compile(arch)) for launch in launches]
    assert [code.stack_bytes for code in codes] == [0] * len(codes)
    loop = codes[0].loop
    assert any(name.startswith(("HMMA", "HGMMA")) for name in loop), "the products must be on the tensor cores"
    assert any(name.startswith("LDGSTS") and name.endswith("128") for name in loop), "tiles must be copied ahead"
    assert not any(name.startswith("LDG.") for name in loop), "all of them"


SPARSE = SparseCase(
    "sparse", (200,), (128,), 0, 0, 128, 8, 8, num_key_atoms=1024, num_value_atoms=1024, page_tokens=128, num_sinks=4,
    dtype=torch.float16,
)  # fmt: skip
TURNED = replace(SPARSE, key_atoms=7, value_atoms=7, page_tokens=64, turned_channels=128, means=("keys", "values"))


def heads(case: SparseCase, num_query_heads: int, num_kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> SparseCase:
    return replace(case, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads, dtype=dtype)


SPARSE_TO_COMPILE = [
    (90, heads(SPARSE, 32, 8, torch.float16)),
    (90, heads(replace(SPARSE, value_atoms=4, value_parts=2, coefficient_bits=16), 32, 32)),
    (90, heads(replace(SPARSE, key_atoms=4, value_atoms=4, page_tokens=64, head_dim=64), 4, 2, torch.float32)),
    (90, heads(replace(SPARSE, key_atoms=7, value_atoms=3, value_parts=2, page_tokens=48, head_dim=96), 14, 1)),
    *((arch, heads(SPARSE, 32, num_kv_heads)) for arch in (80, 120) for num_kv_heads in (8, 32)),
    *((arch, heads(TURNED, 32, num_kv_heads)) for arch in (80, 90, 120) for num_kv_heads in (8, 32)),
    (90, heads(
        replace(TURNED, key_atoms=4, value_atoms=2, value_parts=2, coefficient_bits=16, head_dim=96,
                turned_channels=64), 16, 1, torch.float16)),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "case"), SPARSE_TO_COMPILE, ids=str)
def test_sparse_attention_spills_nothing(arch, case):
    for launch in prepare_sparse(case, arch=arch):
        usage = inspect(launch.compile(arch).asm["cubin"])
        assert usage["STACK"] == 0, launch.kernel
        assert usage["REG"] <= 255


def prepare_sparse(case: SparseCase, *, arch: int) -> tuple[Launch, ...]:
    inputs = build_sparse(case)
    return sparse_attend.prepare(inputs.query, inputs.past, inputs.exact, scaling=1.0, arch=arch)[1]


def prepare_append(case: AppendCase, device: str = "cpu") -> Launch:
    state = build_append(case, device=device)
    token = state.keys[:, :, 0], state.values[:, :, 0]
    (launch,) = append_pack.prepare(*token, state.exact, case.rule, state.past)
    return launch


PAPER = AppendCase("paper", (0,), num_kv_heads=32, head_dim=128, page_tokens=128, residual=128)

APPEND_TO_COMPILE = [
    *((arch, PAPER) for arch in (80, 90, 120)),
    *((arch, replace(PAPER, key_bits=4, value_bits=4, num_kv_heads=8, num_sinks=4, dtype=torch.bfloat16))
      for arch in (80, 90, 120)),
    (90, replace(PAPER, residual=1024, value_flush=128)),
    (90, replace(PAPER, page_tokens=32, residual=32, value_flush=32)),
    (90, replace(PAPER, page_tokens=64, key_group_size=64, value_group_size=64, head_dim=64)),
    (90, replace(PAPER, head_dim=96, num_sinks=64)),
    (90, replace(PAPER, head_dim=256, key_group_size=128, value_group_size=8, value_flush=8)),
    (90, replace(PAPER, packs=False, fresh_dtype=torch.float32)),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "case"), APPEND_TO_COMPILE, ids=str)
def test_appending_spills_nothing(arch, case):
    usage = inspect(prepare_append(case).compile(arch).asm["cubin"])
    assert usage["STACK"] == 0
    assert usage["REG"] <= 128


@pytest.mark.parametrize("packs", [True, False])
def test_an_append_is_prepared_without_a_look_at_its_tensors(packs):
    """Those on `meta` have no contents: what is prepared once, a graph repeats at every length."""
    ours, blind = (prepare_append(replace(PAPER, packs=packs), device) for device in ("cpu", "meta"))
    assert ours.grid == blind.grid
    assert ours.arguments["BLOCKS"] == blind.arguments["BLOCKS"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_quantizing_spills_nothing(bits, dtype):
    tokens = torch.empty(2, 8, 128, 128, dtype=dtype)
    for values in (tokens, tokens.transpose(-1, -2)):
        _, (launch,) = quantize_pack.prepare(values, bits=bits, group_size=32)
        assert inspect(launch.compile(90).asm["cubin"])["STACK"] == 0


@pytest.mark.parametrize(
    ("arch", "mode", "num_atoms", "width", "sparsity"),
    [
        *((arch, mode, 1024, 128, 8) for arch in (80, 90, 120) for mode in ("plain", "refit", "orthogonal")),
        *((arch, "refit", 1024, 64, 8) for arch in (80, 90, 120)),
        (90, "refit", 4096, 128, 8),
        (90, "refit", 1024, 128, 32),
        (90, "plain", 8192, 64, 8),
        (90, "refit", 203, 20, 3),
    ],
)
def test_pursuit_spills_nothing(arch, mode, num_atoms, width, sparsity):
    flags = {"distinct": mode != "plain", "refit": mode == "refit", "orthogonal": mode == "orthogonal"}
    vectors, dictionary = torch.empty(4096, width, dtype=torch.float16), torch.empty(num_atoms, width)
    _, launches = pursuit.prepare(vectors, dictionary, sparsity=sparsity, gram=None, arch=arch, **flags)
    compiled = [launch.compile(arch) for launch in launches]
    assert [inspect(kernel.asm["cubin"])["STACK"] for kernel in compiled] == [0] * len(launches)
    assert "mma" in compiled[0].asm["ptx"], "the products must be on the tensor cores"


def test_every_kernel_is_counted():
    """The loops of each are found, whose lengths the table is made of; compiling all is left to the table."""
    subjects = [subject for subject in instructions.subjects(90) if "compact 32/8x64" in subject.shape]
    rows = {subject.kernel: count(subject, 90)[0] for subject in subjects}
    assert [name.removeprefix("sparse_attend ") for name in rows] == ["table", "weigh", "scatter", "output"]
    assert rows.pop("sparse_attend table").per_value is None  # turned keys have none
    assert all(1 < row.per_value < 100 for row in rows.values())


def test_loops_within_a_loop_count_as_often_as_they_run():
    names = ("MOV", "IADD", "FFMA", "BRA", "IADD", "BRA", "EXIT", "BRA", "NOP")
    code = MachineCode(8, 0, 0, names, (range(1, 6), range(2, 4)))
    assert code.issued((10,)) == 3 + 10 * 2
    assert code.loop == {"IADD": 2, "BRA": 2, "FFMA": 1}
    assert code.num_instructions == 8
    with pytest.raises(ValueError, match="one number for each loop within the longest, 1"):
        code.issued()


def test_a_gpu_too_old_is_named():
    with pytest.raises(ValueError, match="compute capability 80 or newer; got 75"):
        prepare_attend(ANY, arch=75)
    with pytest.raises(ValueError, match="compute capability 80 or newer; got 75"):
        prepare_sparse(heads(SPARSE, 32, 8), arch=75)


def test_tensors_on_the_cpu_are_named():
    inputs = build_attend(ANY)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        packed_attend.packed_attend(inputs.query, inputs.past, inputs.exact, scaling=1.0)


def test_the_cache_tells_tilings_apart():
    """Triton finds compiled kernels by what their constants print as."""
    tilings = []
    for length in (40, 41):
        inputs = build_attend(replace(ANY, lengths=(length,)))
        tilings.append(plan_of(inputs.query, inputs.past, inputs.exact).tiling)
    assert repr(tilings[0]) != repr(tilings[1])


def test_the_places_of_counts_ask_for_no_kernel_of_their_own():
    """Layers share a tensor of counts, so that at batch 1 three of four lie off a multiple of 16 bytes."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

    inputs = build_attend(ANY)
    names = ("page_table", "num_keys", "num_values")
    past = replace(inputs.past, **{name: shifted(getattr(inputs.past, name)) for name in names})
    exact = replace(inputs.exact, length=shifted(inputs.exact.length))
    assert past.num_keys.data_ptr() % 16 != 0
    first, second = (
        packed_attend.prepare(inputs.query, *stored, scaling=1.0, arch=90)[1][0].compile(90)
        for stored in ((inputs.past, inputs.exact), (past, exact))
    )
    assert first.hash == second.hash
