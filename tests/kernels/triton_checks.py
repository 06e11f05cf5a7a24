"""What the Triton kernels must do, wherever they run: in the interpreter or on a GPU.

Functions here are called by `test_triton_interpreted.py` and `test_gpu.py`, which pick the device.
"""

from dataclasses import replace

import torch
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
from hypothesis import strategies as st

from kvlens.kernels.packed_attend import reference as attend_reference
from kvlens.kernels.packed_attend import triton as attend_triton
from kvlens.kernels.quantize_pack import reference as quantize_reference
from kvlens.kernels.quantize_pack import triton as quantize_triton

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


@st.composite
def any_attend_case(draw) -> AttendCase:
    """Small batches of every layout: bits, groups, pages, heads, sinks, ragged lengths."""
    key_bits, value_bits = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    page_tokens = draw(st.sampled_from([32, 64, 96, 128]))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 128]))
    heads_per_kv = draw(st.sampled_from([1, 2, 3, 8, 9]))
    num_kv_heads = draw(st.sampled_from([1, 2]))
    num_sinks = draw(st.integers(0, 5))
    num_keys, num_values, lengths = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        keys, values = draw(st.integers(0, 200)), draw(st.integers(0, 200))
        num_keys.append(keys)
        num_values.append(values)
        is_packed = max(keys, values) > 0
        window = draw(st.integers(0, 40))
        lengths.append(num_sinks * is_packed + max(keys, values) + window)
    return AttendCase(
        name="any",
        lengths=tuple(lengths),
        num_keys=tuple(num_keys),
        num_values=tuple(num_values),
        num_query_heads=heads_per_kv * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        page_tokens=page_tokens,
        key_group_size=draw(st.sampled_from([group for group in (16, 32, 64) if page_tokens % group == 0])),
        value_group_size=draw(st.sampled_from([group for group in (8, 16, 32, 64) if head_dim % group == 0])),
        num_sinks=num_sinks,
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
    )
