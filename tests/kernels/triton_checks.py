"""What the Triton kernels must do, wherever they run: in the interpreter or on a GPU.

Functions here are called by `test_triton_interpreted.py` and `test_gpu.py`, which pick the device.
"""

from dataclasses import replace
from itertools import product
from math import gcd

import torch
from append_checks import Step
from cases import (
    LOG_SUM_EXP_TOLERANCE,
    OUTPUT_TOLERANCES,
    AttendCase,
    AttendInputs,
    QuantizeCase,
    attend_cases,
    build_attend,
    build_values,
)
from dense_cases import DenseCase, build_dense
from sparse_cases import SparseCase, SparseInputs, build_sparse, sparse_cases

from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.append_pack import triton as append_triton
from kvlens.kernels.dense_attend import reference as dense_reference
from kvlens.kernels.dense_attend import triton as dense_triton
from kvlens.kernels.packed_attend import ExactTokens, PackedPast
from kvlens.kernels.packed_attend import reference as attend_reference
from kvlens.kernels.packed_attend import triton as attend_triton
from kvlens.kernels.quantize_pack import reference as quantize_reference
from kvlens.kernels.quantize_pack import triton as quantize_triton
from kvlens.kernels.sparse_attend import reference as sparse_reference
from kvlens.kernels.sparse_attend import triton as sparse_triton

# Half-precision queries meet the packed keys on the tensor cores: q * scale is rounded to fp16 there.
HALF_LOG_SUM_EXP_TOLERANCE = {"atol": 2e-3, "rtol": 1e-3}
LARGE_SCORES = ("outliers", "outliers_gqa", "scaling")


def triton_cases() -> list[AttendCase]:
    """The shared cases in fp16, the way that ships; in fp32 where scores are too large for half a word."""
    return [
        replace(case, dtype=torch.float16)
        if case.dtype == torch.float32 and case.name not in (*LARGE_SCORES, "ragged_sinks", "page32_group32_bits2")
        else case
        for case in attend_cases()
    ]


def shipped_cases() -> list[AttendCase]:
    """What KIVI's settings ask for, each on a ragged batch of grouped heads, half of them with sinks."""
    formats = product((64, 96, 128, 256), (32, 64, 128), (2, 4), (torch.float16, torch.bfloat16))
    return [
        AttendCase(
            f"dim{dim}_group{group}_bits{bits}_{str(dtype)[6:]}", (171, 3), (128, 0), (140, 0), num_query_heads=2,
            num_kv_heads=1, head_dim=dim, key_bits=bits, value_bits=bits, key_group_size=group,
            value_group_size=gcd(group, dim), num_sinks=4 * ((number + number // 2) % 2), dtype=dtype,
        )
        for number, (dim, group, bits, dtype) in enumerate(formats)
    ]  # fmt: skip


def check_attend(case: AttendCase, device: str) -> None:
    """`packed_attend` equals its reference, with every byte of its own memory NaN beforehand."""
    inputs = build_attend(case, device=device)
    compare_attend(inputs, case.dtype)


def compare_attend(inputs: AttendInputs, dtype: torch.dtype) -> None:
    expected = attend_reference.packed_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    got, launches = attend_triton.prepare(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    attend, merge = launches
    for name in ("part_output_ptr", "part_log_sum_exp_ptr"):
        attend.arguments[name].fill_(torch.nan)
    got.output.fill_(torch.nan)
    got.log_sum_exp.fill_(torch.nan)
    attend.run()
    merge.run()
    assert got.output.dtype == inputs.query.dtype
    assert got.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(got.output, expected.output, **OUTPUT_TOLERANCES[dtype])
    half = dtype in (torch.float16, torch.bfloat16)
    tolerance = HALF_LOG_SUM_EXP_TOLERANCE if half else LOG_SUM_EXP_TOLERANCE
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **tolerance)


def triton_sparse_cases() -> list[SparseCase]:
    """The shared cases in fp16, the way that ships; in fp32 where scores are large."""
    return [
        replace(case, dtype=torch.float16)
        if case.dtype == torch.float32 and case.name not in ("outliers", "scaling", "ragged_sinks")
        else case
        for case in sparse_cases()
    ]


def check_sparse(case: SparseCase, device: str) -> None:
    """`sparse_attend` equals its reference, with every byte of its own memory NaN beforehand."""
    compare_sparse(build_sparse(case, device=device))


def compare_sparse(inputs: SparseInputs) -> None:
    expected = sparse_reference.sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    got, launches = sparse_triton.prepare(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)
    for launch in launches:
        for name in ("table_ptr", "accumulators_ptr", "part_output_ptr", "part_log_sum_exp_ptr", "scores_ptr"):
            if name in launch.arguments:
                launch.arguments[name].fill_(torch.nan)
    got.output.fill_(torch.nan)
    got.log_sum_exp.fill_(torch.nan)
    for launch in launches:
        launch.run()
    dtype = inputs.query.dtype
    assert got.output.dtype == dtype
    assert got.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(got.output, expected.output, **OUTPUT_TOLERANCES[dtype])
    half = dtype in (torch.float16, torch.bfloat16)
    tolerance = HALF_LOG_SUM_EXP_TOLERANCE if half else LOG_SUM_EXP_TOLERANCE
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **tolerance)


def check_dense(case: DenseCase, device: str) -> None:
    """`dense_attend` equals its reference, with every byte of its own memory NaN beforehand."""
    inputs = build_dense(case, device=device)
    tensors = (inputs.query, inputs.keys, inputs.values, inputs.length)
    expected = dense_reference.dense_attend(*tensors, scaling=inputs.scaling)
    got, launches = dense_triton.prepare(*tensors, scaling=inputs.scaling)
    for launch in launches:
        launch.arguments["part_output_ptr"].fill_(torch.nan)
        launch.arguments["part_log_sum_exp_ptr"].fill_(torch.nan)
    got.output.fill_(torch.nan)
    got.log_sum_exp.fill_(torch.nan)
    for launch in launches:
        launch.run()
    assert got.output.dtype == case.dtype
    torch.testing.assert_close(got.output, expected, **OUTPUT_TOLERANCES[case.dtype])
    for row, length in enumerate(case.lengths):
        queries = inputs.query[row].float().unflatten(0, (case.num_kv_heads, -1))
        scores = inputs.scaling * queries @ inputs.keys[row, :, :length].float().transpose(-1, -2)
        log_sum_exp = scores.logsumexp(dim=-1).flatten()
        torch.testing.assert_close(got.log_sum_exp[row], log_sum_exp, **LOG_SUM_EXP_TOLERANCE)


def check_quantize(case: QuantizeCase, device: str) -> None:
    """`quantize_pack` gives the reference's codes, scales and minima to the bit."""
    values = build_values(case, device=device)
    expected = quantize_reference.quantize_pack(values, bits=case.bits, group_size=case.group_size)
    got, launches = quantize_triton.prepare(values, bits=case.bits, group_size=case.group_size)
    got.codes.fill_(0x5A5A)
    got.scale.fill_(torch.nan)
    got.minimum.fill_(torch.nan)
    for launch in launches:
        launch.run()
    for name in ("codes", "scale", "minimum"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0)


def append_step(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> Step:
    """The one launch of `append_pack`, prepared once for all steps."""
    (launch,) = append_triton.prepare(keys, values, exact, rule, past)
    return launch.run
