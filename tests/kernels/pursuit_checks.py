"""What sparse codes must satisfy, whoever computed them, told in fp64; and the ugly cases they are told on.

Two atoms may be equally good within rounding, so codes are not compared with other codes: each choice is
replayed, and must be as good as the best one at that point. This module does not know which implementation is
tested.
"""

from dataclasses import dataclass

import torch

from kvlens.kernels.pursuit import SparseCodes
from kvlens.kernels.pursuit.reference import MIN_PIVOT

# How far from the best choice, and from the exact coefficients, relative to the vector's length
FP32_TOLERANCE = 2e-5
SMALLEST = 1e-30  # a vector shorter than this may lose digits
HALF_TOLERANCE = 2e-3  # of choices between products of fp16 numbers

MODES = {"plain": {}, "distinct": {"distinct": True}, "refit": {"refit": True}, "orthogonal": {"orthogonal": True}}


@dataclass(frozen=True)
class PursuitCase:
    """`spread` names how the vectors lie, `atoms` how the dictionary does."""

    name: str
    num_atoms: int = 256
    width: int = 64
    sparsity: int = 4
    leading: tuple[int, ...] = (37,)
    dtype: torch.dtype = torch.float32
    spread: str = "normal"  # normal, zeros, atoms, huge, tiny, subnormal, broken
    atoms: str = "random"  # random, duplicates, axes
    strides: str = "contiguous"  # contiguous, sliced, transposed


def pursuit_cases() -> list[PursuitCase]:
    return [
        PursuitCase("usual"),
        PursuitCase("odd_atoms", num_atoms=203),
        PursuitCase("fewer_atoms_than_lanes", num_atoms=5, sparsity=5, width=8),
        PursuitCase("one_atom", num_atoms=1, sparsity=1),
        PursuitCase("one_vector", leading=()),
        PursuitCase("no_vectors", leading=(0, 3)),
        PursuitCase("a_group_and_one", leading=(9,)),
        *(PursuitCase(f"width{width}", width=width, num_atoms=130, leading=(2, 11)) for width in (8, 20, 32, 96, 128)),
        PursuitCase("product", num_atoms=1024, sparsity=7, leading=(2, 3, 17)),
        PursuitCase("many_atoms_chosen", num_atoms=300, width=128, sparsity=32, leading=(11,)),
        PursuitCase("more_atoms_than_channels", num_atoms=24, width=8, sparsity=16),
        PursuitCase("no_gram", num_atoms=2100, width=24, sparsity=5, leading=(13,)),
        PursuitCase("zeros", spread="zeros"),
        PursuitCase("equal_to_atoms", spread="atoms"),
        PursuitCase("huge", spread="huge"),
        PursuitCase("tiny", spread="tiny"),
        PursuitCase("subnormal", spread="subnormal"),
        PursuitCase("duplicate_atoms", atoms="duplicates", sparsity=6),
        PursuitCase("axes", atoms="axes", num_atoms=16, width=16, sparsity=16),
        PursuitCase("broken", spread="broken", num_atoms=70),
        PursuitCase("fp16", dtype=torch.float16),
        PursuitCase("bf16", dtype=torch.bfloat16, width=20),
        PursuitCase("fp64", dtype=torch.float64),
        PursuitCase("sliced", strides="sliced", leading=(3, 5), dtype=torch.float16),
        PursuitCase("transposed", strides="transposed", leading=(3, 21)),
    ]


def build_pursuit(case: PursuitCase, *, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors `[*leading, W]` and a dictionary `[N, W]`."""
    random = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(case.num_atoms, case.width, generator=random)
    if case.atoms == "axes":
        dictionary = torch.eye(case.width)[: case.num_atoms]
    elif case.atoms == "duplicates":
        dictionary = dictionary[torch.arange(case.num_atoms) % -(-case.num_atoms // 2)]
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    vectors = torch.randn(*case.leading, case.width, generator=random)
    if case.spread == "zeros":
        vectors[..., ::2, :] = 0
    elif case.spread == "atoms":
        vectors = 3 * dictionary[torch.randint(case.num_atoms, case.leading, generator=random)]
    vectors = vectors * {"huge": 1e15, "tiny": 1e-15}.get(case.spread, 1.0)
    if case.spread == "subnormal":
        vectors[..., ::2, :] *= 1e-39
    elif case.spread == "broken":
        vectors[::3, 1], vectors[1::3, 2] = torch.nan, -torch.inf
    vectors = vectors.to(case.dtype).to(device)
    if case.strides == "sliced":
        vectors = torch.stack([vectors, torch.full_like(vectors, torch.nan)], dim=-2).flatten(-2)[..., : case.width]
    elif case.strides == "transposed":
        vectors = vectors.mT.contiguous().mT
    return vectors, dictionary.to(device)


def check_pursuit(case: PursuitCase, mode: str, device: str) -> None:
    """The Triton pursuit, and its way back, with every byte of their results poisoned beforehand."""
    from kvlens.kernels.pursuit import reference, triton

    vectors, dictionary = build_pursuit(case, device=device)
    flags = {"distinct": mode != "plain", "refit": mode == "refit", "orthogonal": mode == "orthogonal"}
    codes, launches = triton.prepare(vectors, dictionary, sparsity=case.sparsity, gram=None, **flags)
    codes.indices.fill_(0x5A5A)
    codes.coefficients.fill_(torch.nan)
    for launch in launches:
        launch.run()
    assert_pursued(
        codes, vectors, dictionary, sparsity=case.sparsity, choice_tolerance=HALF_TOLERANCE, **MODES[mode]
    )  # fmt: skip
    restored, launches = triton.prepare_restore(codes, dictionary)
    restored.fill_(torch.nan)
    for launch in launches:
        launch.run()
    torch.testing.assert_close(restored, reference.restore(codes, dictionary), equal_nan=True)


def assert_pursued(
    codes: SparseCodes,
    vectors: torch.Tensor,
    dictionary: torch.Tensor,
    *,
    sparsity: int,
    distinct: bool = False,
    refit: bool = False,
    orthogonal: bool = False,
    choice_tolerance: float = FP32_TOLERANCE,
) -> None:
    """Replay the choices: each is the best at its place, and the coefficients are what the mode says.

    Of a vector with a NaN or an Inf only that its indices exist, and its coefficients are not finite.
    """
    distinct = distinct or refit or orthogonal
    shape = (*vectors.shape[:-1], sparsity)
    assert (codes.indices.shape, codes.indices.dtype) == (shape, torch.int16)
    assert (codes.coefficients.shape, codes.coefficients.dtype) == (shape, torch.float32)
    rows = vectors.reshape(-1, vectors.shape[-1]).double()
    if not len(rows):
        return
    atoms = dictionary.double()
    indices = codes.indices.reshape(-1, sparsity).long()
    coefficients = codes.coefficients.reshape(-1, sparsity).double()
    assert int(indices.min()) >= 0
    assert int(indices.max()) < len(dictionary)
    is_finite = rows.isfinite().all(dim=1)
    assert not bool(coefficients[~is_finite].isfinite().all(dim=1).any())
    rows, indices, coefficients = rows[is_finite], indices[is_finite], coefficients[is_finite]
    if distinct:
        ordered = indices.sort(dim=1).values
        assert bool((ordered.diff(dim=1) > 0).all()), "an atom was chosen twice"
    length = rows.norm(dim=1, keepdim=True)
    residual, exact = rows.clone(), torch.zeros_like(coefficients)
    is_chosen = torch.zeros(len(rows), len(atoms), dtype=torch.bool, device=rows.device)
    for step in range(sparsity):
        products = residual @ atoms.T
        strength = products.abs().masked_fill(is_chosen & distinct, -1.0)
        index = indices[:, step : step + 1]
        shortfall = strength.amax(dim=1, keepdim=True) - strength.gather(1, index)
        worst = float((shortfall / length.clamp(min=SMALLEST)).max())
        assert worst <= choice_tolerance, f"choice {step} falls {worst:.1e} of the vector short of the best one"
        is_chosen.scatter_(1, index, True)
        if orthogonal:
            exact[:, : step + 1] = _fit(rows, atoms[indices[:, : step + 1]])
            residual = rows - _sum_of(atoms[indices[:, : step + 1]], exact[:, : step + 1])
        else:
            exact[:, step] = products.gather(1, index).squeeze(1)
            residual -= exact[:, step : step + 1] * atoms[indices[:, step]]
    if refit or orthogonal:
        # Coefficients of nearly dependent atoms are not unique; what they leave of the vector is.
        best = rows - _sum_of(atoms[indices], _fit(rows, atoms[indices]))
        left = rows - _sum_of(atoms[indices], coefficients)
        excess = left.square().sum(dim=1) - best.square().sum(dim=1)
        assert bool((excess <= 2e-5 * length.squeeze(1) ** 2).all()), f"a fit misses the best one by {excess.max()}"
    else:
        assert bool(((coefficients - exact).abs() <= FP32_TOLERANCE * length.clamp(min=SMALLEST)).all())


def _fit(rows: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Least squares `[rows, s]` by singular values; directions as thin as MIN_PIVOT are left out."""
    return (torch.linalg.pinv(atoms.mT, rtol=MIN_PIVOT) @ rows.unsqueeze(-1)).squeeze(-1)


def _sum_of(atoms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rsw,rs->rw", atoms, coefficients)
