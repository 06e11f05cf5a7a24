"""The pursuits in Triton: a program keeps the residuals of a tile of vectors on the chip through all iterations.

An iteration multiplies the residuals, scaled to at most 1 and rounded to fp16, with tiles of the fp16 dictionary on
the tensor cores, and keeps a running maximum of |<R, d>| for each column of a tile, with the tile's number in the
bits that fp16 makes meaningless; only at its end do threads compare. The coefficient is then a product in fp32 of
the residual and the fp32 atom, so rounding decides between atoms that are equally good within 2^-10 of the
vector and changes nothing else. A second launch fits: a few systems a program, in registers.

Arithmetic of a vector: 2 N W s operations. Llama-3-8B has 512 vectors a token; at N = 1024, W = 128, s = 8 that
is 1.07 GFLOP, 6.7 % of the 16 GFLOP that a token of prefill takes. The search costs 2 to 4 instructions a
product, 4.2 M products a token: at 29.6 T a second of an H200 0.4 us, next to 32 us of prefill at half of the peak.
A tile of 128 vectors reads the dictionary, 256 KiB, once an iteration: 8 MiB a token from the second-level cache,
some 2 us at 5 TB/s, under the products. Together about a tenth of the prefill.

Limits: distinct atoms need a dictionary of at most 4096; larger ones take the reference.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels import dispatch
from kvlens.kernels.compiled import Launch, arch_of
from kvlens.kernels.pursuit import SparseCodes, reference
from kvlens.kernels.pursuit.reference import MIN_PIVOT

BLOCK_VECTORS = 128
BLOCK_ATOMS = 64
LARGEST_DISTINCT = 2 * 32 * BLOCK_ATOMS  # a bit for each tile in each column, in two words
FIT_VALUES = 2048
RESTORE_VALUES = 4096


@triton.jit
def _pursue_kernel(
    vectors_ptr, stride_vector, stride_channel, dictionary_ptr, half_dictionary_ptr, basis_ptr,
    indices_ptr, coefficients_ptr, num_vectors, NUM_ATOMS: tl.constexpr, WIDTH: tl.constexpr, SPARSITY: tl.constexpr,
    DISTINCT: tl.constexpr, ORTHOGONAL: tl.constexpr, MIN_PIVOT: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Coefficients are <R, d>, or <x, d> if ORTHOGONAL. basis: fp32 `[num_vectors, s, W]`, if ORTHOGONAL."""
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_w = tl.arange(0, BLOCK_W)
    offs_n = tl.arange(0, BLOCK_N)
    mask_v = vectors < num_vectors
    mask = mask_v[:, None] & (offs_w < WIDTH)[None, :]
    vectors_ptrs = vectors_ptr + vectors[:, None] * stride_vector + offs_w[None, :].to(tl.int64) * stride_channel
    residual = tl.load(vectors_ptrs, mask=mask, other=0.0).to(tl.float32)
    low_tiles = tl.zeros((BLOCK_V, BLOCK_N), tl.int32)  # bit t: atom t * BLOCK_N + n is chosen already
    high_tiles = tl.zeros((BLOCK_V, BLOCK_N), tl.int32)
    one = tl.full((1, 1), 1, tl.int32)
    TILE_MASK: tl.constexpr = triton.next_power_of_2((NUM_ATOMS + BLOCK_N - 1) // BLOCK_N) - 1
    for step in range(SPARSITY):
        largest = tl.max(tl.abs(residual), axis=1)
        factor = tl.where(largest > 1e-37, 1.0 / largest, 0.0)  # of less, the reciprocal is infinite
        scaled = (residual * factor[:, None]).to(tl.float16)
        best = tl.full((BLOCK_V, BLOCK_N), -1, tl.int32)  # |<R, d>| with its lowest bits replaced by the tile's
        for tile in range(tl.cdiv(NUM_ATOMS, BLOCK_N)):
            atoms = tile * BLOCK_N + offs_n
            mask_atoms = (offs_w < WIDTH)[:, None] & (atoms < NUM_ATOMS)[None, :]
            atoms_ptrs = half_dictionary_ptr + atoms[None, :] * WIDTH + offs_w[:, None]
            product = tl.dot(scaled, tl.load(atoms_ptrs, mask=mask_atoms, other=0.0))
            key = (product.to(tl.int32, bitcast=True) & (0x7FFFFFFF - TILE_MASK)) | (TILE_MASK - tile)
            if DISTINCT:
                tiles = low_tiles
                if NUM_ATOMS > 32 * BLOCK_N:
                    tiles = tl.where(tile < 32, low_tiles, high_tiles)
                key = tl.where((tiles & (one << (tile % 32))) == 0, key, -1)
            best = tl.maximum(best, key)
        highest = tl.max(best, axis=1)
        column = tl.min(tl.where(best == highest[:, None], offs_n[None, :], BLOCK_N - 1), axis=1)
        index = (TILE_MASK - (highest & TILE_MASK)) * BLOCK_N + column
        if DISTINCT:
            tile = index // BLOCK_N
            bit = tl.where(offs_n[None, :] == (index % BLOCK_N)[:, None], one << (tile % 32)[:, None], 0)
            low_tiles = low_tiles | tl.where((tile < 32)[:, None], bit, 0)
            if NUM_ATOMS > 32 * BLOCK_N:
                high_tiles = high_tiles | tl.where((tile < 32)[:, None], 0, bit)
        atom = tl.load(dictionary_ptr + index[:, None] * WIDTH + offs_w[None, :], mask=mask, other=0.0)
        product = tl.sum(residual * atom, axis=1)
        stored = product
        if ORTHOGONAL:
            stored = tl.sum(tl.load(vectors_ptrs, mask=mask, other=0.0).to(tl.float32) * atom, axis=1)
        tl.store(indices_ptr + vectors * SPARSITY + step, index.to(tl.int16), mask=mask_v)
        tl.store(coefficients_ptr + vectors * SPARSITY + step, stored, mask=mask_v)
        if ORTHOGONAL:
            # What the atom adds to those before it, at length 1, takes the atom's place
            basis_ptrs = basis_ptr + vectors[:, None] * (SPARSITY * WIDTH) + offs_w[None, :]
            for j in range(step):
                other = tl.load(basis_ptrs + j * WIDTH, mask=mask, other=0.0)
                atom -= tl.sum(atom * other, axis=1)[:, None] * other
            square = tl.sum(atom * atom, axis=1)
            atom *= tl.where(square > MIN_PIVOT, tl.rsqrt(square), 0.0)[:, None]
            product = tl.sum(residual * atom, axis=1)
            tl.store(basis_ptrs + step * WIDTH, atom, mask=mask)
            tl.debug_barrier()  # other threads of this program may read them next
        residual -= product[:, None] * atom


@triton.jit
def _fit_kernel(
    indices_ptr, coefficients_ptr, gram_ptr, num_vectors, NUM_ATOMS: tl.constexpr, SPARSITY: tl.constexpr,
    ORTHOGONAL: tl.constexpr, MIN_PIVOT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Coefficients as the pursuit left them become those of least squares, by Gauss-Jordan elimination.

    Its pivots are those of the reference's factorization, so the same atoms drop out.
    """
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_s = tl.arange(0, BLOCK_S)
    mask = (vectors < num_vectors)[:, None] & (offs_s < SPARSITY)[None, :]
    offs = vectors[:, None] * SPARSITY + offs_s[None, :]
    index = tl.load(indices_ptr + offs, mask=mask, other=0).to(tl.int64)
    right = tl.load(coefficients_ptr + offs, mask=mask, other=0.0)
    entries_ptrs = gram_ptr + index[:, :, None] * NUM_ATOMS + index[:, None, :]
    matrix = tl.load(entries_ptrs, mask=mask[:, :, None] & mask[:, None, :], other=0.0)
    if not ORTHOGONAL:  # <x, d_k> = <R, d_k> + sum_{j < k} c_j <d_j, d_k>
        is_before = (offs_s[:, None] < offs_s[None, :])[None, :, :]
        right += tl.sum(tl.where(is_before, matrix * right[:, :, None], 0.0), axis=1)
    inverse = tl.zeros((BLOCK_V, BLOCK_S), tl.float32)
    for j in range(SPARSITY):
        is_j = offs_s == j
        row = tl.sum(tl.where(is_j[None, :, None], matrix, 0.0), axis=1)
        column = tl.sum(tl.where(is_j[None, None, :], matrix, 0.0), axis=2)
        pivot = tl.sum(tl.where(is_j[None, :], row, 0.0), axis=1)
        reciprocal = tl.where(pivot > MIN_PIVOT, 1.0 / pivot, 0.0)[:, None]
        factor = tl.where(is_j[None, :], 0.0, column * reciprocal)
        matrix -= factor[:, :, None] * row[:, None, :]
        right -= factor * tl.sum(tl.where(is_j[None, :], right, 0.0), axis=1)[:, None]
        inverse = tl.where(is_j[None, :], reciprocal, inverse)
    tl.store(coefficients_ptr + offs, right * inverse, mask=mask)


@triton.jit
def _restore_kernel(
    indices_ptr, coefficients_ptr, dictionary_ptr, vectors_ptr, num_vectors, WIDTH: tl.constexpr,
    SPARSITY: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    vectors = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_w = tl.arange(0, BLOCK_W)
    mask_v = vectors < num_vectors
    mask = mask_v[:, None] & (offs_w < WIDTH)[None, :]
    total = tl.zeros((BLOCK_V, BLOCK_W), tl.float32)
    for j in range(SPARSITY):
        index = tl.load(indices_ptr + vectors * SPARSITY + j, mask=mask_v, other=0).to(tl.int32)
        coefficient = tl.load(coefficients_ptr + vectors * SPARSITY + j, mask=mask_v, other=0.0)
        atom = tl.load(dictionary_ptr + index[:, None] * WIDTH + offs_w[None, :], mask=mask, other=0.0)
        total += coefficient[:, None] * atom
    tl.store(vectors_ptr + vectors[:, None] * WIDTH + offs_w[None, :], total, mask=mask)


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
    """See `kvlens.kernels.pursuit.pursue`."""
    mode = {"gram": gram, "distinct": distinct, "refit": refit, "orthogonal": orthogonal}
    if distinct and len(dictionary) > LARGEST_DISTINCT:
        dispatch.note_fallback("pursuit", f"its kernel holds distinct atoms of at most {LARGEST_DISTINCT}")
        return reference.pursue(vectors, dictionary, sparsity=sparsity, **mode)
    codes, launches = prepare(vectors, dictionary, sparsity=sparsity, **mode)
    for launch in launches:
        launch.run()
    return codes


def prepare(
    vectors: torch.Tensor,
    dictionary: torch.Tensor,
    *,
    sparsity: int,
    gram: torch.Tensor | None,
    distinct: bool,
    refit: bool,
    orthogonal: bool,
    arch: int | None = None,
) -> tuple[SparseCodes, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (on `arch`, if not this GPU)."""
    *leading, width = vectors.shape
    codes = SparseCodes(
        vectors.new_empty((*leading, sparsity), dtype=torch.int16),
        vectors.new_empty((*leading, sparsity), dtype=torch.float32),
    )
    if not codes.indices.numel():
        return codes, ()
    rows = vectors.reshape(-1, width)
    dictionary = dictionary.contiguous()
    shape = {"num_vectors": len(rows), "NUM_ATOMS": len(dictionary), "SPARSITY": sparsity, "MIN_PIVOT": MIN_PIVOT}
    has_two_words = distinct and len(dictionary) > 32 * BLOCK_ATOMS
    is_crowded = orthogonal or has_two_words or (arch or arch_of(rows.device)) >= 120
    block_v = BLOCK_VECTORS // 2 if is_crowded else BLOCK_VECTORS  # what registers hold
    pursuing = {
        "vectors_ptr": rows,
        "stride_vector": rows.stride(0),
        "stride_channel": rows.stride(1),
        "dictionary_ptr": dictionary,
        "half_dictionary_ptr": dictionary.half(),
        "basis_ptr": rows.new_empty((len(rows), sparsity, width), dtype=torch.float32) if orthogonal else None,
        "indices_ptr": codes.indices,
        "coefficients_ptr": codes.coefficients,
        **shape,
        "WIDTH": width,
        "DISTINCT": distinct,
        "ORTHOGONAL": orthogonal,
        "BLOCK_V": block_v,
        "BLOCK_N": BLOCK_ATOMS,
        "BLOCK_W": max(16, triton.next_power_of_2(width)),
        "num_warps": 8,
        "num_stages": 3,
    }
    launches = (Launch(_pursue_kernel, (triton.cdiv(len(rows), block_v),), pursuing),)
    if refit or orthogonal:
        gram = dictionary @ dictionary.T if gram is None else gram.contiguous()
        block_s = triton.next_power_of_2(sparsity)
        block_v = FIT_VALUES // block_s**2
        fitting = {
            "indices_ptr": codes.indices,
            "coefficients_ptr": codes.coefficients,
            "gram_ptr": gram,
            "ORTHOGONAL": orthogonal,
            **shape,
            "BLOCK_V": block_v,
            "BLOCK_S": block_s,
            "num_warps": 4,
        }
        launches += (Launch(_fit_kernel, (triton.cdiv(len(rows), block_v),), fitting),)
    return codes, launches


def restore(codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
    """See `kvlens.kernels.pursuit.restore`."""
    vectors, launches = prepare_restore(codes, dictionary)
    for launch in launches:
        launch.run()
    return vectors


def prepare_restore(codes: SparseCodes, dictionary: torch.Tensor) -> tuple[torch.Tensor, tuple[Launch, ...]]:
    """The vectors, still empty, and the launch that fills them (none for no vectors)."""
    *leading, sparsity = codes.indices.shape
    width = dictionary.shape[1]
    vectors = dictionary.new_empty((*leading, width))
    if not vectors.numel():
        return vectors, ()
    num_vectors, block_w = vectors.numel() // width, triton.next_power_of_2(width)
    block_v = max(1, RESTORE_VALUES // block_w)
    arguments = {
        "indices_ptr": codes.indices.contiguous(),
        "coefficients_ptr": codes.coefficients.float().contiguous(),
        "dictionary_ptr": dictionary.contiguous(),
        "vectors_ptr": vectors,
        "num_vectors": num_vectors,
        "WIDTH": width,
        "SPARSITY": sparsity,
        "BLOCK_V": block_v,
        "BLOCK_W": block_w,
        "num_warps": 4,
    }
    return vectors, (Launch(_restore_kernel, (triton.cdiv(num_vectors, block_v),), arguments),)
