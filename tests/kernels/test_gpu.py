"""The Triton kernels on a GPU: the cases of every implementation, and what only a device can show.

python -m pytest -m gpu tests/kernels
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from append_checks import AppendCase, append_cases, check_append
from cases import AttendCase, attend_cases, build_attend, quantize_cases
from dense_cases import DenseCase, build_dense, dense_cases
from pursuit_checks import (
    HALF_TOLERANCE,
    MODES,
    PursuitCase,
    assert_pursued,
    build_pursuit,
    check_pursuit,
    pursuit_cases,
)
from sparse_cases import SparseCase, build_sparse, sparse_cases
from triton_checks import (
    append_step,
    check_attend,
    check_dense,
    check_quantize,
    check_sparse,
    compare_attend,
    shipped_cases,
    triton_cases,
    triton_sparse_cases,
)

from kvlens.kernels.append_pack import append_pack
from kvlens.kernels.dense_attend import reference as dense_reference
from kvlens.kernels.dense_attend import triton as dense_triton
from kvlens.kernels.packed_attend import PackedPast, packed_attend, reference
from kvlens.kernels.pursuit import pursue
from kvlens.kernels.quantize_pack import Packed, quantize_pack
from kvlens.kernels.sparse_attend import reference as sparse_reference
from kvlens.kernels.sparse_attend import sparse_attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; none is visible to torch"),
]

LARGE = AttendCase(
    "large", (8000, 1, 5000, 129), (7936, 0, 4864, 0), (7868, 0, 4868, 1), num_query_heads=32, num_kv_heads=8,
    head_dim=128, num_sinks=0, dtype=torch.float16,
)  # fmt: skip


@pytest.mark.parametrize("case", triton_cases(), ids=lambda case: f"{case.name}-{str(case.dtype)[6:]}")
def test_packed_attend(case):
    check_attend(case, "cuda")


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in attend_cases() if case.dtype == torch.float32),
        *(replace(case, dtype=torch.bfloat16) for case in triton_cases() if case.dtype == torch.float16),
    ],
    ids=lambda case: f"{case.name}-{str(case.dtype)[6:]}",
)
def test_packed_attend_in_other_dtypes(case):
    check_attend(case, "cuda")


@pytest.mark.parametrize("case", shipped_cases()[::5], ids=lambda case: case.name)  # each compiles a kernel
def test_packed_attend_of_shipped_formats(case):
    check_attend(case, "cuda")


def test_packed_attend_of_any_layout():
    any_layout = pytest.importorskip("any_layout", reason="hypothesis is not installed")
    any_layout.check_any_layout("cuda", max_examples=60)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("num_kv_heads", [8, 32])
@pytest.mark.parametrize("num_sinks", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_attend_of_shipped_shapes(bits, num_kv_heads, num_sinks, dtype):
    check_attend(
        replace(LARGE, key_bits=bits, value_bits=bits, num_kv_heads=num_kv_heads, num_sinks=num_sinks, dtype=dtype),
        "cuda",
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("slot", range(16))
def test_every_slot_is_read_exactly(bits, slot):
    """Codes reach the tensor cores as fp16 subnormals: flushed to zero, or read one slot off, they fail here."""
    if slot >= 16 // bits:
        pytest.skip(f"a word of {bits}-bit codes has {16 // bits} slots")
    num_tokens = 128 * bits // 16 * (slot + 1)
    check_attend(
        AttendCase(
            "slot", (num_tokens,), (num_tokens,), (num_tokens,), head_dim=128, key_bits=bits, value_bits=bits,
            dtype=torch.float16,
        ),
        "cuda",
    )  # fmt: skip


@pytest.mark.parametrize("case", quantize_cases(), ids=lambda case: case.name)
def test_quantize_pack(case):
    check_quantize(case, "cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case",
    [
        *pursuit_cases(),
        PursuitCase("large", num_atoms=1024, width=128, sparsity=8, leading=(8, 1000), dtype=torch.bfloat16),
        PursuitCase("largest_distinct", num_atoms=4096, width=128, sparsity=8, leading=(8, 125)),
    ],
    ids=lambda case: case.name,
)
def test_pursuit(case, mode):
    check_pursuit(case, mode, "cuda")


def test_more_distinct_atoms_than_the_kernel_holds_take_the_reference():
    vectors, dictionary = build_pursuit(PursuitCase("larger", num_atoms=5000), device="cuda")
    codes = pursue(vectors, dictionary, sparsity=4, refit=True)
    assert_pursued(codes, vectors, dictionary, sparsity=4, refit=True, choice_tolerance=HALF_TOLERANCE)


def test_attention_does_not_wait_for_the_device():
    inputs = build_attend(LARGE, device="cuda")
    packed_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
        quantize_pack(inputs.exact.keys, bits=2, group_size=32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_in_a_cuda_graph_follows_the_lengths():
    inputs = build_attend(LARGE, device="cuda")
    past, exact = inputs.past, inputs.exact
    packed_attend(inputs.query, past, exact, scaling=inputs.scaling)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = packed_attend(inputs.query, past, exact, scaling=inputs.scaling)
    other = build_attend(
        replace(LARGE, lengths=(8000, 256, 4200, 0), num_keys=(7936, 128, 4096, 0), num_values=(7868, 140, 4080, 0)),
        device="cuda", seed=1,
    )  # fmt: skip
    for ours, theirs in [
        (inputs.query, other.query),
        *((getattr(past.keys, part), getattr(other.past.keys, part)) for part in ("codes", "scale", "minimum")),
        *((getattr(past.values, part), getattr(other.past.values, part)) for part in ("codes", "scale", "minimum")),
        *((getattr(past, part), getattr(other.past, part)) for part in ("page_table", "num_keys", "num_values")),
        (exact.length, other.exact.length),
    ]:
        ours.copy_(theirs)
    for ours, theirs, start in [
        (exact.keys, other.exact.keys, past.num_keys), (exact.values, other.exact.values, past.num_values)
    ]:  # fmt: skip
        for row in range(len(LARGE.lengths)):
            tokens = torch.arange(int(start[row]), int(exact.length[row]), device="cuda")
            ours[row][:, tokens % ours.shape[2]] = theirs[row][:, tokens % theirs.shape[2]]
    graph.replay()
    expected = reference.packed_attend(inputs.query, past, exact, scaling=inputs.scaling)
    torch.testing.assert_close(got.output, expected.output, atol=1e-3, rtol=1e-3)


def test_attention_gives_the_same_bits_twice():
    inputs = build_attend(LARGE, device="cuda")
    first, second = (packed_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.log_sum_exp, second.log_sum_exp)


def test_pages_beyond_two_to_the_31_words():
    inputs = build_attend(replace(LARGE, lengths=(700,), num_keys=(640,), num_values=(600,)), device="cuda")
    past = inputs.past
    num_pages = 2**31 // past.keys.codes[0].numel() + len(past.keys.codes)
    size = num_pages * (past.keys[0].nbytes + past.values[0].nbytes)
    if torch.cuda.mem_get_info()[0] < 1.2 * size:
        pytest.skip(f"needs {size / 2**30:.0f} GiB of free GPU memory")

    def moved_to_the_end(pages: Packed) -> Packed:
        parts = []
        for part in (pages.codes, pages.scale, pages.minimum):
            pool = torch.empty((num_pages, *part.shape[1:]), dtype=part.dtype, device="cuda")
            pool[-len(part) :] = part
            parts.append(pool)
        return Packed(*parts)

    table = past.page_table + (num_pages - len(past.keys.codes))
    table[:, -(-640 // past.layout.page_tokens) :] = past.page_table[:, -(-640 // past.layout.page_tokens) :]
    far = PackedPast(
        past.layout, moved_to_the_end(past.keys), moved_to_the_end(past.values), table, past.num_keys, past.num_values
    )
    expected = reference.packed_attend(inputs.query, past, inputs.exact, scaling=inputs.scaling)
    got = packed_attend(inputs.query, far, inputs.exact, scaling=inputs.scaling)
    torch.testing.assert_close(got.output, expected.output, atol=1e-3, rtol=1e-3)


def test_non_contiguous_query_and_rings():
    inputs = build_attend(replace(LARGE, strides="sliced", num_sinks=4), device="cuda")
    compare_attend(inputs, LARGE.dtype)


LARGE_DENSE = DenseCase("large", (8000, 0, 5000, 129), 8192, num_query_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    "case",
    [
        *dense_cases(),
        *(
            replace(LARGE_DENSE, num_kv_heads=heads, head_dim=dim, dtype=dtype)
            for heads in (2, 8, 32)
            for dim in (64, 96, 128, 256)
            for dtype in (torch.float16, torch.bfloat16)
        ),
        replace(LARGE_DENSE, name="large_sliced", strides="sliced"),
        DenseCase("many_sequences", tuple(range(0, 320, 2)), num_query_heads=32, num_kv_heads=32),
    ],
    ids=str,
)
def test_dense_attend(case):
    check_dense(case, "cuda")


def test_dense_attention_does_not_wait_and_follows_the_lengths_in_a_cuda_graph():
    inputs = build_dense(replace(LARGE_DENSE, lengths=(8192,) * 4), device="cuda")
    tensors = (inputs.query, inputs.keys, inputs.values, inputs.length)
    dense_triton.dense_attend(*tensors, scaling=inputs.scaling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dense_triton.dense_attend(*tensors, scaling=inputs.scaling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dense_triton.dense_attend(*tensors, scaling=inputs.scaling)
    for lengths in [(8192, 1, 0, 300), (17, 4097, 8191, 64)]:
        inputs.length.copy_(torch.tensor(lengths))
        graph.replay()
        expected = dense_reference.dense_attend(*tensors, scaling=inputs.scaling)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


LARGE_SPARSE = SparseCase(
    "large", (8000, 1, 5000, 129), (7868, 0, 4868, 1), num_query_heads=32, num_kv_heads=8, head_dim=128, key_atoms=8,
    num_key_atoms=1024, num_value_atoms=1024, page_tokens=128, dtype=torch.float16,
)  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *triton_sparse_cases(),
        *(replace(case, dtype=dtype) for case in sparse_cases() for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=lambda case: f"{case.name}-{str(case.dtype)[6:]}",
)
def test_sparse_attend(case):
    check_sparse(case, "cuda")


def test_sparse_attend_of_any_layout():
    any_layout = pytest.importorskip("any_layout", reason="hypothesis is not installed")
    any_layout.check_any_sparse_layout("cuda", max_examples=30)


@pytest.mark.parametrize("coefficient_bits", [6, 16])
@pytest.mark.parametrize("value_parts", [1, 2])
@pytest.mark.parametrize("num_kv_heads", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_attend_of_shipped_shapes(coefficient_bits, value_parts, num_kv_heads, dtype):
    case = replace(
        LARGE_SPARSE, coefficient_bits=coefficient_bits, value_parts=value_parts, value_atoms=8 // value_parts,
        num_kv_heads=num_kv_heads, num_sinks=0, dtype=dtype,
    )  # fmt: skip
    check_sparse(case, "cuda")


def test_sparse_attention_does_not_wait_and_runs_in_a_cuda_graph():
    inputs = build_sparse(LARGE_SPARSE, device="cuda")
    sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    inputs.query.copy_(inputs.query.flip(1))
    for _ in range(2):  # accumulators are cleared in every replay
        graph.replay()
    expected = sparse_reference.sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    torch.testing.assert_close(got.output, expected.output, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", append_cases(), ids=lambda case: case.name)
def test_append_pack(case):
    check_append(case, append_step, "cuda")


def test_append_pack_of_any_layout():
    any_append = pytest.importorskip("any_append", reason="hypothesis is not installed")
    any_append.check_any_append(append_step, max_examples=15, device="cuda")


@pytest.mark.parametrize("packs", [True, False])
def test_append_pack_in_a_cuda_graph_follows_the_lengths(packs):
    """Every step of a batch is the one graph; a capture also refuses whatever waits for the device."""

    def captured(*arguments):
        append_pack(*deepcopy(arguments))  # compiles; what it changes is a copy
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            append_pack(*arguments)
        return graph.replay

    case = AppendCase(
        "large", (0, 128, 256, 1000, 131, 259), num_steps=6, num_kv_heads=8, head_dim=128, page_tokens=128,
        residual=128, num_sinks=4, dtype=torch.bfloat16, packs=packs,
    )  # fmt: skip
    check_append(case, captured, "cuda")
