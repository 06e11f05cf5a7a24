"""KIVI: keys quantized per channel, values per token, the newest tokens exact (arXiv 2402.02750).

Source: the paper and its authors' code (github.com/jy-yuan/KIVI, MIT). Keys are quantized after RoPE, in
groups of `group_size` consecutive tokens of one channel, a block of `residual_length` tokens at a time,
after the step in which the block fills. Values are quantized in groups of consecutive channels of one
token as soon as the token is more than `residual_length` tokens old. Prefill attends exactly.
With n tokens, floor(n / R) * R keys and max(0, n - R) values are packed: a pure function of n.

Departures, each an option that the `paper` presets leave alone: `value_flush` > 1 packs values in blocks
and so keeps a few more exact; `num_sinks` > 0 keeps the first tokens exact. All-equal groups, which divide
0 by 0 in the authors' code, are guarded.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch

from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig, setting
from kvlens.engine.footprint import CacheView
from kvlens.engine.registry import register
from kvlens.engine.segments import Tile
from kvlens.engine.shape import ModelShape
from kvlens.engine.storage import ExactWindow, PagePool, PageTable, Ring
from kvlens.kernels import dispatch
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout, packed_attend
from kvlens.kernels.packed_attend.tasks import step_tasks
from kvlens.kernels.quantize_pack import Packed, check_layout, dequantize, quantize_pack, unpack

PAGE_TOKENS = 128
"""A page holds a flush block, or as large a part of it as still packs into runs of one group."""

SCALE_BYTES = 4
"""An fp16 scale and an fp16 minimum for every group."""


@dataclass(frozen=True)
class KiviConfig(MethodConfig):
    """Settings of KIVI. The defaults are the authors'."""

    key_bits: int = setting(2, label="Key bits", unit="bits", choices=(2, 4), help="Bits of a key's code.")
    value_bits: int = setting(2, label="Value bits", unit="bits", choices=(2, 4), help="Bits of a value's code.")
    group_size: int = setting(
        32, label="Group size G", unit="values", choices=(32, 64, 128),
        help="How many neighbours share a scale and a minimum. Smaller is finer and costs more bytes.",
    )  # fmt: skip
    value_group_size: int = setting(
        0, label="Value group size", unit="values", choices=(0, 8, 16, 32, 64, 128),
        help="Group size of the values, which must divide the head. 0 takes G, or what of it fits the head.",
    )  # fmt: skip
    residual_length: int = setting(
        128, label="Residual length R", unit="tokens", minimum=32, maximum=1024, step=32,
        help="How many of the newest tokens stay exact. A multiple of the group size.",
    )  # fmt: skip
    value_flush: int = setting(
        1, label="Value flush", unit="tokens", choices=(1, 8, 32, 128),
        help="How many values are packed at a time. 1 is the paper; more keeps a few more exact.",
    )  # fmt: skip
    num_sinks: int = setting(
        0, label="Sinks", unit="tokens", minimum=0, maximum=64, step=1,
        help="First tokens that stay exact for ever. 0 is the paper.",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual_length % self.group_size != 0:
            raise ValueError(
                f"residual_length must be a multiple of group_size ({self.group_size}); "
                f"got {self.residual_length}. Choose {self.group_size}, {2 * self.group_size}, ..."
            )

    def value_group(self, head_dim: int) -> int:
        """Channels that share a scale: as set, or the largest that divides both the head and G."""
        return self.value_group_size or gcd(self.group_size, head_dim)

    def layout(self, head_dim: int) -> PageLayout:
        """How pages store tokens: the largest page up to PAGE_TOKENS whose word runs stay in one group."""
        pages = range(self.group_size, min(self.residual_length, PAGE_TOKENS) + 1, self.group_size)
        fitting = (
            page for page in pages
            if self.residual_length % page == 0 and self.group_size % (page * self.key_bits // 16) == 0
        )  # fmt: skip
        return PageLayout(max(fitting), self.key_bits, self.value_bits, self.group_size, self.value_group(head_dim))

    def num_packed_keys(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.num_sinks) // self.residual_length * self.residual_length

    def num_packed_values(self, num_tokens: int) -> int:
        old = max(0, num_tokens - self.num_sinks - self.residual_length)
        return old // self.value_flush * self.value_flush

    def check(self, shape: ModelShape) -> None:
        group = self.value_group(shape.head_dim)
        if shape.head_dim % group != 0:
            raise ValueError(
                f"value_group_size must divide the head of {shape.head_dim} channels; got {group}. "
                "0 chooses one that does."
            )
        check_layout(shape.head_dim, bits=self.value_bits, group_size=group)

    def estimate(self, shape: ModelShape, num_tokens: int) -> dict[str, int]:
        heads, dim = shape.num_layers * shape.num_kv_heads, shape.head_dim
        keys, values = self.num_packed_keys(num_tokens), self.num_packed_values(num_tokens)
        sinks = min(self.num_sinks, num_tokens)
        groups = keys * dim // self.group_size + values * dim // self.value_group(dim)
        num_pages = keys // self.layout(dim).page_tokens
        return {
            "codes": heads * dim * (keys * self.key_bits + values * self.value_bits) // 8,
            "scales": heads * groups * SCALE_BYTES,
            "window": heads * dim * (2 * (num_tokens - sinks) - keys - values) * 2,
            "sinks": heads * dim * sinks * 2 * 2,
            "tables": shape.num_layers * (num_pages + 3) * 4,
        }

    def describe(self) -> str:
        bits = f"{self.key_bits}" if self.key_bits == self.value_bits else f"K{self.key_bits} V{self.value_bits}"
        return f"{bits} bit · G {self.group_size} · R {self.residual_length}"


@register(
    "kivi",
    title="KIVI",
    summary="Keys quantized per channel, values per token, the newest tokens exact.",
    source="Liu et al., KIVI, ICML 2024, arXiv 2402.02750",
    config=KiviConfig,
    presets={
        "KIVI-2 (paper)": KiviConfig(),
        "KIVI-4 (paper)": KiviConfig(key_bits=4, value_bits=4),
        "KIVI-2, R 32": KiviConfig(residual_length=32),
        "KIVI-2, G 128 with sinks": KiviConfig(group_size=128, num_sinks=4),
        "K 4 bit, V 2 bit": KiviConfig(key_bits=4),
    },
)
class KiviCache(KVCache):
    """Pages of codes behind an exact window. Shapes of a page: see `PackedPast`."""

    config: KiviConfig

    def __init__(self, shape: ModelShape, config: KiviConfig, **options: Any) -> None:
        super().__init__(shape, config, **options)
        self.layout = config.layout(shape.head_dim)
        heads, dim, layout = shape.num_kv_heads, shape.head_dim, self.layout
        key_row = (heads, dim, layout.page_tokens * layout.key_bits // 16)
        key_groups = (heads, dim, layout.page_tokens // layout.key_group_size)
        value_row = (heads, layout.page_tokens, dim * layout.value_bits // 16)
        value_groups = (heads, layout.page_tokens, dim // layout.value_group_size)
        pool = PagePool(
            {
                "key_codes": (key_row, torch.int16),
                "key_scale": (key_groups, torch.float16),
                "key_minimum": (key_groups, torch.float16),
                "value_codes": (value_row, torch.int16),
                "value_scale": (value_groups, torch.float16),
                "value_minimum": (value_groups, torch.float16),
            },
            allocate=self.allocate,
            discard=self.discard,
        )
        self._table = PageTable(shape.num_layers, self.num_rows, pool, allocate=self.allocate, discard=self.discard)
        self._layers: list[ExactWindow] = []
        self._due_values = np.zeros(self.num_rows, dtype=np.int32)
        self._is_unobserved = False

    # ------------------------------------------------------------------ storing

    def reserve(self, num_tokens: int) -> None:
        if not self._layers:
            self._allocate_layers()
        self._table.reserve(self.config.num_packed_keys(num_tokens) // self.layout.page_tokens)

    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = self.lengths[layer][row]
        after = before + keys.shape[1]
        state = self._layers[layer]
        state.write_sinks(row, before, keys, values)
        keys = self._with_window(state.keys, row, self.config.num_packed_keys(before), before, keys)
        values = self._with_window(state.values, row, self.config.num_packed_values(before), before, values)
        keys = self._pack_keys(layer, row, keys, before, after)
        values = self._pack_values(layer, row, values, before, after)
        state.keys.write(row, after - keys.shape[1], keys)
        state.values.write(row, after - values.shape[1], values)
        self._set_lengths(layer, row, after)

    def step(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        state, config = self._layers[layer], self.config
        lengths = self.lengths[layer]
        if min(lengths) < config.num_sinks:
            return super().step(layer, query, keys, values, scaling=scaling)
        for row, length in enumerate(lengths):
            state.keys.tensor[row, :, length % state.keys.capacity] = keys[row]
            state.values.tensor[row, :, length % state.values.capacity] = values[row]
        state.length.add_(1)
        output = packed_attend(query, *self._stored(layer), scaling=scaling).output
        for row, length in enumerate(lengths):
            self._flush(layer, row, length, length + 1)
            lengths[row] = length + 1
        return output

    def _stored(self, layer: int) -> tuple[PackedPast, ExactTokens]:
        """A layer as the kernels take it."""
        state = self._layers[layer]
        past = PackedPast(
            self.layout,
            self._packed("key"),
            self._packed("value"),
            self._table.tensor[layer],
            state.num_keys,
            state.num_values,
        )
        return past, ExactTokens(
            state.keys.tensor, state.values.tensor, state.sink_keys, state.sink_values, state.length
        )

    def step_key(self) -> Hashable | None:
        if min(self.lengths[0]) < self.config.num_sinks:
            return None
        for row, length in enumerate(self.lengths[0]):
            self._due_values[row] = self.config.num_packed_values(length + 1)
        return self._num_allocations

    def step_tasks(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, *,
        scaling: float,
    ) -> list[Any]:  # fmt: skip
        return step_tasks(
            query, keys, values, output, *self._stored(layer), scaling=scaling,
            due_values=torch.from_numpy(self._due_values),
        )  # fmt: skip

    def end_tasks(self) -> None:
        """Values are packed by the tasks; a block of keys is packed here when it is full."""
        super().end_tasks()
        self._is_unobserved = self.probe is not None
        for row, after in enumerate(self.lengths[0]):
            if self.config.num_packed_keys(after) > self.config.num_packed_keys(after - 1):
                for layer in range(self.shape.num_layers):
                    self._flush_keys(layer, row, after - 1, after)

    def observe(self) -> None:
        """The values that the tasks packed are still in the ring."""
        if not self._is_unobserved:
            return
        self._is_unobserved = False
        after = self.lengths[0][0]
        packed, due = self.config.num_packed_values(after - 1), self.config.num_packed_values(after)
        first = self.config.num_sinks + packed
        for layer in range(self.shape.num_layers if due > packed else 0):
            block = self._layers[layer].values.read(0, first, first + due - packed)
            self._observe(layer, 0, 1, first, block)

    def _flush(self, layer: int, row: int, before: int, after: int) -> None:
        """Pack what the step from `before` to `after` tokens has pushed out of the exact window."""
        state, sinks = self._layers[layer], self.config.num_sinks
        self._flush_keys(layer, row, before, after)
        packed, due = self.config.num_packed_values(before), self.config.num_packed_values(after)
        if due > packed:
            self._pack_values(layer, row, state.values.read(row, sinks + packed, sinks + due), before, after)
            state.num_values[row] = due

    def _flush_keys(self, layer: int, row: int, before: int, after: int) -> None:
        state, sinks = self._layers[layer], self.config.num_sinks
        packed, due = self.config.num_packed_keys(before), self.config.num_packed_keys(after)
        if due > packed:
            self._pack_keys(layer, row, state.keys.read(row, sinks + packed, sinks + due), before, after)
            state.num_keys[row] = due

    def _with_window(self, ring: Ring, row: int, num_packed: int, before: int, fresh: torch.Tensor) -> torch.Tensor:
        """Every exact token that is not a sink: the window, then the fresh ones. Shapes: `[HK, T, D]`."""
        first = self.config.num_sinks + num_packed
        if before <= first:
            return fresh[:, first - before :]
        return torch.cat([ring.read(row, first, before).to(fresh.dtype), fresh], dim=1)

    def _pack_keys(self, layer: int, row: int, keys: torch.Tensor, before: int, after: int) -> torch.Tensor:
        """Pack the keys due when `after` tokens are stored; `keys` begins at the first exact one. Gives the rest."""
        packed, due = self.config.num_packed_keys(before), self.config.num_packed_keys(after)
        count = due - packed
        if count == 0:
            return keys
        block = keys[:, :count].to(self.dtype)
        pages = self._table.add(layer, row, count // self.layout.page_tokens)
        rows = block.unflatten(1, (-1, self.layout.page_tokens)).permute(1, 0, 3, 2)
        codes = quantize_pack(rows, bits=self.layout.key_bits, group_size=self.layout.key_group_size)
        self._packed("key")[pages] = codes
        self._observe(layer, row, 0, self.config.num_sinks + packed, block)
        return keys[:, count:]

    def _pack_values(self, layer: int, row: int, values: torch.Tensor, before: int, after: int) -> torch.Tensor:
        """The same for values, which are packed token by token into the pages of the keys."""
        packed, due = self.config.num_packed_values(before), self.config.num_packed_values(after)
        count = due - packed
        if count == 0:
            return values
        block = values[:, :count].to(self.dtype)
        codes = quantize_pack(block, bits=self.layout.value_bits, group_size=self.layout.value_group_size)
        pages, store = self._table.of(layer, row), self._packed("value")
        done = 0
        while done < count:
            page, slot = divmod(packed + done, self.layout.page_tokens)
            room = min(count - done, self.layout.page_tokens - slot)
            store[pages[page], :, slot : slot + room] = codes[:, done : done + room]
            done += room
        self._observe(layer, row, 1, self.config.num_sinks + packed, block)
        return values[:, count:]

    def _observe(self, layer: int, row: int, side: int, first_token: int, exact: torch.Tensor) -> None:
        if self.probe is not None and row == 0:
            self.probe.stage(layer, side, first_token, exact)

    # ------------------------------------------------------------------ reading

    def rebuild(self, layer: int, row: int, start: int, stop: int) -> Tile:
        state, length, config = self._layers[layer], self.lengths[layer][row], self.config
        keys = self._rebuild_side(
            state.sink_keys[row], state.keys, row, self._packed_keys(layer, row, start, stop),
            config.num_packed_keys(length), start, stop,
        )  # fmt: skip
        values = self._rebuild_side(
            state.sink_values[row], state.values, row, self._packed_values(layer, row, start, stop),
            config.num_packed_values(length), start, stop,
        )  # fmt: skip
        return Tile(keys, values)

    def _rebuild_side(
        self, sinks: torch.Tensor, ring: Ring, row: int, packed: torch.Tensor, num_packed: int,
        start: int, stop: int,
    ) -> torch.Tensor:  # fmt: skip
        num_sinks = self.config.num_sinks
        first_exact = max(start, num_sinks + num_packed)
        pieces = [sinks[:, start : min(stop, num_sinks)].float(), packed]
        if first_exact < stop:
            pieces.append(ring.read(row, first_exact, stop).float())
        return torch.cat(pieces, dim=1)

    def _packed_keys(self, layer: int, row: int, start: int, stop: int) -> torch.Tensor:
        """The packed ones among the keys start..stop-1, in fp32. Shapes: `[HK, t, D]`."""
        count = self.config.num_packed_keys(self.lengths[layer][row])
        pages, first, last = self._page_range(layer, row, count, start, stop)
        rows = dequantize(self._packed("key")[pages], bits=self.layout.key_bits, group_size=self.layout.key_group_size)
        return rows.permute(1, 0, 3, 2).flatten(1, 2)[:, first:last]

    def _packed_values(self, layer: int, row: int, start: int, stop: int) -> torch.Tensor:
        count = self.config.num_packed_values(self.lengths[layer][row])
        pages, first, last = self._page_range(layer, row, count, start, stop)
        rows = dequantize(
            self._packed("value")[pages], bits=self.layout.value_bits, group_size=self.layout.value_group_size
        )
        return rows.transpose(0, 1).flatten(1, 2)[:, first:last]

    def _page_range(self, layer: int, row: int, num_packed: int, start: int, stop: int) -> tuple[list[int], int, int]:
        """Pages that hold the packed ones among tokens start..stop-1, and where these lie in them."""
        first = min(max(start - self.config.num_sinks, 0), num_packed)
        last = min(max(stop - self.config.num_sinks, 0), num_packed)
        page_tokens = self.layout.page_tokens
        skipped = first // page_tokens
        pages = self._table.of(layer, row)[skipped : -(-last // page_tokens)] if last > first else []
        return pages, first - skipped * page_tokens, last - skipped * page_tokens

    def view(self, layer: int, head: int, row: int = 0) -> CacheView:
        exact = super().view(layer, head, row)
        length = self.lengths[layer][row]
        num_keys, num_values = self.config.num_packed_keys(length), self.config.num_packed_values(length)
        pages, tensors = self._table.of(layer, row), self._table.pool.tensors
        key_codes = unpack(tensors["key_codes"][pages, head], bits=self.layout.key_bits)
        value_codes = unpack(tensors["value_codes"][pages, head], bits=self.layout.value_bits)
        return CacheView(
            exact.keys,
            exact.values,
            num_sinks=min(self.config.num_sinks, length),
            num_packed_keys=num_keys,
            num_packed_values=num_values,
            key_codes=key_codes.transpose(1, 2).flatten(0, 1)[:num_keys].to(torch.uint8).cpu().numpy(),
            value_codes=value_codes.flatten(0, 1)[:num_values].to(torch.uint8).cpu().numpy(),
        )

    @property
    def attention_path(self) -> str:
        return f"{dispatch.describe('packed_attend', self.device)} on packed codes"

    # ------------------------------------------------------------------ bytes

    def parts(self) -> dict[str, int]:
        live = dict.fromkeys(("codes", "scales", "window", "sinks", "tables"), 0)
        if not self._layers:
            return live
        tensors, page = self._table.pool.tensors, self.layout.page_tokens
        exact_token = self._layers[0].keys.tensor[0, :, 0].nbytes
        for layer, rows in enumerate(self.lengths):
            for row, length in enumerate(rows):
                keys, values = self.config.num_packed_keys(length), self.config.num_packed_values(length)
                sinks = min(self.config.num_sinks, length)
                for side, count in (("key", keys), ("value", values)):
                    codes, scale = tensors[f"{side}_codes"], tensors[f"{side}_scale"]
                    live["codes"] += codes[0].nbytes * count // page if count else 0
                    live["scales"] += 2 * scale[0].nbytes * count // page if count else 0
                live["window"] += (2 * (length - sinks) - keys - values) * exact_token
                live["sinks"] += 2 * sinks * exact_token
                live["tables"] += (len(self._table.of(layer, row)) + 3) * 4
        return live

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (*self._table.pool.tensors.values(), self._table.tensor)
        for state in self._layers:
            yield from state.tensors()

    # ------------------------------------------------------------------ going back, and the end

    def save(self) -> Any:
        sinks = self.config.num_sinks
        return [
            [
                (
                    state.keys.read(row, sinks + self.config.num_packed_keys(length), length).clone(),
                    state.values.read(row, sinks + self.config.num_packed_values(length), length).clone(),
                )
                if length > sinks
                else None
                for row, length in enumerate(self.lengths[layer])
            ]
            for layer, state in enumerate(self._layers)
        ]

    def restore(self, saved: Any, lengths: list[int]) -> None:
        for layer, rows in enumerate(saved):
            state = self._layers[layer]
            for row, window in enumerate(rows):
                length = lengths[row]
                kept = self.config.num_packed_keys(length) // self.layout.page_tokens
                self._table.cut(layer, row, kept)
                if window is not None:
                    keys, values = window
                    state.keys.write(row, length - keys.shape[1], keys)
                    state.values.write(row, length - values.shape[1], values)
                self._set_lengths(layer, row, length)

    def release(self) -> None:
        self._table.release()
        self._layers = []

    # ------------------------------------------------------------------ inside

    def _packed(self, side: str) -> Packed:
        tensors = self._table.pool.tensors
        return Packed(tensors[f"{side}_codes"], tensors[f"{side}_scale"], tensors[f"{side}_minimum"])

    def _allocate_layers(self) -> None:
        self._layers = [
            ExactWindow(
                self.num_rows,
                self.shape.num_kv_heads,
                self.shape.head_dim,
                key_capacity=self.config.residual_length,
                value_capacity=self.config.residual_length + self.config.value_flush,
                num_sinks=self.config.num_sinks,
                dtype=self.dtype,
                allocate=self.allocate,
            )
            for _ in range(self.shape.num_layers)
        ]

    def _set_lengths(self, layer: int, row: int, length: int) -> None:
        keys, values = self.config.num_packed_keys(length), self.config.num_packed_values(length)
        self._layers[layer].set_lengths(row, length, keys, values)
