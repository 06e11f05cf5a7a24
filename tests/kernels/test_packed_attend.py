"""Packed attention against its definition, on everything that a cache can look like."""

import hypothesis.strategies as st
import pytest
import torch
from cases import (
    LOG_SUM_EXP_TOLERANCE,
    OUTPUT_TOLERANCES,
    AttendCase,
    attend_cases,
    build_attend,
)
from concurrency import failures_of
from hypothesis import HealthCheck, given, settings

from kvlens.kernels import packed_attend as operation
from kvlens.kernels.native import jit, threads
from kvlens.kernels.packed_attend import cpu, reference

BOUNDED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(packed_attend, inputs):
    return packed_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)


def assert_close(got, expected) -> None:
    assert got.output.dtype == expected.output.dtype
    assert got.log_sum_exp.dtype == torch.float32
    tolerance = OUTPUT_TOLERANCES[got.output.dtype]
    torch.testing.assert_close(got.output, expected.output, **tolerance)
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **LOG_SUM_EXP_TOLERANCE)


@pytest.mark.parametrize("case", attend_cases(), ids=lambda case: case.name)
def test_agrees_with_the_reference(case, implementation):
    inputs = build_attend(case)
    assert_close(run(implementation("packed_attend"), inputs), run(reference.packed_attend, inputs))


@st.composite
def drawn_cases(draw) -> AttendCase:
    num_sinks = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, 500), min_size=1, max_size=3))
    packed = [[draw(st.integers(0, max(0, length - num_sinks))) for length in lengths] for _ in ("keys", "values")]
    num_kv_heads = draw(st.integers(1, 3))
    return AttendCase(
        name="drawn",
        lengths=tuple(lengths),
        num_keys=tuple(packed[0]),
        num_values=tuple(packed[1]),
        num_query_heads=num_kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([16, 64])),
        key_bits=draw(st.sampled_from([2, 4])),
        value_bits=draw(st.sampled_from([2, 4])),
        page_tokens=draw(st.sampled_from([32, 64])),
        value_group_size=16,
        num_sinks=num_sinks,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
    )


@given(case=drawn_cases(), seed=st.integers(0, 2**20))
@BOUNDED
def test_agrees_with_the_reference_on_any_batch(implementation, case, seed):
    inputs = build_attend(case, seed=seed)
    assert_close(run(implementation("packed_attend"), inputs), run(reference.packed_attend, inputs))


def test_empty_sequences_give_zeros(implementation):
    inputs = build_attend(AttendCase("empty", (0, 3, 0), (0, 0, 0), (0, 0, 0)))
    got = run(implementation("packed_attend"), inputs)
    assert bool((got.output[[0, 2]] == 0).all())
    assert bool((got.log_sum_exp[[0, 2]] == -torch.inf).all())


def test_one_token_gives_its_value(implementation):
    inputs = build_attend(AttendCase("one", (1,), (0,), (0,)))
    got = run(implementation("packed_attend"), inputs)
    value = inputs.exact.values[0, :, 0].repeat_interleave(2, dim=0)
    torch.testing.assert_close(got.output[0], value, atol=0, rtol=1e-6)


def test_query_and_window_may_differ_in_type(implementation):
    inputs = build_attend(AttendCase("mixed", (300,), (256,), (200,), num_sinks=4, dtype=torch.bfloat16))
    mixed = type(inputs)(inputs.query.float(), inputs.past, inputs.exact, inputs.scaling)
    assert_close(run(implementation("packed_attend"), mixed), run(reference.packed_attend, mixed))


def test_threads_and_splits_do_not_change_the_result(implementation, monkeypatch):
    """One thread, three threads, and no OpenMP runtime: the same up to the order of additions."""
    case = AttendCase("threads", (4000, 70), (3840, 64), (3800, 0), num_query_heads=6, head_dim=128)
    inputs = build_attend(case)
    packed_attend, expected = implementation("packed_attend"), run(reference.packed_attend, inputs)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_close(run(packed_attend, inputs), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(threads, "parallel_address", lambda: 0)
    assert threads.num_threads() == 1
    assert "one thread" in threads.limitation()
    assert_close(run(packed_attend, inputs), expected)


def test_torch_threads_are_used_here():
    assert threads.limitation() is None
    assert threads.num_threads() == torch.get_num_threads()


def test_after_warm_up_nothing_is_compiled():
    case = AttendCase("warm", (300,), (256,), (200,), num_query_heads=14, num_sinks=4, dtype=torch.bfloat16)
    inputs = build_attend(case)
    cpu.warm_up(
        inputs.past.layout,
        head_dim=case.head_dim,
        heads_per_group=7,
        query_dtype=torch.bfloat16,
        exact_dtype=torch.bfloat16,
    )
    known = len(jit.compiled())
    assert_close(run(cpu.packed_attend, inputs), run(reference.packed_attend, inputs))
    assert len(jit.compiled()) == known


def test_concurrent_calls_do_not_mix(implementation):
    packed_attend = implementation("packed_attend")
    case = AttendCase("concurrent", (1500, 900), (1408, 896), (1400, 800), head_dim=128)
    inputs = [build_attend(case, seed=seed) for seed in range(4)]
    expected = [run(reference.packed_attend, each) for each in inputs]
    assert not failures_of(lambda each, want: assert_close(run(packed_attend, each), want), inputs, expected)


def test_shapes_that_do_not_belong_together_are_named():
    inputs = build_attend(AttendCase("base", (40,), (0,), (0,)))
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        operation.packed_attend(inputs.query[:, :3], inputs.past, inputs.exact, scaling=1.0)
    with pytest.raises(ValueError, match=r"query must be \[B, HQ, D\]"):
        operation.packed_attend(inputs.query[0], inputs.past, inputs.exact, scaling=1.0)
