"""What append-and-pack must do, whoever does it, told from whole histories: the state of every length is built anew.

A case is run step by step; after each, everything stored must equal, bit for bit and poison included, what the exact
history gives at that length. This module does not know which implementation is tested.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import NOWHERE, _spread, stored

from kvlens.kernels.append_pack import FlushRule
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import PackedPast, PageLayout
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.quantize_pack.reference import quantize_pack

UNSET = 12345  # a count that nobody has written

Step = Callable[[], None]
Prepare = Callable[[torch.Tensor, torch.Tensor, ExactTokens, FlushRule, PackedPast | None], Step]


@dataclass(frozen=True)
class AppendCase:
    """Sequences of `starts` tokens take `num_steps` more each. One of -1 is still of length 0 after the first."""

    name: str
    starts: tuple[int, ...]
    num_steps: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    key_bits: int = 2
    value_bits: int = 2
    page_tokens: int = 32
    key_group_size: int = 32
    value_group_size: int = 32
    residual: int = 32  # tokens of a block of keys, and of the values' window
    key_window: int = 0
    value_window: int | None = None  # None: as in KIVI, the residual
    value_flush: int = 1
    num_sinks: int = 0
    spare_slots: int = 0  # of the rings, beyond a window and a flush
    dtype: torch.dtype = torch.float16
    fresh_dtype: torch.dtype | None = None  # of the new tokens; None: that of the rings
    spread: str = "normal"
    strides: str = "contiguous"
    packs: bool = True

    @property
    def rule(self) -> FlushRule:
        value_window = self.residual if self.value_window is None else self.value_window
        return FlushRule(self.num_sinks, self.key_window, self.residual, value_window, self.value_flush)


@dataclass(frozen=True)
class AppendState:
    """Everything that a step may change, and the tokens of all steps `[B, HK, n, D]`."""

    exact: ExactTokens
    past: PackedPast | None
    keys: torch.Tensor
    values: torch.Tensor

    def changing(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self.exact, name) for name in ("keys", "values", "sink_keys", "sink_values", "length")}
        if self.past is None:
            return named
        return named | {
            "num_keys": self.past.num_keys,
            "num_values": self.past.num_values,
            **{
                f"{side}.{part}": getattr(getattr(self.past, side), part)
                for side in ("keys", "values")
                for part in ("codes", "scale", "minimum")
            },
        }


def append_cases() -> list[AppendCase]:
    base = AppendCase("base", (0, 31, 62, 94, 130))
    paper = replace(base, residual=128, page_tokens=128, head_dim=128, starts=(0, 126, 255, 1000), num_steps=2)
    cases = [
        base,
        replace(base, name="from_empty", starts=(0,), num_steps=70, num_kv_heads=1, num_sinks=3),
        replace(base, name="empty_row", starts=(-1, 31, 40), num_steps=3),
        replace(base, name="exact_only", starts=(0, 31, 90), num_sinks=2, packs=False),
        replace(base, name="sinks", starts=(0, 3, 34, 66, 100), num_sinks=4),
        replace(base, name="most_sinks", starts=(0, 62, 94, 126), num_sinks=64),
        replace(base, name="equal", spread="equal"),
        replace(base, name="outliers", spread="outliers"),
        replace(base, name="sliced", strides="sliced", num_sinks=2),
        replace(base, name="spare_slots", spare_slots=7, num_sinks=1),
        replace(base, name="rounded_to_fp16", fresh_dtype=torch.float32),
        replace(base, name="rounded_to_bf16", dtype=torch.bfloat16, fresh_dtype=torch.float32),
        replace(base, name="half_to_fp32", dtype=torch.float32, fresh_dtype=torch.float16),
        replace(base, name="bf16_to_fp16", fresh_dtype=torch.bfloat16),
        replace(base, name="key_window", key_window=5, starts=(0, 35, 68, 101)),
        replace(base, name="no_value_window", value_window=0, value_flush=4, starts=(0, 2, 30, 66)),
        replace(base, name="flush_off_the_page", value_flush=24, starts=(54, 78, 102)),
        replace(base, name="flush_over_pages", value_flush=128, starts=(158, 286)),
        replace(paper, name="paper"),
        replace(paper, name="paper_in_pages", page_tokens=32, value_flush=32, starts=(127, 159, 191, 1000)),
        replace(paper, name="wide_groups", key_group_size=128, value_group_size=128, num_sinks=4, starts=(259, 7)),
        replace(paper, name="two_pages", residual=256, starts=(255, 511, 600), num_steps=1),
        replace(paper, name="large_flush", value_flush=128, starts=(255, 383, 300), num_steps=1),
    ]
    cases += [
        replace(base, name=str(dtype)[6:], dtype=dtype, starts=(31, 62)) for dtype in (torch.float32, torch.bfloat16)
    ]
    cases += [
        replace(base, name=f"keys{keys}_values{values}", key_bits=keys, value_bits=values, starts=(31, 63, 95))
        for keys, values in [(1, 1), (4, 2), (2, 4), (4, 4), (8, 8)]
    ]
    cases += [
        replace(base, name=f"dim{dim}_bits{bits}_group{group}", head_dim=dim, value_bits=bits, value_group_size=group,
                value_flush=8, starts=(31, 39, 47))
        for dim, bits, group in [
            (64, 2, 8), (64, 4, 64), (80, 2, 16), (96, 2, 32), (96, 4, 48), (128, 2, 8), (256, 2, 32), (256, 4, 128)
        ]
    ]  # fmt: skip
    cases += [
        replace(base, name=f"page{page}_group{group}_bits{bits}", residual=2 * page, page_tokens=page,
                key_group_size=group, key_bits=bits, starts=(2 * page - 1, 4 * page - 1))
        for page, group, bits in [(32, 16, 8), (64, 32, 2), (64, 64, 4), (96, 32, 4), (128, 64, 4), (48, 24, 2)]
    ]  # fmt: skip
    return cases


def check_append(case: AppendCase, prepare: Prepare, device: str = "cpu") -> None:
    """Steps of `prepare`d calls give what the history gives, with all else as it was.

    `prepare` is called once, and its step run with new tokens where the old ones were, as a graph would.
    """
    state = build_append(case, device=device)
    keys, values = (
        stored(torch.zeros_like(tokens[:, :, 0]), case.strides, device) for tokens in (state.keys, state.values)
    )
    step = prepare(keys, values, state.exact, case.rule, state.past)
    for taken in range(1, case.num_steps + 1):
        lengths = [start + taken for start in case.starts]
        state.exact.length.add_(1)
        for fresh, tokens in ((keys, state.keys), (values, state.values)):
            for row, length in enumerate(lengths):
                fresh[row] = tokens[row, :, max(0, length - 1)]
        step()
        assert_state(state, case, taken)


def assert_state(state: AppendState, case: AppendCase, num_taken: int) -> None:
    expected = build_append(case, num_taken=num_taken, device=state.keys.device.type)
    for (name, got), wanted in zip(state.changing().items(), expected.changing().values(), strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=0, equal_nan=True,
            msg=lambda said, name=name: f"{name} after {num_taken} steps: {said}",
        )  # fmt: skip


def build_append(case: AppendCase, *, num_taken: int = 0, device: str = "cpu", seed: int = 0) -> AppendState:
    """The state after `num_taken` steps, straight from the history. What nobody has written is poison."""
    generator = torch.Generator().manual_seed(seed)
    rule, batch, heads, dim = case.rule, len(case.starts), case.num_kv_heads, case.head_dim
    lengths = [start + num_taken for start in case.starts]
    shape = (batch, heads, max(1, max(case.starts) + case.num_steps), dim)  # a sequence of length 0 is fed a token too
    fresh_dtype = case.fresh_dtype or case.dtype
    keys, values = (_spread(torch.randn(shape, generator=generator), case.spread).to(fresh_dtype) for _ in range(2))
    exact_keys, exact_values = keys.to(case.dtype), values.to(case.dtype)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return stored(tensor, case.strides, device)

    exact = ExactTokens(
        place(_ring(exact_keys, lengths, rule, rule.key_window + rule.key_flush + case.spare_slots)),
        place(_ring(exact_values, lengths, rule, rule.value_window + rule.value_flush + case.spare_slots)),
        *(place(_sinks(tokens, lengths, rule)) for tokens in (exact_keys, exact_values)),
        place(torch.tensor(lengths, dtype=torch.int32)),
    )
    if not case.packs:
        return AppendState(exact, None, keys.to(device), values.to(device))

    width = -(-shape[2] // case.page_tokens) + 1
    num_pages = batch * width + 2
    table = torch.randperm(num_pages, generator=generator)[: batch * width].view(batch, width).to(torch.int32)
    table[:, -1] = NOWHERE
    key_pool = _pool((num_pages, heads, dim, case.page_tokens), case.key_bits, case.key_group_size, generator)
    value_pool = _pool((num_pages, heads, case.page_tokens, dim), case.value_bits, case.value_group_size, generator)
    for row, length in enumerate(lengths):
        due_keys, due_values = (
            tokens[row, :, rule.num_sinks : rule.num_sinks + rule.packed(side, length)]
            for side, tokens in enumerate((exact_keys, exact_values))
        )
        pages = due_keys.unflatten(1, (-1, case.page_tokens)).permute(1, 0, 3, 2)  # [pages, HK, D, P]
        key_pool[table[row, : len(pages)].long()] = quantize_pack(
            pages, bits=case.key_bits, group_size=case.key_group_size
        )
        index = torch.arange(due_values.shape[1])
        at = table[row, index // case.page_tokens].long(), slice(None), index % case.page_tokens
        value_pool[at] = quantize_pack(
            due_values.transpose(0, 1), bits=case.value_bits, group_size=case.value_group_size
        )
    counts = (
        [rule.packed(side, length - 1) if num_taken and length > 0 else UNSET for length in lengths]
        for side in range(2)
    )
    past = PackedPast(
        PageLayout(case.page_tokens, case.key_bits, case.value_bits, case.key_group_size, case.value_group_size),
        *(Packed(*map(place, (pool.codes, pool.scale, pool.minimum))) for pool in (key_pool, value_pool)),
        place(table),
        *(place(torch.tensor(count, dtype=torch.int32)) for count in counts),
    )
    return AppendState(exact, past, keys.to(device), values.to(device))


def _ring(tokens: torch.Tensor, lengths: list[int], rule: FlushRule, capacity: int) -> torch.Tensor:
    """Every slot holds the last token that came to it."""
    ring = tokens.new_full((*tokens.shape[:2], capacity, tokens.shape[3]), torch.nan)
    for row, length in enumerate(lengths):
        kept = torch.arange(max(rule.num_sinks, length - capacity), max(rule.num_sinks, length))
        ring[row, :, kept % capacity] = tokens[row, :, kept]
    return ring


def _sinks(tokens: torch.Tensor, lengths: list[int], rule: FlushRule) -> torch.Tensor:
    sinks = tokens.new_full((*tokens.shape[:2], rule.num_sinks, tokens.shape[3]), torch.nan)
    for row, length in enumerate(lengths):
        used = min(rule.num_sinks, max(0, length))
        sinks[row, :, :used] = tokens[row, :, :used]
    return sinks


def _pool(shape: tuple[int, ...], bits: int, group_size: int, generator: torch.Generator) -> Packed:
    *pages, row = shape
    codes = torch.randint(-(2**15), 2**15, (*pages, row * bits // 16), generator=generator).to(torch.int16)
    scale = torch.full((*pages, row // group_size), torch.nan, dtype=torch.float16)
    return Packed(codes, scale, scale.clone())
