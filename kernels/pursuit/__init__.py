"""Sparse codes of vectors over a dictionary: Matching Pursuit, its refinements, and the way back.

A vector is written as a sum of a few atoms, `x ~ sum_j c_j d_{i_j}`, with s pairs (index, coefficient). Atoms
are the unit-norm rows of a dictionary. Which atoms a model's keys and values need is learned elsewhere.

Layout of `PackedAtoms.words`: 16 bits an atom, the index in the low 10 bits, a signed code in the high 6, so
that word = code * 1024 + index. A coefficient is `scale * code / 31`, with one fp16 scale a vector.

Source: CSR (arXiv 2412.11741), equations 1 to 4. Departure: an atom chosen twice is stored as two pairs, where
the paper's text would overwrite the first coefficient.
"""

from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch

MAX_ATOMS = 2**15  # an index fills an int16
MAX_SPARSITY = 32
INDEX_BITS = 10
COEFFICIENT_BITS = 6
LARGEST_SCALE = 65504.0  # of fp16


@dataclass(frozen=True)
class SparseCodes:
    """Atoms in the order chosen. Shapes: indices int16 `[..., s]`, coefficients fp32 `[..., s]`."""

    indices: torch.Tensor
    coefficients: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.coefficients.nbytes

    def __getitem__(self, index) -> "SparseCodes":
        return SparseCodes(self.indices[index], self.coefficients[index])


@dataclass(frozen=True)
class PackedAtoms:
    """Atoms of 16 bits. Shapes: words int16 `[..., s]` (layout above), scale fp16 `[...]`."""

    words: torch.Tensor
    scale: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes

    def __getitem__(self, index) -> "PackedAtoms":
        return PackedAtoms(self.words[index], self.scale[index])


def pursue(
    vectors: torch.Tensor,
    dictionary: torch.Tensor,
    *,
    sparsity: int,
    gram: torch.Tensor | None = None,
    distinct: bool = False,
    refit: bool = False,
    orthogonal: bool = False,
) -> SparseCodes:
    """`vectors` as `sparsity` atoms each: i = argmax |<R, d_i>|, c = <R, d_i>, R -= c d_i, starting with R = x.

    `distinct` never chooses an atom twice; `refit` (distinct too) fits all coefficients once more by least
    squares at the end; `orthogonal` (Orthogonal Matching Pursuit) fits them after every choice. An atom that
    adds nothing to those before it gets the coefficient 0 in a fit.

    Shapes: vectors `[..., W]`, any float dtype, any strides; dictionary fp32 `[N, W]`, unit rows; gram fp32
    `[N, N]`, the rows' products, computed where it is needed and None.
    Limits: of equal atoms the first is chosen, within rounding. A vector with a NaN or an Inf gives coefficients
    that are not finite, and indices within the dictionary.
    Raises: ValueError where shapes, dtypes, devices or `sparsity` do not fit.
    """
    distinct = distinct or refit or orthogonal
    _check(vectors, dictionary, sparsity, gram, distinct)
    module = dispatch.implementation("pursuit", vectors.device)
    return module.pursue(
        vectors, dictionary, sparsity=sparsity, gram=gram, distinct=distinct, refit=refit, orthogonal=orthogonal
    )


def restore(codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
    """The vectors that `codes` stand for. Shapes: fp32 `[..., W]`; an index must lie within the dictionary."""
    _check_dictionary(dictionary)
    if codes.indices.shape != codes.coefficients.shape:
        shapes = f"{list(codes.indices.shape)} and {list(codes.coefficients.shape)}"
        raise ValueError(f"indices and coefficients must have one shape; got {shapes}")
    module = dispatch.implementation("pursuit", dictionary.device)
    return module.restore(codes, dictionary)


def pack_atoms(codes: SparseCodes, *, coefficient_bits: int = COEFFICIENT_BITS) -> PackedAtoms:
    """`codes` in 16 bits an atom; fewer `coefficient_bits` use fewer codes, not fewer bits of memory.

    The scale is the largest |coefficient|, rounded to fp16; a vector of zeros has scale 0 and codes 0.
    Raises: ValueError for `coefficient_bits` out of 2..6, or (on the CPU, where looking is cheap) for an index
    that 10 bits do not hold.
    """
    levels = _levels(coefficient_bits)
    indices, coefficients = codes.indices, codes.coefficients.float()
    if indices.device.type == "cpu" and indices.numel() and int(indices.max()) >= 2**INDEX_BITS:
        raise ValueError(
            f"packed atoms need a dictionary of at most {2**INDEX_BITS} atoms; got index {int(indices.max())}"
        )
    scale = coefficients.abs().amax(dim=-1).clamp(max=LARGEST_SCALE).half()
    step = scale.float().unsqueeze(-1) / levels
    steps = coefficients.div(step).nan_to_num_(0.0).clamp_(-levels, levels).round_().masked_fill_(step == 0, 0.0)
    # The largest word, 31 * 1024 + 1023, is the largest int16.
    return PackedAtoms(steps.to(torch.int16).mul_(2**INDEX_BITS).add_(indices), scale)


def unpack_atoms(packed: PackedAtoms, *, coefficient_bits: int = COEFFICIENT_BITS) -> SparseCodes:
    """The indices and coefficients in packed words; `coefficient_bits` as they were packed with."""
    indices = packed.words & (2**INDEX_BITS - 1)
    steps = (packed.words >> INDEX_BITS).float()  # an arithmetic shift: the code keeps its sign
    return SparseCodes(indices, packed.scale.float().unsqueeze(-1) * steps / _levels(coefficient_bits))


def _levels(coefficient_bits: int) -> int:
    """The largest code; the codes are -levels..levels."""
    if not 2 <= coefficient_bits <= COEFFICIENT_BITS:
        raise ValueError(f"coefficient_bits must lie in 2..{COEFFICIENT_BITS}; got {coefficient_bits}")
    return 2 ** (coefficient_bits - 1) - 1


def _check(vectors, dictionary, sparsity: int, gram, distinct: bool) -> None:
    _check_dictionary(dictionary)
    num_atoms, width = dictionary.shape
    if vectors.ndim == 0 or vectors.shape[-1] != width:
        raise ValueError(f"vectors must have the atoms' {width} channels; got shape {list(vectors.shape)}")
    if not vectors.is_floating_point():
        raise ValueError(f"vectors must be floating-point numbers; got {vectors.dtype}")
    if not 1 <= sparsity <= MAX_SPARSITY:
        raise ValueError(f"sparsity must lie in 1..{MAX_SPARSITY}; got {sparsity}")
    if distinct and sparsity > num_atoms:
        raise ValueError(f"{sparsity} distinct atoms cannot be chosen from {num_atoms}; lower sparsity")
    if gram is not None and (gram.shape != (num_atoms, num_atoms) or gram.dtype != torch.float32):
        raise ValueError(f"gram must be float32 [{num_atoms}, {num_atoms}]; got {gram.dtype} {list(gram.shape)}")
    for name, tensor in (("dictionary", dictionary), ("gram", gram)):
        if tensor is not None and tensor.device != vectors.device:
            raise ValueError(f"{name} must lie on the vectors' device {vectors.device}; got {tensor.device}")


def _check_dictionary(dictionary: torch.Tensor) -> None:
    if dictionary.ndim != 2 or dictionary.dtype != torch.float32:
        raise ValueError(f"dictionary must be float32 [N, W]; got {dictionary.dtype} {list(dictionary.shape)}")
    if not 1 <= len(dictionary) <= MAX_ATOMS:
        raise ValueError(f"dictionary must have 1 to {MAX_ATOMS} atoms, as int16 can count; got {len(dictionary)}")
