"""How packed attention is cut into programs and tiles: everything static about a launch.

Plain numbers from shapes; the kernels read them as one constant. This module knows no Triton language.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _padded(size: int) -> int:
    """The rows of a tensor-core product that hold `size` of them: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Tiling:
    """Everything a launch fixes: the constants of the kernels and what follows from them."""

    layout: PageLayout
    head_dim: int
    num_kv_heads: int
    heads_per_kv: int
    num_sinks: int
    key_ring: int
    value_ring: int
    num_splits: int
    exact_tokens: int  # tokens that an exact part reads
    num_stages: int
    packed_dtype: tl.dtype  # of the products over packed tokens: codes are exact in fp16
    exact_dtype: tl.dtype  # of the products over exact tokens
    is_interpreted: bool

    @property
    def num_exact_parts(self) -> int:
        return triton.cdiv(self.num_sinks + max(self.key_ring, self.value_ring), self.exact_tokens)

    @property
    def num_parts(self) -> int:
        return self.num_exact_parts + self.num_splits

    @property
    def block_d(self) -> int:
        return _padded(self.head_dim)

    @property
    def block_heads(self) -> int:
        return 8 if self.heads_per_kv <= 8 else 16

    @property
    def head_blocks(self) -> int:
        return triton.cdiv(self.heads_per_kv, self.block_heads)

    @property
    def key_slots(self) -> int:
        return 16 // self.layout.key_bits

    @property
    def key_words(self) -> int:
        return self.layout.page_tokens // self.key_slots

    @property
    def key_groups(self) -> int:
        return self.layout.page_tokens // self.layout.key_group_size

    @property
    def key_group_rows(self) -> int:
        return _padded(self.key_groups)

    @property
    def tile_words(self) -> int:
        """Words of each channel in a tile: 128 tokens, less where a group is shorter than a run."""
        words = max(16, 128 // self.key_slots)
        return min(words, self.layout.key_group_size) if self.layout.key_group_size in (16, 32, 64) else words

    @property
    def tile_tokens(self) -> int:
        return self.tile_words * self.key_slots

    @property
    def is_tile_in_page(self) -> bool:
        return self.key_words % self.tile_words == 0

    @property
    def folds_keys(self) -> bool:
        """Each run of a tile lies in one group of tokens."""
        group_size = self.layout.key_group_size
        is_run_in_group = group_size % self.key_words == 0 or self.key_words % group_size == 0
        return self.is_tile_in_page and is_run_in_group and group_size % self.tile_words == 0

    @property
    def value_slots(self) -> int:
        return 16 // self.layout.value_bits

    @property
    def value_words(self) -> int:
        return self.head_dim // self.value_slots

    @property
    def value_rows(self) -> int:
        return _padded(self.value_words)

    @property
    def value_groups(self) -> int:
        return self.head_dim // self.layout.value_group_size

    @property
    def value_group_rows(self) -> int:
        return _padded(self.value_groups)

    @property
    def folds_values(self) -> bool:
        """Each slot of a value row lies in one group of channels."""
        return self.layout.value_group_size % self.value_words == 0


def tiling_of(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> Tiling:
    """The tiling for these tensors. It depends on their shapes, dtypes and device only."""
    head_dim, num_kv_heads = query.shape[-1], exact.keys.shape[1]
    heads_per_kv = query.shape[1] // num_kv_heads
    is_interpreted = triton.knobs.runtime.interpret
    is_one_dtype = query.dtype == exact.keys.dtype == exact.values.dtype
    exact_dtype = DTYPES[query.dtype] if is_one_dtype else tl.float32
    if is_interpreted and exact_dtype == tl.bfloat16:
        exact_dtype = tl.float32  # the interpreter's bf16 products are wrong
    tiling = Tiling(
        layout=past.layout,
        head_dim=head_dim,
        num_kv_heads=num_kv_heads,
        heads_per_kv=heads_per_kv,
        num_sinks=exact.sink_keys.shape[2],
        key_ring=max(1, exact.keys.shape[2]),
        value_ring=max(1, exact.values.shape[2]),
        num_splits=1,
        exact_tokens=16,
        num_stages=2,
        packed_dtype=tl.float32 if query.dtype == torch.float32 else tl.float16,
        exact_dtype=exact_dtype,
        is_interpreted=is_interpreted,
    )
    num_tiles = triton.cdiv(past.page_table.shape[1] * tiling.key_words, tiling.tile_words)
    num_heads = query.shape[0] * num_kv_heads * tiling.head_blocks
    num_splits = min(num_tiles, triton.cdiv(_num_programs(query.device), max(1, num_heads)), 256)
    return replace(tiling, num_splits=num_splits)


@cache
def _num_programs(device: torch.device) -> int:
    """Programs that keep the device busy: two waves of 8 warps a multiprocessor."""
    if device.type != "cuda":
        return 8
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count
