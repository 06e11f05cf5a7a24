"""Attention over sparse codes against its definition, on everything that a cache can look like."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from any_layout import any_sparse_case
from cases import LOG_SUM_EXP_TOLERANCE, OUTPUT_TOLERANCES
from concurrency import failures_of
from hypothesis import HealthCheck, given, settings
from sparse_cases import SparseCase, build_sparse, sparse_cases

from kvlens.kernels import sparse_attend as operation
from kvlens.kernels.native import jit, threads
from kvlens.kernels.sparse_attend import KeyTurn, SparseLayout, SparseSide, cpu, reference

BOUNDED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def run(sparse_attend, inputs):
    return sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)


def assert_close(got, expected) -> None:
    assert got.output.dtype == expected.output.dtype
    assert got.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(got.output, expected.output, **OUTPUT_TOLERANCES[got.output.dtype])
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **LOG_SUM_EXP_TOLERANCE)


def assert_close_for(case: SparseCase, got, expected) -> None:
    """As above; against the whole output where huge scores are rounded, or atoms of turned keys summed in fp16."""
    is_half = case.dtype != torch.float32
    if case.spread != "outliers" and not (case.turned_channels and is_half):
        assert_close(got, expected)
        return
    assert got.output.dtype == expected.output.dtype
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, atol=1e-3, rtol=1e-3 if is_half else 1e-5)
    difference = (got.output.float() - expected.output.float()).norm()
    rounding = 4e-3 if case.dtype == torch.bfloat16 else 2e-3 if is_half else 1e-4
    assert difference <= rounding * expected.output.float().norm()


@pytest.mark.parametrize("case", sparse_cases(), ids=lambda case: case.name)
def test_agrees_with_the_reference(case, implementation):
    inputs = build_sparse(case)
    assert_close_for(case, run(implementation("sparse_attend"), inputs), run(reference.sparse_attend, inputs))


@pytest.mark.parametrize("case", sparse_cases(), ids=lambda case: case.name)
def test_the_reference_restores_what_the_codes_stand_for(case):
    inputs = build_sparse(case)
    for row, count in enumerate(case.num_coded):
        sinks = min(case.num_sinks, case.lengths[row])
        for got, expected in zip(
            reference.rebuild(inputs.past, inputs.exact, row), (inputs.keys, inputs.values), strict=True
        ):
            assert got.shape[1] == case.lengths[row]
            assert bool(got.isfinite().all())
            torch.testing.assert_close(got[:, sinks : sinks + count], expected[row, :, :count], atol=1e-5, rtol=1e-5)


@given(case=any_sparse_case(), seed=st.integers(0, 2**20))
@BOUNDED
def test_agrees_with_the_reference_on_any_batch(implementation, case, seed):
    inputs = build_sparse(case, seed=seed)
    assert_close_for(case, run(implementation("sparse_attend"), inputs), run(reference.sparse_attend, inputs))


def test_empty_sequences_give_zeros(implementation):
    got = run(implementation("sparse_attend"), build_sparse(SparseCase("empty", (0, 3, 0), (0, 2, 0))))
    assert bool((got.output[[0, 2]] == 0).all())
    assert bool((got.log_sum_exp[[0, 2]] == -torch.inf).all())


def test_one_coded_token_gives_what_it_stands_for(implementation):
    inputs = build_sparse(SparseCase("one", (1,), (1,)))
    got = run(implementation("sparse_attend"), inputs)
    value = inputs.values[0, :, 0].repeat_interleave(2, dim=0)
    torch.testing.assert_close(got.output[0], value, atol=1e-6, rtol=1e-5)


def test_query_and_window_may_differ_in_type(implementation):
    inputs = build_sparse(SparseCase("mixed", (300,), (200,), num_sinks=4, dtype=torch.bfloat16))
    mixed = replace(inputs, query=inputs.query.float())
    assert_close(run(implementation("sparse_attend"), mixed), run(reference.sparse_attend, mixed))


def test_what_is_kept_serves_inside_and_outside_of_inference_mode(implementation):
    inputs = build_sparse(SparseCase("modes", (90,), (70,), num_query_heads=6, head_dim=48))
    with torch.inference_mode():
        inside = run(implementation("sparse_attend"), inputs)
    assert_close(run(implementation("sparse_attend"), inputs), inside)


def test_threads_and_splits_do_not_change_the_result(implementation, monkeypatch):
    """One thread, three threads, and no OpenMP runtime: the same up to the order of additions."""
    inputs = build_sparse(SparseCase("threads", (4000, 70), (3840, 0), num_query_heads=6, head_dim=128))
    sparse_attend, expected = implementation("sparse_attend"), run(reference.sparse_attend, inputs)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_close(run(sparse_attend, inputs), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(threads, "parallel_address", lambda: 0)
    assert_close(run(sparse_attend, inputs), expected)


def test_after_warm_up_nothing_is_compiled():
    case = SparseCase("warm", (300,), (200,), num_query_heads=14, num_sinks=4, dtype=torch.bfloat16)
    inputs = build_sparse(case)
    cpu.warm_up(
        inputs.past.layout, head_dim=case.head_dim, heads_per_group=7, query_dtype=torch.bfloat16,
        exact_dtype=torch.bfloat16,
    )  # fmt: skip
    known = len(jit.compiled())
    assert_close(run(cpu.sparse_attend, inputs), run(reference.sparse_attend, inputs))
    assert len(jit.compiled()) == known


def test_concurrent_calls_do_not_mix(implementation):
    sparse_attend = implementation("sparse_attend")
    case = SparseCase("concurrent", (1500, 900), (1408, 800), head_dim=128)
    inputs = [build_sparse(case, seed=seed) for seed in range(4)]
    expected = [run(reference.sparse_attend, each) for each in inputs]
    assert not failures_of(lambda each, want: assert_close(run(sparse_attend, each), want), inputs, expected)


def test_shapes_that_do_not_belong_together_are_named():
    inputs = build_sparse(SparseCase("base", (40,), (32,)))

    def attend(**changes):
        return operation.sparse_attend(inputs.query, replace(inputs.past, **changes), inputs.exact, scaling=1.0)

    with pytest.raises(ValueError, match="query heads must be a multiple"):
        operation.sparse_attend(inputs.query[:, :3], inputs.past, inputs.exact, scaling=1.0)
    layout, keys = inputs.past.layout, inputs.past.keys
    with pytest.raises(ValueError, match=r"past.keys.words must be \[\*, 2, 6, 64\]; got \[\d+, 2, 7, 64\]"):
        attend(layout=replace(layout, key_atoms=6))
    with pytest.raises(ValueError, match=r"past.keys.coefficients must be \[\*, 2, 7, 64\]"):
        attend(layout=replace(layout, coefficient_bits=16))
    with pytest.raises(ValueError, match="at most 1024 atoms where coefficients have 6 bits; got 1025"):
        attend(keys=SparseSide(keys.words, keys.coefficients, torch.zeros(1025, 64)))


def test_turns_and_means_that_do_not_belong_are_named():
    inputs = build_sparse(SparseCase("base", (40,), (32,), turned_channels=64, means=("keys", "values")))

    def attend(**changes):
        return operation.sparse_attend(inputs.query, replace(inputs.past, **changes), inputs.exact, scaling=1.0)

    with pytest.raises(ValueError, match=r"past\.keys\.means need past\.turn.*Code keys before RoPE"):
        attend(turn=None)
    with pytest.raises(ValueError, match=r"past\.turn must turn 2 to 64 channels, the head dim; got 66"):
        attend(turn=KeyTurn(torch.ones(33)))
    with pytest.raises(ValueError, match=r"past.values.means must be \[2, 64\]; got \[1, 64\]"):
        attend(values=replace(inputs.past.values, means=torch.zeros(1, 64)))


def test_a_turned_key_scores_by_its_distance_to_the_query(implementation):
    """What RoPE is for: one code at two places, met by a query turned as far each time, has one score."""
    scores = []
    for sinks in (0, 1000):
        inputs = build_sparse(SparseCase("one", (sinks + 1,), (1,), num_sinks=sinks, turned_channels=64))
        query = reference.turned(torch.ones(1, 4, 1, 64), inputs.past.turn, first=sinks).squeeze(2)
        # Sinks opposite to the query: no probability is left for them.
        away = -1e4 * query.view(1, 2, 2, 64).mean(dim=2, keepdim=True)
        exact = replace(inputs.exact, sink_keys=away.expand_as(inputs.exact.sink_keys))
        got = implementation("sparse_attend")(query, inputs.past, exact, scaling=0.1)
        scores.append((got.log_sum_exp, inputs.past.keys))
    torch.testing.assert_close(scores[0][0], scores[1][0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"value_parts": 3}, "value_parts must be 1 or 2; got 3"),
        ({"coefficient_bits": 8}, r"coefficient_bits must be 6 \(packed\) or 16"),
        ({"key_atoms": 0}, "key_atoms must be at least 1; got 0"),
    ],
)
def test_layouts_that_no_page_has_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        SparseLayout(**({"page_tokens": 64, "key_atoms": 8, "value_atoms": 8} | wrong))
