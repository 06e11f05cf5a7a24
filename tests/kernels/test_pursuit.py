"""The pursuits and the way back, on every implementation: each choice replayed in fp64."""

import itertools
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from pursuit_checks import MODES, PursuitCase, assert_pursued, build_pursuit, pursuit_cases
from sklearn.linear_model import orthogonal_mp_gram

from kvlens.kernels import pursuit
from kvlens.kernels.pursuit import PackedAtoms, SparseCodes, pack_atoms, pursue, reference, restore, unpack_atoms

BOUNDED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["reference", "cpu", "cpu-generic"], autouse=True)
def _implementation(request, monkeypatch):
    """Every test on every implementation; `cpu-generic` is the native one without AVX-512."""
    name, _, features = request.param.partition("-")
    monkeypatch.setenv("KVLENS_CPU_FEATURES", features or "auto")
    monkeypatch.setenv("KERNELS", name)


def energy(vectors: torch.Tensor, codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
    """The squared length of what the codes leave of each vector, in fp64."""
    left = vectors.double() - torch.einsum(
        "...sw,...s->...w", dictionary.double()[codes.indices.long()], codes.coefficients.double()
    )
    return left.square().sum(dim=-1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", pursuit_cases(), ids=lambda case: case.name)
def test_every_choice_is_the_best_and_every_fit_too(case, mode):
    vectors, dictionary = build_pursuit(case)
    codes = pursue(vectors, dictionary, sparsity=case.sparsity, **MODES[mode])
    assert_pursued(codes, vectors, dictionary, sparsity=case.sparsity, **MODES[mode])


@given(data=st.data())
@BOUNDED
def test_any_shape(data):
    mode = data.draw(st.sampled_from(list(MODES)))
    num_atoms = data.draw(st.integers(1, 150))
    most = 12 if mode == "plain" else min(12, num_atoms)
    case = PursuitCase(
        "drawn",
        num_atoms=num_atoms,
        width=data.draw(st.sampled_from([1, 8, 20, 32, 64])),
        sparsity=data.draw(st.integers(1, most)),
        leading=tuple(data.draw(st.lists(st.integers(0, 5), max_size=3))),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        atoms=data.draw(st.sampled_from(["random", "duplicates"])),
        strides=data.draw(st.sampled_from(["contiguous", "sliced"])),
    )
    vectors, dictionary = build_pursuit(case, seed=data.draw(st.integers(0, 2**20)))
    codes = pursue(vectors, dictionary, sparsity=case.sparsity, **MODES[mode])
    assert_pursued(codes, vectors, dictionary, sparsity=case.sparsity, **MODES[mode])


def test_equals_matching_pursuit_as_the_paper_writes_it():
    vectors, dictionary = build_pursuit(PursuitCase("usual", num_atoms=512, leading=(40,)))
    codes = pursue(vectors, dictionary, sparsity=8)
    for vector, indices, coefficients in zip(vectors.double(), codes.indices, codes.coefficients, strict=True):
        residual = vector.clone()
        for index, coefficient in zip(indices.tolist(), coefficients.tolist(), strict=True):
            products = dictionary.double() @ residual
            best = int(products.abs().argmax())
            assert index == best
            assert coefficient == pytest.approx(float(products[best]), abs=1e-5)
            residual -= products[best] * dictionary[best].double()


def test_orthogonal_pursuit_equals_scikit_learn():
    vectors, dictionary = build_pursuit(PursuitCase("usual", num_atoms=512, leading=(40,)))
    atoms = dictionary.double().numpy()
    expected = orthogonal_mp_gram(atoms @ atoms.T, atoms @ vectors.double().numpy().T, n_nonzero_coefs=8)
    codes = pursue(vectors, dictionary, sparsity=8, orthogonal=True)
    dense = np.zeros((len(vectors), len(atoms)))
    np.put_along_axis(dense, codes.indices.long().numpy(), codes.coefficients.double().numpy(), axis=1)
    np.testing.assert_allclose(dense, expected.T, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_energy_falls_with_every_atom(mode):
    vectors, dictionary = build_pursuit(PursuitCase("usual"))
    energies = [
        energy(vectors, pursue(vectors, dictionary, sparsity=sparsity, **MODES[mode]), dictionary)
        for sparsity in (1, 2, 4, 8, 16)
    ]
    for fewer, more in itertools.pairwise(energies):
        assert bool((more < fewer).all())


@pytest.mark.parametrize("spread", ["normal", "atoms", "zeros"])
def test_a_fit_is_never_worse_than_none(spread):
    vectors, dictionary = build_pursuit(PursuitCase("usual", spread=spread, atoms="duplicates"))
    plain, fitted = (
        energy(vectors, pursue(vectors, dictionary, sparsity=8, **flags), dictionary)
        for flags in (MODES["distinct"], MODES["refit"])
    )
    assert bool((fitted <= plain + 1e-9).all())


def test_of_equal_atoms_the_first_is_chosen():
    dictionary = torch.eye(32)[[3, 3, 5, 5, 3]]
    vector = torch.zeros(32)
    vector[3], vector[5] = 2, -2
    assert pursue(vector, dictionary, sparsity=2).indices.tolist() == [0, 2]
    codes = pursue(vector, dictionary, sparsity=5, refit=True)
    assert sorted(codes.indices.tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(restore(codes, dictionary), vector)


def test_zeros_have_no_coefficients():
    dictionary = build_pursuit(PursuitCase("usual"))[1]
    for flags in MODES.values():
        assert pursue(torch.zeros(3, 64), dictionary, sparsity=4, **flags).coefficients.tolist() == [[0.0] * 4] * 3


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_its_own(mode):
    case = PursuitCase("broken", spread="broken", num_atoms=70)
    broken, dictionary = build_pursuit(case)
    whole = broken.isfinite().all(dim=1)
    codes = pursue(broken, dictionary, sparsity=4, **MODES[mode])
    alone = pursue(torch.where(whole[:, None], broken, 0.0), dictionary, sparsity=4, **MODES[mode])
    assert torch.equal(codes.indices[whole], alone.indices[whole])
    torch.testing.assert_close(codes.coefficients[whole], alone.coefficients[whole])


def test_a_gram_matrix_given_changes_nothing():
    for num_atoms in (256, 203):
        vectors, dictionary = build_pursuit(PursuitCase("usual", num_atoms=num_atoms))
        own, given_one = (
            pursue(vectors, dictionary, sparsity=6, refit=True, gram=gram) for gram in (None, dictionary @ dictionary.T)
        )
        assert torch.equal(own.indices, given_one.indices)
        torch.testing.assert_close(own.coefficients, given_one.coefficients)


def test_a_dictionary_written_to_is_read_anew():
    vectors, dictionary = build_pursuit(PursuitCase("usual"))
    pursue(vectors, dictionary, sparsity=4)
    dictionary.copy_(dictionary.flip(0))
    assert_pursued(pursue(vectors, dictionary, sparsity=4), vectors, dictionary, sparsity=4)
    with torch.inference_mode():
        dictionary = dictionary.clone()
        for _ in range(2):
            dictionary.copy_(dictionary.flip(1))
            assert_pursued(pursue(vectors, dictionary, sparsity=4), vectors, dictionary, sparsity=4)


def test_concurrent_calls_do_not_mix():
    inputs = [build_pursuit(PursuitCase("usual", leading=(300,)), seed=seed) for seed in range(4)]
    expected = [pursue(*each, sparsity=4, refit=True).indices for each in inputs]
    are_equal = [False] * 4

    def work(index):
        are_equal[index] = all(
            torch.equal(pursue(*inputs[index], sparsity=4, refit=True).indices, expected[index]) for _ in range(5)
        )

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(are_equal)


@pytest.mark.parametrize("width", [1, 8, 20, 64, 128])
@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (700,)])
def test_restore(leading, width):
    dictionary = torch.randn(90, width)
    indices = torch.randint(90, (*leading, 5), dtype=torch.int16)
    codes = SparseCodes(indices, torch.randn(5, *leading).movedim(0, -1))
    expected = (dictionary.double()[indices.long()] * codes.coefficients.double().unsqueeze(-1)).sum(dim=-2)
    torch.testing.assert_close(restore(codes, dictionary), expected.float())


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


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_packing_errs_by_half_a_step(bits):
    codes = SparseCodes(torch.randint(1024, (50, 8), dtype=torch.int16), torch.randn(50, 8) * torch.rand(50, 1))
    packed = pack_atoms(codes, coefficient_bits=bits)
    assert packed.nbytes == 50 * (8 * 2 + 2)
    assert packed[3:5].words.shape == (2, 8)
    again = unpack_atoms(packed, coefficient_bits=bits)
    assert torch.equal(again.indices, codes.indices)
    step = codes.coefficients.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (again.coefficients - codes.coefficients).abs()
    assert bool((error <= step * (0.5 + 2**-10 * 2**bits)).all())


def test_packing_what_fp16_does_not_hold():
    indices = torch.zeros(4, 2, dtype=torch.int16)
    codes = SparseCodes(indices, torch.tensor([[0.0, 0], [1e9, -1], [1e-12, 0], [torch.nan, 1]]))
    packed = pack_atoms(codes)
    assert packed.scale[:3].tolist() == [0.0, 65504.0, 0.0]
    again = unpack_atoms(packed).coefficients
    assert again[:3].tolist() == [[0.0, 0.0], [65504.0, 0.0], [0.0, 0.0]]
    assert bool(again[3].isnan().all())


def test_packed_rows_restore():
    vectors, dictionary = build_pursuit(PursuitCase("usual", num_atoms=1024, sparsity=8))
    codes = pursue(vectors, dictionary, sparsity=8, refit=True)
    packed = pack_atoms(codes)
    apart = unpack_atoms(PackedAtoms(packed.words.clone(), packed.scale))
    lost = energy(vectors, apart, dictionary) - energy(vectors, codes, dictionary)
    assert float((lost / vectors.square().sum(dim=1)).max()) < 0.02
    torch.testing.assert_close(restore(apart, dictionary), reference.restore(apart, dictionary))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.zeros(3, 7)}, "vectors must have the atoms' 8 channels"),
        ({"vectors": torch.zeros(3, 8, dtype=torch.int32)}, "must be floating-point numbers"),
        ({"dictionary": torch.zeros(4, 8, dtype=torch.float16)}, "dictionary must be float32"),
        ({"dictionary": torch.zeros(0, 8)}, "1 to 32768 atoms"),
        ({"gram": torch.zeros(3, 4)}, "gram must be float32"),
        ({"sparsity": 0}, r"sparsity must lie in 1\.\.32; got 0"),
        ({"sparsity": 5, "refit": True}, "5 distinct atoms cannot be chosen from 4"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"vectors": torch.zeros(3, 8), "dictionary": torch.zeros(4, 8), "sparsity": 2, **change}
    with pytest.raises(ValueError, match=message):
        pursue(arguments.pop("vectors"), arguments.pop("dictionary"), **arguments)


def test_atoms_that_do_not_pack_are_named():
    codes = SparseCodes(torch.tensor([1024], dtype=torch.int16), torch.ones(1))
    with pytest.raises(ValueError, match="at most 1024 atoms; got index 1024"):
        pack_atoms(codes)
    with pytest.raises(ValueError, match="coefficient_bits must lie in"):
        pack_atoms(codes, coefficient_bits=7)
    with pytest.raises(ValueError, match="must have one shape"):
        pursuit.restore(SparseCodes(codes.indices, torch.ones(2)), torch.ones(4, 8))
