"""The pursuits and the way back, on every implementation: each choice replayed in fp64."""

import importlib

import pytest
import torch
from pursuit_checks import MODES, assert_pursued, build_pursuit, pursuit_cases

from kvlens.kernels import pursuit
from kvlens.kernels.pursuit import SparseCodes, pack_atoms, unpack_atoms


@pytest.fixture(params=["reference", "cpu", "cpu-generic"])
def module(request, monkeypatch):
    """The module of one implementation; `cpu-generic` is the native one as a processor without AVX-512 runs it."""
    name, _, features = request.param.partition("-")
    monkeypatch.setenv("KVLENS_CPU_FEATURES", features or "auto")
    monkeypatch.setenv("KERNELS", name)
    return importlib.import_module(f"kvlens.kernels.pursuit.{name}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", pursuit_cases(), ids=lambda case: case.name)
def test_every_choice_is_the_best_and_every_fit_too(case, mode, module):
    if mode != "plain" and case.sparsity > case.num_atoms:
        pytest.skip("more distinct atoms than there are")
    vectors, dictionary = build_pursuit(case)
    codes = pursuit.pursue(vectors, dictionary, sparsity=case.sparsity, **MODES[mode])
    assert_pursued(codes, vectors, dictionary, sparsity=case.sparsity, **MODES[mode])


def test_words_by_hand():
    """The index in the low 10 bits, a signed code of 31 levels in the high 6."""
    codes = SparseCodes(
        torch.tensor([[0, 1023, 5, 7]], dtype=torch.int16), torch.tensor([[2.0, -2.0, 2.0 * 7 / 31, 0.0]])
    )
    packed = pack_atoms(codes)
    assert packed.scale.tolist() == [2.0]
    assert packed.words.tolist() == [[31 * 1024, -31 * 1024 + 1023, 7 * 1024 + 5, 7]]
    assert packed.words.dtype == torch.int16
    assert packed.words.nbytes * 8 == 16 * codes.indices.numel()
    again = unpack_atoms(packed)
    assert torch.equal(again.indices, codes.indices)
    torch.testing.assert_close(again.coefficients, codes.coefficients)
