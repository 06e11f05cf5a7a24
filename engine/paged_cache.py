"""A cache of packed pages between exact sinks and an exact window: what KIVI, CSR and their like have in common.

A sequence is `sinks exact tokens | packed pages | exact window`. How a token is packed, and what attends to it, is
the method's; where it lies, what is due, going back and giving back is here. What is packed is a pure
function of the length: bytes are a formula, and going back is cutting lists.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterator
from functools import cached_property
from math import ceil
from typing import Any, Self

import torch

from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig
from kvlens.engine.segments import Tile
from kvlens.engine.storage import ExactWindow, PagePool, PageTable, around, exact_since
from kvlens.kernels.append_pack import FlushRule, append_pack
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import PackedPast


class PagedConfig(MethodConfig):
    """Settings of a paged cache. `num_sinks` first tokens stay exact; packed tokens follow them."""

    num_sinks: int

    @cached_property
    def flush_rule(self) -> FlushRule:
        """When a token leaves the exact window."""
        raise NotImplementedError

    def num_packed(self, side: int, num_tokens: int) -> int:
        """How many keys (side 0) or values (side 1) of `num_tokens` tokens are packed."""
        return self.flush_rule.packed(side, num_tokens)


class PagedCache(KVCache):
    """Pages behind exact windows. A method calls `_lay_out` when it is made, and implements the rest."""

    config: PagedConfig

    def _lay_out(
        self,
        page: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        page_tokens: int,
        key_capacity: int,
        value_capacity: int,
    ) -> None:
        """Say what a page holds (see `PagePool`) and how many exact tokens the windows must take."""
        pool = PagePool(page, allocate=self.allocate, discard=self.discard)
        self._table = PageTable(
            self.shape.num_layers, self.max_rows, pool, allocate=self.allocate, discard=self.discard
        )
        self._page_tokens = page_tokens
        self._capacities = {"key_capacity": key_capacity, "value_capacity": value_capacity}
        self._layers: list[ExactWindow] = []
        self._counts = torch.empty(0)
        self._counts_lag = False

    @abstractmethod
    def _pack(self, layer: int, row: int, side: int, packed: int, tokens: torch.Tensor) -> None:
        """Pack exact keys (side 0) or values behind the `packed` ones. Shapes: tokens `[HK, t, D]`."""

    @abstractmethod
    def _unpack(self, layer: int, row: int, side: int, first: int, stop: int) -> torch.Tensor:
        """Packed keys or values first..stop-1, in fp32, as attention sees them. Shapes: `[HK, stop - first, D]`."""

    @abstractmethod
    def _attend_pages(self, layer: int, query: torch.Tensor, *, scaling: float) -> torch.Tensor:
        """Attention over pages and exact tokens in one call. Shapes: `[B, HQ, D]` → `[B, HQ, D]`."""

    def _packs_on_device(self, layer: int) -> PackedPast | None:
        """Where `append_pack` packs what is due in a step on the device; None where the host has it packed."""
        return None

    def _reads_pages(self, layer: int) -> bool:
        """Whether a step may call `_attend_pages`: kernels take the first tokens for sinks, so all must be there."""
        return min((self.lengths[layer][row] for row in self.rows), default=0) >= self.config.num_sinks

    # ------------------------------------------------------------------ storing

    def reserve(self, num_tokens: int) -> None:
        self._reserve_windows()
        self._table.reserve(self._num_pages(num_tokens))

    def _reserve_windows(self) -> None:
        if not self._layers:
            self._counts = self.allocate(3, self.shape.num_layers, self.max_rows, dtype=torch.int32).zero_()
            self._layers = [
                ExactWindow(
                    self.max_rows,
                    self.shape.num_kv_heads,
                    self.shape.head_dim,
                    num_sinks=self.config.num_sinks,
                    counts=self._counts[:, layer],
                    dtype=self.dtype,
                    allocate=self.allocate,
                    **self._capacities,
                )
                for layer in range(self.shape.num_layers)
            ]

    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = self.lengths[layer][row]
        after = before + keys.shape[1]
        state = self._layers[layer]
        state.write_sinks(row, before, keys, values)
        for side, (ring, fresh) in enumerate(((state.keys, keys), (state.values, values))):
            packed, due = (self.config.num_packed(side, length) for length in (before, after))
            exact = exact_since(ring, row, self.config.num_sinks + packed, before, fresh)
            if due > packed:
                self._pack_and_observe(layer, row, side, packed, exact[:, : due - packed].to(self.dtype))
            ring.write(row, self.config.num_sinks + due, exact[:, due - packed :])
        self._set_lengths(layer, row, after)

    def step(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        if not self._reads_pages(layer):
            return super().step(layer, query, keys, values, scaling=scaling)
        self._settle_counts()
        self._write_window(layer, keys, values)
        output = self._attend_pages(layer, query, scaling=scaling)
        lengths = self.lengths[layer]
        for row in range(self.num_rows):
            lengths[row] += 1
            self._flush(layer, row, lengths[row])
        return output

    def step_on_device(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        append_pack(keys, values, self._exact(layer), self.config.flush_rule, self._packs_on_device(layer))
        return self._attend_pages(layer, query, scaling=scaling)

    def begin_step(self) -> Hashable | None:
        """On the device a step takes the pages that it needs from the table."""
        key = super().begin_step()
        if key is not None and self.steps_on_device:
            for row, length in enumerate(self.lengths[0]):
                self._table.extend(row, self._num_pages(length + 1))
        return key

    def end_tasks(self) -> None:
        super().end_tasks()
        self._counts_lag = self.steps_on_device

    def _settle_counts(self) -> None:
        """A step on the device leaves the counts as its attention read them: one token behind."""
        if not self._counts_lag:
            return
        self._counts_lag = False
        packed = [
            [[self.config.num_packed(side, length) for length in rows] for rows in self.lengths] for side in range(2)
        ]
        self._counts[1:, :, : self.num_rows] = torch.tensor(packed, dtype=torch.int32)

    @property
    def device_lengths(self) -> torch.Tensor:
        return self._counts[0, :, : self.num_rows]

    def _flush(self, layer: int, row: int, after: int) -> None:
        """Pack what the step to `after` tokens has pushed out of the exact window."""
        for side in range(2):
            self._flush_side(layer, row, side, after)

    def _flush_side(self, layer: int, row: int, side: int, after: int) -> None:
        packed, due = (self.config.num_packed(side, length) for length in (after - 1, after))
        if due > packed:
            state, sinks = self._layers[layer], self.config.num_sinks
            ring, counts = ((state.keys, state.num_keys), (state.values, state.num_values))[side]
            self._pack_and_observe(layer, row, side, packed, ring.read(row, sinks + packed, sinks + due))
            counts[row] = due

    def _pack_and_observe(self, layer: int, row: int, side: int, packed: int, tokens: torch.Tensor) -> None:
        missing = ceil((packed + tokens.shape[1]) / self._page_tokens) - len(self._table.of(layer, row))
        if missing > 0:
            self._table.add(layer, row, missing)
        self._pack(layer, row, side, packed, tokens)
        self._observe(layer, row, side, packed, tokens)

    def _observe(self, layer: int, row: int, side: int, packed: int, tokens: torch.Tensor) -> None:
        if self.probe is not None and row == 0:
            self.probe.stage(layer, side, self.config.num_sinks + packed, tokens)

    def _write_window(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """One more exact token of each row, which `lengths` does not count yet. Shapes: `[B, HK, D]`."""
        state = self._layers[layer]
        for row, length in enumerate(self.lengths[layer]):
            state.keys.tensor[row, :, length % state.keys.capacity] = keys[row]
            state.values.tensor[row, :, length % state.values.capacity] = values[row]
        state.length[: self.num_rows].add_(1)

    # ------------------------------------------------------------------ reading

    def rebuild(self, layer: int, row: int, start: int, stop: int) -> Tile:
        state, length, sinks = self._layers[layer], self.lengths[layer][row], self.config.num_sinks
        sides = ((state.sink_keys, state.keys), (state.sink_values, state.values))
        tokens = []
        for side, (first_tokens, ring) in enumerate(sides):
            packed = self.config.num_packed(side, length)
            first, last = (min(max(edge - sinks, 0), packed) for edge in (start, stop))
            rebuilt = self._unpack(layer, row, side, first, last)
            tokens.append(
                around(first_tokens[row], ring, row, rebuilt, first_exact=sinks + packed, start=start, stop=stop)
            )
        return Tile(*tokens)

    def _exact(self, layer: int) -> ExactTokens:
        """The exact tokens of a layer as kernels take them."""
        state = self._layers[layer]
        tensors = state.keys.tensor, state.values.tensor, state.sink_keys, state.sink_values, state.length
        return ExactTokens(*(tensor[: self.num_rows] for tensor in tensors))

    def _packed_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pages of each sequence, and how many keys and values they hold. Shapes: `[B, M]`, `[B]`, `[B]`."""
        state = self._layers[layer]
        tensors = self._table.tensor[layer], state.num_keys, state.num_values
        return tuple(tensor[: self.num_rows] for tensor in tensors)

    # ------------------------------------------------------------------ bytes

    def _count_exact(self, live: dict[str, int]) -> None:
        """Add window, sinks and tables of everything stored to `live`."""
        exact_token = self._layers[0].keys.tensor[0, :, 0].nbytes
        for layer, rows in enumerate(self.lengths):
            for row, length in enumerate(rows):
                sinks = min(self.config.num_sinks, length)
                packed = sum(self.config.num_packed(side, length) for side in range(2))
                live["window"] += (2 * (length - sinks) - packed) * exact_token
                live["sinks"] += 2 * sinks * exact_token
                live["tables"] += (len(self._table.of(layer, row)) + 3) * 4

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self._table.pool.tensors.values(), self._table.tensor, self._counts)
        for state in self._layers:
            yield from state.tensors()

    # ------------------------------------------------------------------ going back, and the end

    def save(self) -> Any:
        sinks = self.config.num_sinks
        return [
            [
                tuple(
                    ring.read(row, sinks + self.config.num_packed(side, length), length).clone()
                    for side, ring in enumerate((state.keys, state.values))
                )
                if length > sinks
                else None
                for row, length in enumerate(self.lengths[layer])
            ]
            for layer, state in enumerate(self._layers)
        ]

    def restore(self, saved: Any, lengths: list[int]) -> None:
        self._counts_lag = False
        for layer, rows in enumerate(saved):
            state = self._layers[layer]
            for row, window in enumerate(rows):
                self._table.cut(layer, row, self._num_pages(lengths[row]))
                for ring, tokens in zip((state.keys, state.values), window or (), strict=False):
                    ring.write(row, lengths[row] - tokens.shape[1], tokens)
                self._set_lengths(layer, row, lengths[row])

    def release(self) -> None:
        self._table.release()
        self._layers, self._counts, self._counts_lag = [], torch.empty(0), False

    # ------------------------------------------------------------------ sequences that join and leave

    def _row_bytes(self, max_tokens: int) -> int:
        """Bytes of a sequence without its pages."""
        tokens = sum(self._capacities.values()) + 2 * self.config.num_sinks
        exact = self.shape.num_kv_heads * self.shape.head_dim * tokens * self.dtype.itemsize
        return self.shape.num_layers * (exact + (self._num_pages(max_tokens) + 3) * 4)

    def _rows_that_fit(self, max_tokens: int, limit_bytes: int) -> int:
        pages = self.shape.num_layers * self._num_pages(max_tokens) * self._table.pool.page_bytes
        return max(0, min(self.max_rows, (limit_bytes - pages) // self._row_bytes(max_tokens)))

    def _open(self, max_tokens: int, limit_bytes: int | None) -> None:
        """What the rows leave of the bytes is pages, which the sequences share."""
        self._reserve_windows()
        num_layers, num_pages = self.shape.num_layers, self._num_pages(max_tokens)
        in_all = self.max_rows * num_pages
        if limit_bytes is not None:
            left = limit_bytes - self.max_rows * self._row_bytes(max_tokens)
            in_all = min(in_all, left // (num_layers * self._table.pool.page_bytes))
        self._table.reserve(num_pages, in_all=num_layers * in_all)

    def _has_room(self, promised: list[int]) -> bool:
        pages = self.shape.num_layers * sum(map(self._num_pages, promised))
        is_short = max(map(self._num_pages, promised)) <= self._table.tensor.shape[2]
        return is_short and pages <= self._table.pool.capacity

    def _take_row(self, row: int, other: Self) -> None:
        other._settle_counts()
        num_layers = self.shape.num_layers
        self._table.extend(row, len(other._table.of(0, 0)))
        mine, theirs = (
            [page for layer in range(num_layers) for page in table.of(layer, at)]
            for table, at in ((self._table, row), (other._table, 0))
        )
        for part, tensor in self._table.pool.tensors.items():
            tensor[mine] = other._table.pool.tensors[part][theirs]
        for window, its in zip(self._layers, other._layers, strict=True):
            window.take_row(row, its)
        self._counts[:, :, row] = other._counts[:, :, 0]

    def _clear_row(self, row: int) -> None:
        self._counts[:, :, row] = 0
        for layer in range(self.shape.num_layers):
            self._table.cut(layer, row, 0)

    # ------------------------------------------------------------------ inside

    def _num_pages(self, num_tokens: int) -> int:
        most = max(self.config.num_packed(side, num_tokens) for side in range(2))
        return ceil(most / self._page_tokens)

    def _set_lengths(self, layer: int, row: int, length: int) -> None:
        packed = (self.config.num_packed(side, length) for side in range(2))
        self._layers[layer].set_lengths(row, length, *packed)
