"""The plain cache: every key and value exact, in 16 bits. The rival, and the oracle of every other method.

Buffers are allocated ahead and written in place: no step copies the past. Attention over them is the
fastest dense path that this machine has for the shape at hand (`kernels/dense_attend` measures its
candidates once and says which it took).
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch

from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig
from kvlens.engine.registry import register
from kvlens.engine.segments import Tile
from kvlens.engine.shape import ModelShape
from kvlens.kernels.dense_attend import chosen_path, dense_attend, prepare, step_on_device, step_tasks, takes_tasks

BLOCK_TOKENS = 256
"""Buffers grow in steps of at least this many tokens."""


@dataclass(frozen=True)
class DenseConfig(MethodConfig):
    """The plain cache has nothing to set."""

    def estimate(self, shape: ModelShape, num_tokens: int) -> dict[str, int]:
        return {"window": shape.fp16_bytes(num_tokens), "tables": shape.num_layers * 4}


@register(
    "dense",
    title="fp16, exact",
    summary="Every key and value in 16 bits: what a model does without compression.",
    source="The usual cache, with the fastest dense attention of this machine",
    config=DenseConfig,
    presets={"fp16, exact": DenseConfig()},
)
class DenseCache(KVCache):
    """Contiguous buffers. Shapes: keys and values of a layer `[B, HK, capacity, D]`."""

    def __init__(self, shape: ModelShape, config: DenseConfig, **options: Any) -> None:
        super().__init__(shape, config, **options)
        self._capacity = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._lengths = torch.empty(0)

    def reserve(self, num_tokens: int) -> None:
        if not self._lengths.numel():
            self._lengths = self.allocate(self.shape.num_layers, self.max_rows, dtype=torch.int32).zero_()
        if num_tokens <= self._capacity:
            return
        capacity = _in_blocks(max(num_tokens, self._capacity * 3 // 2))
        self._keys = [self._grown(layer, self._keys, capacity) for layer in range(self.shape.num_layers)]
        self._values = [self._grown(layer, self._values, capacity) for layer in range(self.shape.num_layers)]
        self._capacity = capacity
        if not self.steps_on_device:  # else one kernel takes every step; measuring others would cost a layer's memory
            prepare(self._keys[0], num_query_heads=self.shape.num_query_heads)

    def _grown(self, layer: int, buffers: list[torch.Tensor], capacity: int) -> torch.Tensor:
        shape = self.shape
        grown = self.allocate(self.max_rows, shape.num_kv_heads, capacity, shape.head_dim, dtype=self.dtype)
        if self.max_rows > 1:
            # A shorter sequence's unwritten tail enters a batched product with weight 0, and 0 * NaN is NaN.
            grown.zero_()
        if buffers:
            grown[:, :, : self._capacity] = buffers[layer]
            self.discard(buffers[layer])
        return grown

    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        start = self.lengths[layer][row]
        stop = start + keys.shape[1]
        self._keys[layer][row, :, start:stop] = keys
        self._values[layer][row, :, start:stop] = values
        self._lengths[layer][row] = stop

    def step(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        lengths = self.lengths[layer]
        (all_keys, all_values), on_device = self._buffers(layer)
        for row, length in enumerate(lengths):
            all_keys[row, :, length] = keys[row]
            all_values[row, :, length] = values[row]
            lengths[row] = length + 1
        on_device.add_(1)
        return dense_attend(
            query, all_keys, all_values, on_device, scaling=scaling, longest=max(lengths),
            is_ragged=min(lengths) != max(lengths),
        )  # fmt: skip

    def _buffers(self, layer: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Keys and values of a layer, and lengths, for the rows that take part in a step."""
        rows = slice(self.num_rows)
        return (self._keys[layer][rows], self._values[layer][rows]), self._lengths[layer, rows]

    def step_on_device(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        return step_on_device(query, keys, values, *self._buffers(layer), scaling=scaling)

    @property
    def device_lengths(self) -> torch.Tensor:
        return self._lengths[:, : self.num_rows]

    def step_key(self) -> Hashable | None:
        key = self._memory.num_allocations, self.num_rows
        if self.steps_on_device:
            return key
        keys, longest = self._keys[0][: self.num_rows], max(self.lengths[0]) + 1
        return key if takes_tasks(keys, num_query_heads=self.shape.num_query_heads, longest=longest) else None

    def step_tasks(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, *,
        scaling: float,
    ) -> list[Any]:  # fmt: skip
        return step_tasks(query, keys, values, output, *self._buffers(layer), scaling=scaling)

    def rebuild(self, layer: int, row: int, start: int, stop: int) -> Tile:
        return Tile(self._keys[layer][row, :, start:stop], self._values[layer][row, :, start:stop])

    def parts(self) -> dict[str, int]:
        if not self._keys:
            return {"window": 0, "tables": 0}
        token = 2 * self._keys[0][0, :, 0].nbytes
        return {
            "window": token * sum(map(sum, self.lengths)),
            "tables": self._lengths.nbytes,
        }

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self._keys, *self._values, self._lengths)

    def save(self) -> Any:
        """Nothing: what comes later never overwrites what is stored."""

    def restore(self, saved: Any, lengths: list[int]) -> None:
        self.device_lengths.copy_(torch.tensor(lengths, dtype=torch.int32))

    def release(self) -> None:
        self._keys, self._values, self._lengths, self._capacity = [], [], torch.empty(0), 0

    def _rows_that_fit(self, max_tokens: int, limit_bytes: int) -> int:
        return min(
            self.max_rows, limit_bytes // (self.shape.fp16_bytes(_in_blocks(max_tokens)) + self.shape.num_layers * 4)
        )

    def _open(self, max_tokens: int, limit_bytes: int | None) -> None:
        """A row has room for the longest sequence, whatever comes."""
        self.reserve(max_tokens)

    def _has_room(self, promised: list[int]) -> bool:
        return max(promised) <= self._capacity

    def _take_row(self, row: int, other: Self) -> None:
        for layer, (length, *_) in enumerate(other.lengths):
            self._keys[layer][row, :, :length] = other._keys[layer][0, :, :length]
            self._values[layer][row, :, :length] = other._values[layer][0, :, :length]
        self._lengths[:, row] = other._lengths[:, 0]

    def _clear_row(self, row: int) -> None:
        self._lengths[:, row] = 0

    @property
    def attention_path(self) -> str:
        return chosen_path(self.device)


def _in_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
