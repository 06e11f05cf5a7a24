"""Quantize-and-pack in Triton: ranges, codes and planar words of a few rows a program.

A program takes BLOCK_ROWS rows twice: by groups, to find and store their scale and minimum, then by
slots, a run of words at a time, where each value looks its group up again. Neither pass needs a group or
a row to be a power of two, and a slot's codes land in their words without any exchange between threads.
The second look comes from the cache. Keys arrive as a transposed view; the strides are arguments, and
Triton loads along whichever axis is contiguous.

Divisions are rounded to nearest, as torch's are, so codes equal the reference's to the bit.
"""

import torch
import triton
import triton.language as tl

from kvlens.kernels.compiled import Launch
from kvlens.kernels.quantize_pack import Packed

ROUNDER = 12582912.0  # 1.5 * 2^23: adding and taking it away rounds fp32 below 2^22 half to even
PROGRAM_VALUES = 4096


@triton.jit
def _quantize_pack_kernel(
    values_ptr, codes_ptr, scale_ptr, minimum_ptr, num_rows,
    size_1, size_2, stride_0, stride_1, stride_2, stride_value,
    ROW_LENGTH: tl.constexpr, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, ROUNDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Rows `[num_rows]`, counted over three leading axes, of ROW_LENGTH values at any strides."""
    NUM_GROUPS: tl.constexpr = ROW_LENGTH // GROUP_SIZE
    NUM_WORDS: tl.constexpr = ROW_LENGTH * BITS // 16
    MAX_CODE: tl.constexpr = (1 << BITS) - 1
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask_rows = rows < num_rows
    row_ptr = (
        values_ptr
        + rows // (size_1 * size_2) * stride_0
        + rows // size_2 % size_1 * stride_1
        + rows % size_2 * stride_2
    )

    groups = tl.arange(0, BLOCK_GROUPS)
    offs_g = tl.arange(0, BLOCK_G)
    offs_values = groups[:, None] * GROUP_SIZE + offs_g[None, :]
    mask_groups = mask_rows[:, None] & (groups < NUM_GROUPS)[None, :]
    mask = mask_groups[:, :, None] & (offs_g < GROUP_SIZE)[None, None, :]
    values_ptrs = row_ptr[:, None, None] + offs_values[None, :, :].to(tl.int64) * stride_value
    values = tl.load(values_ptrs, mask=mask, other=0.0).to(tl.float32)
    low = tl.min(tl.where(mask, values, float("inf")), axis=2)
    high = tl.max(tl.where(mask, values, float("-inf")), axis=2)
    offs_groups = rows[:, None] * NUM_GROUPS + groups[None, :]
    scale = tl.div_rn(high - low, tl.full(low.shape, MAX_CODE, tl.float32))
    tl.store(scale_ptr + offs_groups, scale.to(tl.float16), mask=mask_groups)
    tl.store(minimum_ptr + offs_groups, low.to(tl.float16), mask=mask_groups)
    tl.debug_barrier()  # the other threads of this program read them next

    offs_w = tl.arange(0, BLOCK_W)
    mask = mask_rows[:, None] & (offs_w < NUM_WORDS)[None, :]
    words = tl.zeros((BLOCK_ROWS, BLOCK_W), tl.int32)
    for slot in tl.static_range(16 // BITS):
        place = slot * NUM_WORDS + offs_w
        values = tl.load(row_ptr[:, None] + place[None, :].to(tl.int64) * stride_value, mask=mask, other=0.0)
        offs_groups = rows[:, None] * NUM_GROUPS + (place // GROUP_SIZE)[None, :]
        scale = tl.load(scale_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
        minimum = tl.load(minimum_ptr + offs_groups, mask=mask, other=0.0).to(tl.float32)
        steps = tl.div_rn(values.to(tl.float32) - minimum, tl.where(scale == 0.0, 1.0, scale))
        steps = tl.minimum(tl.maximum(steps, 0.0), MAX_CODE)
        codes = tl.where(scale == 0.0, 0.0, (steps + ROUNDER) - ROUNDER).to(tl.int32)
        words |= codes << (slot * BITS)
    tl.store(codes_ptr + rows[:, None] * NUM_WORDS + offs_w[None, :], words.to(tl.int16), mask=mask)


def quantize_pack(values: torch.Tensor, *, bits: int, group_size: int) -> Packed:
    """See `kvlens.kernels.quantize_pack.quantize_pack`."""
    packed, launches = prepare(values, bits=bits, group_size=group_size)
    with torch.cuda.device_of(values):
        for launch in launches:
            launch.run()
    return packed


def prepare(values: torch.Tensor, *, bits: int, group_size: int) -> tuple[Packed, tuple[Launch, ...]]:
    """The result's tensors, still empty, and the launches that fill them (none for no rows)."""
    *leading, length = values.shape
    num_groups, num_words = length // group_size, length * bits // 16
    packed = Packed(
        values.new_empty((*leading, num_words), dtype=torch.int16),
        values.new_empty((*leading, num_groups), dtype=torch.float16),
        values.new_empty((*leading, num_groups), dtype=torch.float16),
    )
    if values.numel() == 0:
        return packed, ()
    axes = values.reshape(-1, *values.shape[-3:]) if values.ndim > 4 else values
    axes = axes[(None,) * (4 - axes.ndim)]
    block_groups, block_g = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
    num_rows = axes[..., 0].numel()
    block_rows = max(1, PROGRAM_VALUES // (block_groups * block_g))
    arguments = {
        "values_ptr": axes,
        "codes_ptr": packed.codes,
        "scale_ptr": packed.scale,
        "minimum_ptr": packed.minimum,
        "num_rows": num_rows,
        "size_1": axes.shape[1],
        "size_2": axes.shape[2],
        **{f"stride_{name}": stride for name, stride in zip((0, 1, 2, "value"), axes.stride(), strict=True)},
        "ROW_LENGTH": length,
        "BITS": bits,
        "GROUP_SIZE": group_size,
        "ROUNDER": ROUNDER,
        "BLOCK_ROWS": block_rows,
        "BLOCK_GROUPS": block_groups,
        "BLOCK_G": block_g,
        "BLOCK_W": triton.next_power_of_2(num_words),
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    return packed, (Launch(_quantize_pack_kernel, (triton.cdiv(num_rows, block_rows),), arguments),)
