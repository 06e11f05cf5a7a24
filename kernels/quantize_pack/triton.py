"""Quantize-and-pack in Triton: ranges, codes and planar words of a few rows a program.

A program takes its rows twice: by groups, to find and store their scale and minimum, then by slots, a run
of words at a time, where each value looks its group up again. Neither pass needs a group or a row to be a
power of two, and a slot's codes land in their words without any exchange between threads. The second look
comes from the cache. Where values lie is the caller's to say (`load` in `quantize_rows`); here rows may
have any strides, so that keys arrive as a transposed view, and Triton loads along whichever axis is contiguous.

Divisions are rounded to nearest, as torch's are, so codes equal the reference's to the bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import Launch
from kvlens.kernels.quantize_pack import Packed

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds fp32 below 2^22 half to even
PROGRAM_VALUES = 4096


@dataclass(frozen=True)
class RowFormat:
    """The constants of rows: what they hold, and the powers of two that hold that."""

    length: int
    bits: int
    group_size: int
    num_groups: int
    num_words: int
    block_groups: int
    block_g: int
    block_w: int

    @property
    def block_values(self) -> int:
        return self.block_groups * self.block_g


def row_format(length: int, *, bits: int, group_size: int) -> RowFormat:
    num_groups, num_words = length // group_size, length * bits // 16
    blocks = (triton.next_power_of_2(size) for size in (num_groups, group_size, num_words))
    return RowFormat(length, bits, group_size, num_groups, num_words, *blocks)


@triton.jit
def quantize_rows(load, source, mask_rows, codes_ptr, scale_ptr, minimum_ptr, FORMAT: tl.constexpr):
    """Quantize rows of FORMAT; `load(source, places, mask)` gives the values at `places [N]` of each row.

    Shapes: mask_rows and the pointers to each row's codes, scale and minimum, which are contiguous, `[ROWS]`; mask
    and what `load` gives `[ROWS, N]`.
    """
    NUM_ROWS: tl.constexpr = mask_rows.shape[0]
    MAX_CODE: tl.constexpr = (1 << FORMAT.bits) - 1
    groups = tl.arange(0, FORMAT.block_groups)
    offs_v = tl.arange(0, FORMAT.block_groups * FORMAT.block_g)
    offs_g = offs_v % FORMAT.block_g
    places = offs_v if FORMAT.block_g == FORMAT.group_size else offs_v // FORMAT.block_g * FORMAT.group_size + offs_g
    mask = mask_rows[:, None] & ((offs_g < FORMAT.group_size) & (places < FORMAT.length))[None, :]
    values = load(source, places, mask).to(tl.float32)
    block: tl.constexpr = (NUM_ROWS, FORMAT.block_groups, FORMAT.block_g)
    low = tl.min(tl.reshape(tl.where(mask, values, float("inf")), block), axis=2)
    high = tl.max(tl.reshape(tl.where(mask, values, float("-inf")), block), axis=2)
    scale = tl.div_rn(high - low, tl.full(low.shape, MAX_CODE, tl.float32))
    mask_groups = mask_rows[:, None] & (groups < FORMAT.num_groups)[None, :]
    tl.store(scale_ptr[:, None] + groups[None, :], scale.to(tl.float16), mask=mask_groups)
    tl.store(minimum_ptr[:, None] + groups[None, :], low.to(tl.float16), mask=mask_groups)
    tl.debug_barrier()  # the other threads of this program read them next

    offs_w = tl.arange(0, FORMAT.block_w)
    mask = mask_rows[:, None] & (offs_w < FORMAT.num_words)[None, :]
    words = tl.full((NUM_ROWS, FORMAT.block_w), 0, tl.int32)
    for slot in tl.static_range(16 // FORMAT.bits):
        places = slot * FORMAT.num_words + offs_w
        groups = places // FORMAT.group_size
        values = load(source, places, mask).to(tl.float32)
        scale = tl.load(scale_ptr[:, None] + groups[None, :], mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(minimum_ptr[:, None] + groups[None, :], mask=mask, other=0.0).to(tl.float32)
        steps = tl.div_rn(values - minimum, tl.where(scale == 0.0, 1.0, scale))
        steps = tl.minimum(tl.maximum(steps, 0.0), MAX_CODE)
        codes = tl.where(scale == 0.0, 0.0, (steps + ROUNDER) - ROUNDER).to(tl.int32)
        words |= codes << (slot * FORMAT.bits)
    tl.store(codes_ptr[:, None] + offs_w[None, :], words.to(tl.int16), mask=mask)


@triton.jit
def _load_strided(source, places, mask):
    row_ptr, stride_value = source
    return tl.load(row_ptr[:, None] + places[None, :].to(tl.int64) * stride_value, mask=mask, other=0.0)


@triton.jit
def _quantize_pack_kernel(
    values_ptr, codes_ptr, scale_ptr, minimum_ptr, num_rows,
    size_1, size_2, stride_0, stride_1, stride_2, stride_value,
    BLOCK_ROWS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Rows `[num_rows]`, counted over three leading axes, at any strides."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ptr = (
        values_ptr
        + rows // (size_1 * size_2) * stride_0
        + rows // size_2 % size_1 * stride_1
        + rows % size_2 * stride_2
    )
    quantize_rows(
        _load_strided, (row_ptr, stride_value), rows < num_rows, codes_ptr + rows * FORMAT.num_words,
        scale_ptr + rows * FORMAT.num_groups, minimum_ptr + rows * FORMAT.num_groups, FORMAT,
    )  # fmt: skip


def quantize_pack(values: torch.Tensor, *, bits: int, group_size: int) -> Packed:
    """See `kvlens.kernels.quantize_pack.quantize_pack`."""
    packed, launches = prepare(values, bits=bits, group_size=group_size)
    for launch in launches:
        launch.run()
    return packed


def prepare(values: torch.Tensor, *, bits: int, group_size: int) -> tuple[Packed, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (none for no rows)."""
    *leading, length = values.shape
    rows = row_format(length, bits=bits, group_size=group_size)
    packed = Packed(
        values.new_empty((*leading, rows.num_words), dtype=torch.int16),
        values.new_empty((*leading, rows.num_groups), dtype=torch.float16),
        values.new_empty((*leading, rows.num_groups), dtype=torch.float16),
    )
    if values.numel() == 0:
        return packed, ()
    axes = values.reshape(-1, *values.shape[-3:]) if values.ndim > 4 else values
    axes = axes[(None,) * (4 - axes.ndim)]
    num_rows = axes[..., 0].numel()
    block_rows = max(1, PROGRAM_VALUES // rows.block_values)
    arguments = {
        "values_ptr": axes,
        "codes_ptr": packed.codes,
        "scale_ptr": packed.scale,
        "minimum_ptr": packed.minimum,
        "num_rows": num_rows,
        "size_1": axes.shape[1],
        "size_2": axes.shape[2],
        **{f"stride_{name}": stride for name, stride in zip((0, 1, 2, "value"), axes.stride(), strict=True)},
        "BLOCK_ROWS": block_rows,
        "FORMAT": rows,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    return packed, (Launch(_quantize_pack_kernel, (triton.cdiv(num_rows, block_rows),), arguments),)
