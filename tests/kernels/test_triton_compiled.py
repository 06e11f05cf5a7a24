"""The Triton kernels compiled for GPUs that need not be here: they compile, spill nothing and stay lean.

The first run compiles (some 4 s a kernel); Triton keeps the results in its cache.
"""

import os
from dataclasses import replace

import pytest
import torch
from append_checks import AppendCase, build_append

from benchmarks.instructions import (
    SHIPPED,
    Shape,
    compile_attend,
    disassemble,
    empty_inputs,
    inspect,
    longest_loop,
)
from kvlens.kernels.append_pack import triton as append_pack
from kvlens.kernels.compiled import Launch
from kvlens.kernels.dense_attend import triton as dense_attend
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import triton as packed_attend
from kvlens.kernels.packed_attend.tiling import plan_of
from kvlens.kernels.pursuit import triton as pursuit
from kvlens.kernels.quantize_pack import triton as quantize_pack
from kvlens.kernels.sparse_attend import KeyTurn, SparseLayout, SparsePast, SparseSide
from kvlens.kernels.sparse_attend import triton as sparse_attend

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# Instructions for each stored value that leave an H200 at its memory bandwidth (see benchmarks/instructions.py)
BUDGET = {2: 2.3, 4: 3.9}


# On the H100 and H200 every shape in one of its dtypes; on the A100 and on RTX Blackwell two
TO_COMPILE = [
    *((90, shape) for i, shape in enumerate(SHIPPED) if (i // 2 + i) % 2 == 0),
    *((arch, Shape(2)) for arch in (80, 120)),
    *((arch, Shape(4, num_kv_heads=8, dtype=torch.bfloat16)) for arch in (80, 120)),
]


@pytest.mark.parametrize(("arch", "shape"), TO_COMPILE, ids=str)
def test_attention_spills_nothing_and_keeps_its_budget(arch, shape):
    compiled = compile_attend(shape, arch)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= 255
    assert not any(name.startswith(("LDL", "STL")) for name in compiled.loop)
    assert any(name.startswith("HMMA") for name in compiled.loop), "the products must be on the tensor cores"
    if shape.head_dim == 128:  # half the channels share the same overhead at 64
        assert compiled.per_value <= BUDGET[shape.bits]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, head_dim=64, page_tokens=32),
        Shape(4, head_dim=96, num_query_heads=9, num_kv_heads=1, group_size=96, page_tokens=96),
        Shape(2, head_dim=256, num_query_heads=4, num_kv_heads=1, dtype=torch.bfloat16),
        Shape(8, head_dim=64, dtype=torch.float32, num_sinks=0),
        Shape(1, head_dim=64, page_tokens=256),
    ],
    ids=str,
)
def test_attention_compiles_for_every_layout(shape):
    _, launches = packed_attend.prepare(*empty_inputs(shape), scaling=1.0, arch=90)
    for launch in launches:
        assert launch.compile(90).asm["cubin"]


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
    cubins = [launch.compile(arch).asm["cubin"] for launch in launches]
    assert [inspect(cubin)["STACK"] for cubin in cubins] == [0] * len(cubins)
    loop = longest_loop(disassemble(cubins[0]))
    assert any(name.startswith(("HMMA", "HGMMA")) for name in loop), "the products must be on the tensor cores"
    assert any(name.startswith("LDGSTS") and name.endswith("128") for name in loop), "tiles must be copied ahead"
    assert not any(name.startswith("LDG.") for name in loop), "all of them"


def empty_sparse_inputs(
    layout: SparseLayout,
    num_query_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    turned_channels: int = 0,
) -> tuple[torch.Tensor, SparsePast, ExactTokens]:
    """Tensors of the shapes, strides and dtypes that a launch of batch 1 has. Their contents are not set.

    Turned keys, and values with them, have means.
    """
    means = torch.empty(num_kv_heads, head_dim) if turned_channels else None

    def side(atoms: int, parts: int) -> SparseSide:
        slots = (8, num_kv_heads, parts * atoms, layout.page_tokens)
        sizes = (*slots[:2], layout.page_tokens) if layout.is_packed else slots
        coefficients = torch.empty(sizes, dtype=torch.float16)
        dictionary = torch.empty(1024, head_dim // parts)
        return SparseSide(torch.empty(slots, dtype=torch.int16), coefficients, dictionary, means)

    table, count, length = (torch.empty(size, dtype=torch.int32) for size in ((1, 8), 1, 1))
    keys, values = side(layout.key_atoms, 1), side(layout.value_atoms, layout.value_parts)
    ring, sinks = (torch.empty(1, num_kv_heads, size, head_dim, dtype=dtype) for size in (128, 4))
    exact = ExactTokens(ring, ring, sinks, sinks, length)
    query = torch.empty(1, num_query_heads, head_dim, dtype=dtype)
    turn = KeyTurn(torch.ones(turned_channels // 2)) if turned_channels else None
    return query, SparsePast(layout, keys, values, table, count, turn), exact


SPARSE_TO_COMPILE = [
    (90, SparseLayout(128, 8, 8), 32, 8, 128, torch.float16),
    (90, SparseLayout(128, 8, 4, 2, 16), 32, 32, 128, torch.bfloat16),
    (90, SparseLayout(64, 4, 4), 4, 2, 64, torch.float32),
    (90, SparseLayout(48, 7, 3, 2), 14, 1, 96, torch.float16),
    *((arch, SparseLayout(128, 8, 8), 32, heads, 128, torch.bfloat16) for arch in (80, 120) for heads in (8, 32)),
    *(
        (arch, SparseLayout(64, 7, 7), 32, heads, 128, torch.bfloat16, 128)
        for arch in (80, 90, 120)
        for heads in (8, 32)
    ),
    (90, SparseLayout(64, 4, 2, 2, 16), 16, 1, 96, torch.float16, 64),
]


@pytest.mark.parametrize("to_compile", SPARSE_TO_COMPILE, ids=str)
def test_sparse_attention_spills_nothing(to_compile):
    arch, *shape = to_compile
    _, launches = sparse_attend.prepare(*empty_sparse_inputs(*shape), scaling=1.0, arch=arch)
    for launch in launches:
        usage = inspect(launch.compile(arch).asm["cubin"])
        assert usage["STACK"] == 0, launch.kernel
        assert usage["REG"] <= 255


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


def test_a_gpu_too_old_is_named():
    with pytest.raises(ValueError, match="compute capability 80 or newer; got 75"):
        packed_attend.prepare(*empty_inputs(Shape(2)), scaling=1.0, arch=75)
    inputs = empty_sparse_inputs(SparseLayout(128, 8, 8), 32, 8, 128, torch.float16)
    with pytest.raises(ValueError, match="compute capability 80 or newer; got 75"):
        sparse_attend.prepare(*inputs, scaling=1.0, arch=75)


def test_tensors_on_the_cpu_are_named():
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        packed_attend.packed_attend(*empty_inputs(Shape(2)), scaling=1.0)


def test_the_cache_tells_tilings_apart():
    """Triton finds compiled kernels by what their constants print as."""
    one, other = (plan_of(*empty_inputs(Shape(2, window=window))).tiling for window in (128, 129))
    assert repr(one) != repr(other)
