"""The definition of the pursuits in plain fp32 torch.

Source: CSR (arXiv 2412.11741), equations 2 to 4: Matching Pursuit keeps a residual R, starting with the vector,
and s times takes the atom with the largest |<R, d>|, stores c = <R, d> and subtracts c d. Orthogonal Matching
Pursuit (Pati et al., 1993) makes the residual orthogonal to all atoms chosen so far instead.

Vectors are taken in chunks, so that the products with all atoms never fill more than a few megabytes.
"""

import torch

from kvlens.kernels.pursuit import SparseCodes

MIN_PIVOT = 1e-5  # squared distance of an atom from those before it below which a fit leaves it out
CHUNK_VALUES = 2**22


def pursue(
    vectors: torch.Tensor,
    dictionary: torch.Tensor,
    *,
    sparsity: int,
    gram: torch.Tensor | None,
    distinct: bool,
    refit: bool,
    orthogonal: bool,
) -> SparseCodes:
    """See `kvlens.kernels.pursuit.pursue`; `gram` is not used."""
    *leading, width = vectors.shape
    rows = vectors.reshape(-1, width)
    indices = torch.empty((len(rows), sparsity), dtype=torch.int64, device=rows.device)
    coefficients = torch.empty((len(rows), sparsity), dtype=torch.float32, device=rows.device)
    chunk_rows = max(1, CHUNK_VALUES // (len(dictionary) + sparsity * width))
    for start in range(0, len(rows), chunk_rows):
        here = slice(start, start + chunk_rows)
        _pursue_chunk(rows[here].float(), dictionary, indices[here], coefficients[here], distinct, refit, orthogonal)
    shape = (*leading, sparsity)
    return SparseCodes(indices.to(torch.int16).view(shape), coefficients.view(shape))


def restore(codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
    """See `kvlens.kernels.pursuit.restore`."""
    *leading, sparsity = codes.indices.shape
    width = dictionary.shape[1]
    indices, coefficients = codes.indices.reshape(-1, sparsity), codes.coefficients.reshape(-1, sparsity)
    vectors = torch.empty((len(indices), width), dtype=torch.float32, device=dictionary.device)
    chunk_rows = max(1, CHUNK_VALUES // (sparsity * width))
    for start in range(0, len(indices), chunk_rows):
        here = slice(start, start + chunk_rows)
        vectors[here] = _sum_of_atoms(dictionary[indices[here].long()], coefficients[here].float())
    return vectors.view(*leading, width)


def _pursue_chunk(rows, dictionary, indices, coefficients, distinct: bool, refit: bool, orthogonal: bool) -> None:
    """Fill in `indices` and `coefficients` `[rows, s]`."""
    residual = rows.clone()
    is_chosen = torch.zeros((len(rows), len(dictionary)), dtype=torch.bool, device=rows.device)
    for step in range(indices.shape[1]):
        products = residual @ dictionary.T
        strength = products.abs()
        if distinct:
            strength.masked_fill_(is_chosen, -1.0)
        index = strength.argmax(dim=-1, keepdim=True)
        is_chosen.scatter_(1, index, True)
        indices[:, step] = index.squeeze(1)
        coefficients[:, step] = products.gather(1, index).squeeze(1)
        if orthogonal:
            atoms = dictionary[indices[:, : step + 1]]
            coefficients[:, : step + 1] = least_squares(rows, atoms)
            residual = rows - _sum_of_atoms(atoms, coefficients[:, : step + 1])
        else:
            residual -= coefficients[:, step, None] * dictionary[indices[:, step]]
    if refit and not orthogonal:
        coefficients[:] = least_squares(rows, dictionary[indices])


def _sum_of_atoms(atoms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Shapes: `[rows, s, W]` and `[rows, s]` to `[rows, W]`."""
    return torch.einsum("rsw,rs->rw", atoms, coefficients)


def least_squares(rows: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """The coefficients c with the smallest ||x - sum_j c_j d_j||, by an LDL factorization of the atoms' products.

    An atom closer than MIN_PIVOT to the span of those before it gets 0: its row and column drop out.
    Shapes: rows `[rows, W]`, atoms `[rows, s, W]`, result `[rows, s]`.
    """
    gram = atoms @ atoms.mT
    products = torch.einsum("rsw,rw->rs", atoms, rows)
    lower = torch.zeros_like(gram)
    inverse, half_way, coefficients = (torch.zeros_like(products) for _ in range(3))
    num_atoms = atoms.shape[1]
    for j in range(num_atoms):
        row = gram[:, j, :j].clone()
        for k in range(1, j):
            row[:, k] -= (row[:, :k] * lower[:, k, :k]).sum(dim=-1)
        lower[:, j, :j] = row * inverse[:, :j]
        pivot = gram[:, j, j] - (row * lower[:, j, :j]).sum(dim=-1)
        inverse[:, j] = torch.where(pivot > MIN_PIVOT, 1 / pivot, 0.0)
        half_way[:, j] = products[:, j] - (lower[:, j, :j] * half_way[:, :j]).sum(dim=-1)
    for j in reversed(range(num_atoms)):
        known = (lower[:, j + 1 :, j] * coefficients[:, j + 1 :]).sum(dim=-1)
        coefficients[:, j] = half_way[:, j] * inverse[:, j] - known
    return coefficients
