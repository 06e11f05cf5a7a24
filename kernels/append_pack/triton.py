"""Append-and-pack in Triton: one launch writes the new tokens and packs what they push out.

How it works
    Grid `[B * HK * programs]`. The first program of a head writes the token to the window. Then the programs
    of a head share out the blocks of values and of keys that are due, as the length on the device tells them:
    most steps have one token's values due and no keys, and a program with nothing due leaves after one load.
    A block is a few tokens of values, or a few channels of a page of keys, and goes through `quantize_rows`.

No order between programs
    Another program may write the newest token while this one packs it, so it is taken from where it comes from.
    The others that are packed lie in slots that nobody writes: a ring holds a window and a flush.

Nothing about the launch depends on what a tensor holds. Rings, sinks, tables and tokens may have any strides;
rows of codes, scales and minima must be contiguous. This module does not know how pages are found.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.compiled import COUNTS, Launch
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import PackedPast
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.quantize_pack.triton import RowFormat, quantize_rows, row_format

BLOCK_VALUES = 2048  # that a program packs at a time: twice as many spill registers
PROGRAMS = 1024
"""The most that are launched beyond one a head. More of them pack a block of keys sooner, once in a flush, but come and
go in every step. Chosen without a device."""


class Strided(NamedTuple):
    """A tensor of four dims as the kernel takes it."""

    ptr: Any
    stride_0: int
    stride_1: int
    stride_2: int
    stride_3: int


class Side(NamedTuple):
    """Keys or values: the new tokens `[B, HK, 1, D]`, their window, and the pages; the counts are by sequence."""

    fresh: Strided
    ring: Strided
    sinks: Strided
    codes: Strided | None
    scale: Strided | None
    minimum: Strided | None
    count_ptr: Any
    stride_count: int


@dataclass(frozen=True)
class SideBlocks:
    """The constants of one side: when it is due, and how what is due is cut into blocks."""

    window: int
    flush: int
    capacity: int
    row: RowFormat | None
    block_rows: int
    num_blocks: int


@dataclass(frozen=True)
class Blocks:
    """The constants of the kernel."""

    num_sinks: int
    num_kv_heads: int
    head_dim: int
    block_d: int
    page_tokens: int
    num_programs: int
    keys: SideBlocks
    values: SideBlocks


@triton.jit
def _rows_of(tensor, index, head):
    """Pointers to the first row of a head in sequence, or page, `index`."""
    return tensor.ptr + index.to(tl.int64) * tensor.stride_0 + head * tensor.stride_1


@triton.jit
def _append(side, row, head, token, CAPACITY: tl.constexpr, BLOCKS: tl.constexpr):
    """The new token of a head into its sink or its place in the ring."""
    offs_d = tl.arange(0, BLOCKS.block_d)
    mask = offs_d < BLOCKS.head_dim
    vector = tl.load(_rows_of(side.fresh, row, head) + offs_d * side.fresh.stride_3, mask=mask)
    vector = vector.to(side.ring.ptr.dtype.element_ty)
    if token < BLOCKS.num_sinks:
        sink_ptr = _rows_of(side.sinks, row, head) + token * side.sinks.stride_2
        tl.store(sink_ptr + offs_d * side.sinks.stride_3, vector, mask=mask)
    else:
        ring_ptr = _rows_of(side.ring, row, head) + (token % CAPACITY).to(tl.int64) * side.ring.stride_2
        tl.store(ring_ptr + offs_d * side.ring.stride_3, vector, mask=mask)


@triton.jit
def _packed(length, SIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """See `FlushRule.packed`."""
    return tl.maximum(length - BLOCKS.num_sinks - SIDE.window, 0) // SIDE.flush * SIDE.flush


@triton.jit
def _load_exact(window, tokens, channels, mask, SIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Channels of exact tokens, one of which may be the newest, that its ring may not hold yet.

    Shapes: tokens and channels together broadcast to what is given, of which mask is needed.
    """
    ring_ptr, stride_token, stride_channel, fresh_ptr, stride_fresh, newest = window
    ring_ptrs = ring_ptr + (tokens % SIDE.capacity).to(tl.int64) * stride_token + channels * stride_channel
    if SIDE.window > 0:
        return tl.load(ring_ptrs, mask=mask, other=0.0)
    fresh = tl.load(fresh_ptr + channels * stride_fresh, mask=channels < HEAD_DIM, other=0.0)
    older = tl.load(ring_ptrs, mask=mask & (tokens != newest), other=0.0)
    return tl.where(tokens == newest, fresh.to(older.dtype), older)


@triton.jit
def _load_keys(source, places, mask):
    """Rows are channels, and values the tokens from `first` on."""
    window, first, channels = source[0], source[1], source[2]
    BLOCKS: tl.constexpr = source[3]
    SIDE: tl.constexpr = BLOCKS.keys
    return _load_exact(window, first + places[None, :], channels[:, None], mask, SIDE, BLOCKS.head_dim)


@triton.jit
def _load_values(source, places, mask):
    """Rows are tokens, and values their channels."""
    window, tokens = source[0], source[1]
    BLOCKS: tl.constexpr = source[2]
    SIDE: tl.constexpr = BLOCKS.values
    return _load_exact(window, tokens[:, None], places[None, :], mask, SIDE, BLOCKS.head_dim)


@triton.jit
def _window_of(side, row, head, newest):
    """What `_load_exact` reads from."""
    return (
        _rows_of(side.ring, row, head), side.ring.stride_2, side.ring.stride_3,
        _rows_of(side.fresh, row, head), side.fresh.stride_3, newest,
    )  # fmt: skip


@triton.jit
def _pack_keys(keys, page_table_ptr, stride_page, window, head, first, block, BLOCKS: tl.constexpr):
    """A few channels of one page, of the pages that begin with packed token `first`."""
    CHANNEL_BLOCKS: tl.constexpr = BLOCKS.keys.num_blocks * BLOCKS.page_tokens // BLOCKS.keys.flush
    ROW: tl.constexpr = BLOCKS.keys.row
    first += block // CHANNEL_BLOCKS * BLOCKS.page_tokens
    channels = block % CHANNEL_BLOCKS * BLOCKS.keys.block_rows + tl.arange(0, BLOCKS.keys.block_rows)
    page = tl.load(page_table_ptr + first // BLOCKS.page_tokens * stride_page)
    quantize_rows(
        _load_keys, (window, BLOCKS.num_sinks + first, channels, BLOCKS), channels < BLOCKS.head_dim,
        _rows_of(keys.codes, page, head) + channels * keys.codes.stride_2,
        _rows_of(keys.scale, page, head) + channels * keys.scale.stride_2,
        _rows_of(keys.minimum, page, head) + channels * keys.minimum.stride_2, ROW,
    )  # fmt: skip


@triton.jit
def _pack_values(values, page_table_ptr, stride_page, window, head, first, block, BLOCKS: tl.constexpr):
    """A few tokens of those from packed token `first` on, which may lie on two pages."""
    ROW: tl.constexpr = BLOCKS.values.row
    offs_t = block * BLOCKS.values.block_rows + tl.arange(0, BLOCKS.values.block_rows)
    mask = offs_t < BLOCKS.values.flush
    tokens = first + offs_t
    page = tl.load(page_table_ptr + tokens // BLOCKS.page_tokens * stride_page, mask=mask, other=0)
    slots = tokens % BLOCKS.page_tokens
    quantize_rows(
        _load_values, (window, BLOCKS.num_sinks + tokens, BLOCKS), mask,
        _rows_of(values.codes, page, head) + slots * values.codes.stride_2,
        _rows_of(values.scale, page, head) + slots * values.scale.stride_2,
        _rows_of(values.minimum, page, head) + slots * values.minimum.stride_2, ROW,
    )  # fmt: skip


@triton.jit
def _pack_due(pack, side, table_ptr, stride_page, row, head, share, length, SIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """This program's share of the blocks that the newest of `length` tokens makes due."""
    first = _packed(length - 1, SIDE, BLOCKS)
    if (share == 0) & (head == 0):
        tl.store(side.count_ptr + row * side.stride_count, first)
    if _packed(length, SIDE, BLOCKS) > first:
        window = _window_of(side, row, head, length - 1)
        for block in range(share, SIDE.num_blocks, BLOCKS.num_programs):
            pack(side, table_ptr, stride_page, window, head, first, block, BLOCKS)


@triton.jit(do_not_specialize=["stride_table_row"], do_not_specialize_on_alignment=COUNTS)
def _append_pack_kernel(
    length_ptr, page_table_ptr, keys, values, stride_length, stride_table_row, stride_table_page, BLOCKS: tl.constexpr
):
    # Triton 3.6 hands on a constant's own constants by names of their own alone.
    KEYS: tl.constexpr = BLOCKS.keys
    VALUES: tl.constexpr = BLOCKS.values
    share = tl.program_id(0) % BLOCKS.num_programs
    head = (tl.program_id(0) // BLOCKS.num_programs % BLOCKS.num_kv_heads).to(tl.int64)
    row = (tl.program_id(0) // (BLOCKS.num_programs * BLOCKS.num_kv_heads)).to(tl.int64)
    length = tl.load(length_ptr + row * stride_length)
    if length == 0:
        return
    if share == 0:
        _append(keys, row, head, length - 1, KEYS.capacity, BLOCKS)
        _append(values, row, head, length - 1, VALUES.capacity, BLOCKS)
    if page_table_ptr is not None:
        table_ptr = page_table_ptr + row * stride_table_row
        _pack_due(_pack_values, values, table_ptr, stride_table_page, row, head, share, length, VALUES, BLOCKS)
        _pack_due(_pack_keys, keys, table_ptr, stride_table_page, row, head, share, length, KEYS, BLOCKS)


def append_pack(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> None:
    """See `kvlens.kernels.append_pack.append_pack`."""
    for launch in prepare(keys, values, exact, rule, past):
        launch.run()


def prepare(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> tuple[Launch, ...]:
    """The launch, which may be run for every step as long as the tensors lie where they are.

    Raises: ValueError for pages whose rows are not contiguous.
    """
    blocks = _blocks(exact, rule, past)
    batch, num_kv_heads, _ = keys.shape
    key_pages, value_pages = (None, None) if past is None else (past.keys, past.values)
    key_count, value_count = (None, None) if past is None else (past.num_keys, past.num_values)
    table = None if past is None else past.page_table
    arguments = {
        "length_ptr": exact.length,
        "page_table_ptr": table,
        "keys": _side(keys, exact.keys, exact.sink_keys, key_pages, key_count),
        "values": _side(values, exact.values, exact.sink_values, value_pages, value_count),
        "stride_length": exact.length.stride(0),
        "stride_table_row": 0 if table is None else table.stride(0),
        "stride_table_page": 0 if table is None else table.stride(1),
        "BLOCKS": blocks,
        "num_warps": 4,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
    return (Launch(_append_pack_kernel, (batch * num_kv_heads * blocks.num_programs,), arguments),)


def _blocks(exact: ExactTokens, rule: FlushRule, past: PackedPast | None) -> Blocks:
    batch, num_kv_heads, key_capacity, head_dim = exact.keys.shape
    block_d = triton.next_power_of_2(head_dim)
    if past is None:
        keys, values = (SideBlocks(0, 1, ring.shape[2], None, 0, 0) for ring in (exact.keys, exact.values))
    else:
        layout = past.layout
        row = row_format(layout.page_tokens, bits=layout.key_bits, group_size=layout.key_group_size)
        block_rows = min(block_d, _rows_at_once(row))
        num_blocks = rule.key_flush // layout.page_tokens * triton.cdiv(head_dim, block_rows)
        keys = SideBlocks(rule.key_window, rule.key_flush, key_capacity, row, block_rows, num_blocks)
        row = row_format(head_dim, bits=layout.value_bits, group_size=layout.value_group_size)
        block_rows = min(triton.next_power_of_2(rule.value_flush), _rows_at_once(row))
        num_blocks = triton.cdiv(rule.value_flush, block_rows)
        values = SideBlocks(
            rule.value_window, rule.value_flush, exact.values.shape[2], row, block_rows, num_blocks
        )  # fmt: skip
    return Blocks(
        num_sinks=rule.num_sinks,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_d=block_d,
        page_tokens=1 if past is None else past.layout.page_tokens,
        num_programs=max(1, min(max(keys.num_blocks, values.num_blocks), PROGRAMS // (batch * num_kv_heads))),
        keys=keys,
        values=values,
    )


def _rows_at_once(row: RowFormat) -> int:
    return max(1, BLOCK_VALUES // row.block_values)


def _side(
    fresh: torch.Tensor, ring: torch.Tensor, sinks: torch.Tensor, pages: Packed | None, count: torch.Tensor | None
) -> Side:
    exact = (_strided(tensor) for tensor in (fresh.unsqueeze(2), ring, sinks))
    if pages is None:
        return Side(*exact, None, None, None, None, 0)
    parts = (pages.codes, pages.scale, pages.minimum)
    if any(part.stride(3) != 1 for part in parts):
        raise ValueError("rows of codes, scales and minima must be contiguous, since they are written in place")
    return Side(*exact, *map(_strided, parts), count, count.stride(0))


def _strided(tensor: torch.Tensor) -> Strided:
    return Strided(tensor, *tensor.stride())
