"""The pursuits on the CPU, eight vectors side by side.

A vector's products with all N atoms are summed in registers and stay in the first-level cache. With the
dictionary's Gram matrix an iteration is one sweep over one of its rows, which subtracts and searches at once; the
residual itself is never needed. Dictionaries too large for a Gram matrix keep the residual instead and
multiply it anew. The fits solve all eight systems in eight lanes. Groups are shared out over torch's threads.

Arithmetic of a vector: 2 N W for the products, at the peak of the multipliers, and 2 N (s - 1) for the sweeps, whose
rows come from the second- and third-level caches (asking for them ahead made it slower: the processor does);
2 N W s without a Gram matrix.
"""

import ctypes
import math
import threading
from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvlens.kernels.native import jit, threads
from kvlens.kernels.native.dense_rows import add_scaled, padded, read_rows, score_rows
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.pursuit_rows import (
    GROUP_VECTORS,
    LANE_BYTES,
    SWEEP_ATOMS,
    TILE_ATOMS,
    factor_row,
    multiply_group,
    strongest,
    substitute_back,
    subtract_row,
    sum_atoms,
)
from kvlens.kernels.native.scalars import (
    atomic_add,
    field_access,
    read_float,
    read_int64,
    write_float,
    write_int16,
    write_int64,
)
from kvlens.kernels.native.vectors import BF16, CACHE_LINE_BYTES, FP16, FP32
from kvlens.kernels.pursuit import SparseCodes
from kvlens.kernels.pursuit.reference import MIN_PIVOT

jit.require_half_floats()

ELEMENTS = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
MIN_PARALLEL_GROUPS = 4  # groups below which waking a team costs more than it saves
RESTORED_PER_ITEM = 256
LARGEST_GRAM = 2048  # atoms whose Gram matrix, 16 MiB, is worth its memory

_CONSTANTS = torch.tensor([1.0, MIN_PIVOT])


class PursuitArguments(ctypes.Structure):
    """Addresses and counts of one call; `*_stride` and `*_bytes` in bytes."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "vectors", "vector_stride", "num_vectors", "sparsity",
        "tiles", "atoms", "gram", "num_atoms", "constants",
        "indices", "coefficients",
        "scratch", "scratch_bytes", "products_offset", "next_item", "next_thread",
    ))  # fmt: skip


field, field_address = field_access(PursuitArguments)


class RestoreArguments(ctypes.Structure):
    """Addresses and counts of one call."""

    _fields_ = tuple((name, ctypes.c_int64) for name in (
        "indices", "coefficients", "sparsity", "dictionary", "vectors", "num_vectors", "next_item",
    ))  # fmt: skip


restore_field, restore_field_address = field_access(RestoreArguments)


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
    *leading, width = vectors.shape
    indices = torch.empty((*leading, sparsity), dtype=torch.int16)
    coefficients = torch.empty((*leading, sparsity), dtype=torch.float32)
    if not indices.numel():
        return SparseCodes(indices, coefficients)
    rows = vectors.reshape(-1, width)
    if rows.dtype not in ELEMENTS:
        rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    prepared = _prepare(dictionary, gram)
    num_atoms = len(prepared.atoms)

    num_groups = -(-len(rows) // GROUP_VECTORS)
    num_threads = min(threads.num_threads(), num_groups) if num_groups >= MIN_PARALLEL_GROUPS else 1
    tables_bytes = LANE_BYTES * sparsity * (6 + 2 * sparsity) + 4 * padded(width) * GROUP_VECTORS
    products_offset = -(-tables_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
    scratch_bytes = products_offset + 4 * num_atoms * GROUP_VECTORS
    scratch = _scratch(num_threads * scratch_bytes)
    block = PursuitArguments(
        vectors=rows.data_ptr(),
        vector_stride=rows.element_size() * rows.stride(0),
        num_vectors=len(rows),
        sparsity=sparsity,
        tiles=prepared.tiles.data_ptr(),
        atoms=prepared.atoms.data_ptr(),
        gram=0 if prepared.gram is None else prepared.gram.data_ptr(),
        num_atoms=num_atoms,
        constants=_CONSTANTS.data_ptr(),
        indices=indices.data_ptr(),
        coefficients=coefficients.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_bytes=scratch_bytes,
        products_offset=products_offset,
    )
    worker = _pursuit_worker(ELEMENTS[rows.dtype], width, prepared.gram is not None, distinct, refit, orthogonal)
    threads.run(worker, ctypes.addressof(block), num_threads)
    return SparseCodes(indices, coefficients)


def restore(codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
    """See `kvlens.kernels.pursuit.restore`."""
    *leading, sparsity = codes.indices.shape
    vectors = torch.empty((*leading, dictionary.shape[1]), dtype=torch.float32)
    num_vectors = math.prod(leading)
    if num_vectors == 0 or sparsity == 0:
        return vectors.zero_()
    indices, coefficients = codes.indices.to(torch.int16).contiguous(), codes.coefficients.float().contiguous()
    dictionary = dictionary.contiguous()
    block = RestoreArguments(
        indices=indices.data_ptr(),
        coefficients=coefficients.data_ptr(),
        sparsity=sparsity,
        dictionary=dictionary.data_ptr(),
        vectors=vectors.data_ptr(),
        num_vectors=num_vectors,
    )
    num_threads = min(threads.num_threads(), -(-num_vectors // RESTORED_PER_ITEM))
    threads.run(_restore_worker(dictionary.shape[1]), ctypes.addressof(block), num_threads)
    return vectors


def warm_up(
    *, width: int, num_atoms: int, dtype: torch.dtype, distinct=False, refit=False, orthogonal=False
) -> float:  # fmt: skip
    """Compile what these arguments need; gives the milliseconds spent. Safe on a background thread."""
    known = set(jit.compiled())
    has_gram = num_atoms <= LARGEST_GRAM
    _pursuit_worker(ELEMENTS[dtype], width, has_gram, distinct or refit or orthogonal, refit, orthogonal)
    _restore_worker(width)
    return sum(kernel.compile_ms for kernel in jit.compiled() if kernel not in known)


# ---------------------------------------------------------------------------------------------------------
# Kernels


def pursuit_worker(element, width, tile_vectors, has_gram, distinct, refit, orthogonal, source):
    """The kernel that every thread runs: draw groups of eight vectors until none is left."""
    row_bytes = 4 * padded(width)

    def worker(arguments):
        depends_on(source)
        thread = atomic_add(field_address(arguments, "next_thread"), 1)
        sparsity, num_atoms = field(arguments, "sparsity"), field(arguments, "num_atoms")
        gram, atoms = field(arguments, "gram"), field(arguments, "atoms")
        num_vectors, constants = field(arguments, "num_vectors"), field(arguments, "constants")
        # Tables of this thread: [s, 8] numbers, [s, 8] int64, [s, s, 8] numbers
        table_bytes = LANE_BYTES * sparsity
        coefficients = field(arguments, "scratch") + thread * field(arguments, "scratch_bytes")
        changes = coefficients + table_bytes
        half_way = changes + table_bytes
        inverse = half_way + table_bytes
        chosen = inverse + table_bytes
        chosen_gram = chosen + 2 * table_bytes
        lower = chosen_gram + sparsity * table_bytes
        rows = lower + sparsity * table_bytes
        all_products = coefficients + field(arguments, "products_offset")
        group = atomic_add(field_address(arguments, "next_item"), 1)
        while group * GROUP_VECTORS < num_vectors:
            first = group * GROUP_VECTORS
            count = min(GROUP_VECTORS, num_vectors - first)
            place = field(arguments, "vectors") + first * field(arguments, "vector_stride")
            read_rows((place, field(arguments, "vector_stride"), count, rows, constants), element, width, 1)
            for step in range(sparsity):
                # Orthogonal pursuit changes every coefficient at every step
                first_change = 0 if orthogonal else max(step - 1, 0)
                if not has_gram:
                    for vector in range(count):
                        for j in range(first_change, step):
                            atom = atoms + row_bytes * read_int64(chosen + 2 * LANE_BYTES * j + 8 * vector)
                            change = read_float(changes + LANE_BYTES * j + 4 * vector)
                            add_scaled(rows + row_bytes * vector, atom, width, -change)
                if step == 0 or not has_gram:
                    multiply_group((rows, field(arguments, "tiles"), num_atoms, all_products), width, tile_vectors)
                for vector in range(count):
                    products = all_products + 4 * num_atoms * vector
                    index = 0
                    if step > 0 and has_gram:
                        for j in range(first_change, step):
                            row = gram + 4 * num_atoms * read_int64(chosen + 2 * LANE_BYTES * j + 8 * vector)
                            index = subtract_row((products, num_atoms, row, changes + LANE_BYTES * j + 4 * vector))
                    else:
                        if distinct:
                            for j in range(step):
                                other = read_int64(chosen + 2 * LANE_BYTES * j + 8 * vector)
                                write_float(products + 4 * other, math.nan)
                        index = strongest((products, num_atoms))
                    product = read_float(products + 4 * index)
                    if distinct:
                        write_float(products + 4 * index, math.nan)  # NaN stays NaN and is never the strongest
                    here = LANE_BYTES * step + 4 * vector
                    write_int64(chosen + 2 * here, index)
                    write_int16(field(arguments, "indices") + 2 * ((first + vector) * sparsity + step), index)
                    write_float(changes + here, product)
                    write_float(coefficients + here, product * (0 if orthogonal else 1))
                    if refit or orthogonal:
                        write_float(half_way + here, product)
                        for j in range(step + 1):
                            other = read_int64(chosen + 2 * LANE_BYTES * j + 8 * vector)
                            entry = chosen_gram + (step * sparsity + j) * LANE_BYTES + 4 * vector
                            if has_gram:
                                write_float(entry, read_float(gram + 4 * (num_atoms * index + other)))
                            else:
                                atom = atoms + row_bytes * index
                                score_rows((atoms + row_bytes * other, 0, 1, atom, 0, entry, 0), FP32, width, 1)
                if orthogonal:
                    factor_row((step, sparsity, constants + 4, chosen_gram, lower, inverse, half_way, coefficients))
                    substitute_back((step + 1, sparsity, lower, inverse, half_way, coefficients, changes))
            if refit and not orthogonal:
                for j in range(sparsity):
                    factor_row((j, sparsity, constants + 4, chosen_gram, lower, inverse, half_way, coefficients))
                substitute_back((sparsity, sparsity, lower, inverse, half_way, coefficients, changes))
            for vector in range(count):
                for j in range(sparsity):
                    target = field(arguments, "coefficients") + 4 * ((first + vector) * sparsity + j)
                    write_float(target, read_float(coefficients + LANE_BYTES * j + 4 * vector))
            group = atomic_add(field_address(arguments, "next_item"), 1)

    return worker


def restore_worker(width, source):
    """The kernel that every thread runs: draw runs of vectors until none is left."""

    def worker(arguments):
        depends_on(source)
        sparsity, num_vectors = restore_field(arguments, "sparsity"), restore_field(arguments, "num_vectors")
        item = atomic_add(restore_field_address(arguments, "next_item"), 1)
        while item * RESTORED_PER_ITEM < num_vectors:
            first = item * RESTORED_PER_ITEM
            sum_atoms((
                restore_field(arguments, "indices") + 2 * first * sparsity,
                restore_field(arguments, "coefficients") + 4 * first * sparsity,
                sparsity, restore_field(arguments, "dictionary"),
                restore_field(arguments, "vectors") + 4 * first * width,
                min(RESTORED_PER_ITEM, num_vectors - first),
            ), width, 1)  # fmt: skip
            item = atomic_add(restore_field_address(arguments, "next_item"), 1)

    return worker


def _pursuit_worker(element: int, width: int, *has: bool) -> int:
    # Sums fill the registers: 32 of sixteen floats with AVX-512, else 16 of eight.
    tile_vectors = GROUP_VECTORS if jit.has_lookups() else 2
    return jit.kernel(pursuit_worker, element, width, tile_vectors, *map(int, has)).address


def _restore_worker(width: int) -> int:
    return jit.kernel(restore_worker, width).address


# ---------------------------------------------------------------------------------------------------------
# Dictionaries as the kernels want them


@dataclass
class _Prepared:
    """A dictionary filled up with atoms of zeros to N, and with channels of zeros to whole vectors.

    Shapes: atoms `[N, padded(W)]`, tiles `[N / 32, W, 32]`, gram `[N, N]`, all fp32.
    """

    version: int  # of the dictionary, which may be written to
    atoms: torch.Tensor
    tiles: torch.Tensor
    gram: torch.Tensor | None = None


_prepared = WeakTensorKeyDictionary()  # as long as the dictionaries live


def _prepare(dictionary: torch.Tensor, gram: torch.Tensor | None) -> _Prepared:
    """The dictionary's tiles, with `gram` where it can be used as it is, else with one of our own or none."""
    version = -1 if dictionary.is_inference() else dictionary._version  # tensors of inference mode count none
    found = _prepared.get(dictionary)
    if found is None or found.version != version or version == -1:
        num_atoms, width = dictionary.shape
        padding = (0, padded(width) - width, 0, -num_atoms % SWEEP_ATOMS)
        atoms = torch.nn.functional.pad(dictionary.detach(), padding).contiguous()
        found = _Prepared(version, atoms, atoms[:, :width].unflatten(0, (-1, TILE_ATOMS)).mT.contiguous())
        if version != -1:
            _prepared[dictionary] = found
    if gram is not None and gram.is_contiguous() and len(gram) == len(found.atoms):
        return replace(found, gram=gram)
    if found.gram is None and len(found.atoms) <= LARGEST_GRAM:
        found.gram = found.atoms @ found.atoms.mT
    return found


# ---------------------------------------------------------------------------------------------------------


_of_this_thread = threading.local()


def _scratch(num_bytes: int) -> torch.Tensor:
    """Memory of this thread, kept from call to call and grown when needed."""
    held = getattr(_of_this_thread, "scratch", None)
    if held is None or held.numel() < num_bytes:
        held = _of_this_thread.scratch = torch.empty(num_bytes, dtype=torch.uint8)
    return held
