"""Attention over sparse codes against its definition, on everything that a cache can look like."""

from dataclasses import replace

import pytest
import torch
from cases import LOG_SUM_EXP_TOLERANCE, OUTPUT_TOLERANCES
from sparse_cases import SparseCase, build_sparse, sparse_cases

from kvlens.kernels import sparse_attend as operation
from kvlens.kernels.sparse_attend import SparseLayout, SparseSide, reference


def run(sparse_attend, inputs):
    return sparse_attend(inputs.query, inputs.past, inputs.exact, scaling=inputs.scaling)


def assert_close(got, expected) -> None:
    assert got.output.dtype == expected.output.dtype
    assert got.log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(got.output, expected.output, **OUTPUT_TOLERANCES[got.output.dtype])
    torch.testing.assert_close(got.log_sum_exp, expected.log_sum_exp, **LOG_SUM_EXP_TOLERANCE)


@pytest.mark.parametrize("case", sparse_cases(), ids=lambda case: case.name)
def test_agrees_with_the_reference(case, implementation):
    inputs = build_sparse(case)
    assert_close(run(implementation("sparse_attend"), inputs), run(reference.sparse_attend, inputs))


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
