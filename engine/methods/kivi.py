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

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
import torch

from kvlens.engine.config import setting
from kvlens.engine.footprint import CacheView
from kvlens.engine.paged_cache import PagedCache, PagedConfig
from kvlens.engine.registry import register
from kvlens.engine.shape import ModelShape
from kvlens.kernels import dispatch
from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout, packed_attend
from kvlens.kernels.packed_attend.tasks import step_tasks
from kvlens.kernels.quantize_pack import Packed, check_layout, dequantize, quantize_pack, unpack

PAGE_TOKENS = 128
"""A page holds a flush block, or as large a part of it as still packs into runs of one group."""

SCALE_BYTES = 4
"""An fp16 scale and an fp16 minimum for every group."""


@dataclass(frozen=True)
class KiviConfig(PagedConfig):
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

    @cached_property
    def flush_rule(self) -> FlushRule:
        return FlushRule(
            self.num_sinks, key_window=0, key_flush=self.residual_length,
            value_window=self.residual_length, value_flush=self.value_flush,
        )  # fmt: skip

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
        keys, values = self.num_packed(0, num_tokens), self.num_packed(1, num_tokens)
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
class KiviCache(PagedCache):
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
        self._lay_out(
            {
                "key_codes": (key_row, torch.int16),
                "key_scale": (key_groups, torch.float16),
                "key_minimum": (key_groups, torch.float16),
                "value_codes": (value_row, torch.int16),
                "value_scale": (value_groups, torch.float16),
                "value_minimum": (value_groups, torch.float16),
            },
            page_tokens=layout.page_tokens,
            key_capacity=config.residual_length,
            value_capacity=config.residual_length + config.value_flush,
        )
        self._due_values = np.zeros(self.max_rows, dtype=np.int32)
        self._is_unobserved = False

    # ------------------------------------------------------------------ storing

    def _pack(self, layer: int, row: int, side: int, packed: int, tokens: torch.Tensor) -> None:
        """Keys fill whole pages; values go token by token into the pages of the keys."""
        layout, pages = self.layout, self._table.of(layer, row)
        if side == 0:
            rows = tokens.unflatten(1, (-1, layout.page_tokens)).permute(1, 0, 3, 2)
            first = packed // layout.page_tokens
            codes = quantize_pack(rows, bits=layout.key_bits, group_size=layout.key_group_size)
            self._packed("key")[pages[first : first + len(rows)]] = codes
            return
        codes = quantize_pack(tokens.transpose(0, 1), bits=layout.value_bits, group_size=layout.value_group_size)
        place = torch.arange(packed, packed + tokens.shape[1])
        page = torch.tensor(pages)[place // layout.page_tokens]
        self._packed("value")[page.to(self.device), :, (place % layout.page_tokens).to(self.device)] = codes

    def _attend_pages(self, layer: int, query: torch.Tensor, *, scaling: float) -> torch.Tensor:
        return packed_attend(query, *self._stored(layer), scaling=scaling).output

    def _stored(self, layer: int) -> tuple[PackedPast, ExactTokens]:
        """A layer as the kernels take it."""
        past = PackedPast(self.layout, self._packed("key"), self._packed("value"), *self._packed_rows(layer))
        return past, self._exact(layer)

    def step_key(self) -> Hashable | None:
        if not self._reads_pages(0):
            return None
        for row, length in enumerate(self.lengths[0]):
            self._due_values[row] = self.config.num_packed(1, length + 1)
        return self._memory.num_allocations, self.num_rows

    def step_tasks(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, *,
        scaling: float,
    ) -> list[Any]:  # fmt: skip
        return step_tasks(
            query, keys, values, output, *self._stored(layer), scaling=scaling,
            due_values=torch.from_numpy(self._due_values[: self.num_rows]),
        )  # fmt: skip

    def end_tasks(self) -> None:
        """The step has packed what was due on a device, and the values on a CPU; there full blocks of keys are left."""
        super().end_tasks()
        self._is_unobserved = self.probe is not None
        if self.steps_on_device:
            return
        for row, after in enumerate(self.lengths[0]):
            if self.config.num_packed(0, after) > self.config.num_packed(0, after - 1):
                for layer in range(self.shape.num_layers):
                    self._flush_side(layer, row, 0, after)

    def observe(self) -> None:
        """What a prepared step has packed is still in the rings."""
        if not self._is_unobserved:
            return
        self._is_unobserved = False
        for side in range(0 if self.steps_on_device else 1, 2):
            packed, due = (self.config.num_packed(side, self.lengths[0][0] - ago) for ago in (1, 0))
            first = self.config.num_sinks + packed
            for layer in range(self.shape.num_layers if due > packed else 0):
                state = self._layers[layer]
                ring = state.values if side else state.keys
                self._observe(layer, 0, side, packed, ring.read(0, first, first + due - packed))

    def _packs_on_device(self, layer: int) -> PackedPast:
        return self._stored(layer)[0]

    # ------------------------------------------------------------------ reading

    def _unpack(self, layer: int, row: int, side: int, first: int, stop: int) -> torch.Tensor:
        layout = self.layout
        skipped = first // layout.page_tokens
        pages = self._table.of(layer, row)[skipped : -(-stop // layout.page_tokens)] if stop > first else []
        at = slice(first - skipped * layout.page_tokens, stop - skipped * layout.page_tokens)
        if side == 0:
            rows = dequantize(self._packed("key")[pages], bits=layout.key_bits, group_size=layout.key_group_size)
            return rows.permute(1, 0, 3, 2).flatten(1, 2)[:, at]
        rows = dequantize(self._packed("value")[pages], bits=layout.value_bits, group_size=layout.value_group_size)
        return rows.transpose(0, 1).flatten(1, 2)[:, at]

    def view(self, layer: int, head: int, row: int = 0) -> CacheView:
        exact = super().view(layer, head, row)
        length = self.lengths[layer][row]
        num_keys, num_values = self.config.num_packed(0, length), self.config.num_packed(1, length)
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
        self._count_exact(live)
        tensors, page = self._table.pool.tensors, self.layout.page_tokens
        for length in (length for rows in self.lengths for length in rows):
            for side, name in enumerate(("key", "value")):
                count, scale = self.config.num_packed(side, length), tensors[f"{name}_scale"]
                live["codes"] += tensors[f"{name}_codes"][0].nbytes * count // page if count else 0
                live["scales"] += 2 * scale[0].nbytes * count // page if count else 0
        return live

    # ------------------------------------------------------------------ inside

    def _packed(self, side: str) -> Packed:
        tensors = self._table.pool.tensors
        return Packed(tensors[f"{side}_codes"], tensors[f"{side}_scale"], tensors[f"{side}_minimum"])
