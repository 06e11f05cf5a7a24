"""Ugly cases for the kernels, shared by every implementation's tests.

A case is a frozen description; `build_values` and `build_attend` turn it into tensors on a device. All
memory that an operation must not read is poisoned: unused page slots and spare pages hold NaN scales and
random codes, ring slots out of range hold NaN, page-table entries past the end point nowhere.

This module does not know which implementation is tested.
"""

from dataclasses import dataclass, replace

import torch

from kvlens.kernels.packed_attend import ExactTokens, PackedPast, PageLayout
from kvlens.kernels.quantize_pack import Packed
from kvlens.kernels.quantize_pack.reference import pack, quantize_pack, unpack

# Largest |difference| allowed in attention output and in log-sum-exp: atol + rtol * |expected|. The output
# is rounded to the query's dtype, so its unit in the last place rules; the log-sum-exp is always fp32.
OUTPUT_TOLERANCES = {
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 1e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 8e-3, "rtol": 8e-3},
}
LOG_SUM_EXP_TOLERANCE = {"atol": 5e-5, "rtol": 5e-5}

NOWHERE = 2**30  # a page number that no pool holds


@dataclass(frozen=True)
class QuantizeCase:
    """One input of `quantize_pack`: `shape` ends in the row; `spread` names how its values lie."""

    name: str
    shape: tuple[int, ...]
    bits: int = 2
    group_size: int = 32
    dtype: torch.dtype = torch.float32
    spread: str = "normal"  # normal, equal, zero, outliers, tiny, far
    strides: str = "contiguous"  # contiguous, transposed, sliced


@dataclass(frozen=True)
class AttendCase:
    """One batch for `packed_attend`.

    `lengths`, `num_keys` and `num_values` have one entry a sequence; the window holds the rest. `spread`
    is that of the keys and values; `strides="sliced"` makes every tensor a view into a larger one.
    """

    name: str
    lengths: tuple[int, ...]
    num_keys: tuple[int, ...]
    num_values: tuple[int, ...]
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    key_bits: int = 2
    value_bits: int = 2
    page_tokens: int = 128
    key_group_size: int = 32
    value_group_size: int = 32
    num_sinks: int = 0
    dtype: torch.dtype = torch.float32
    spread: str = "normal"
    strides: str = "contiguous"
    scaling: float | None = None  # None: 1 / sqrt(head_dim)


@dataclass(frozen=True)
class AttendInputs:
    query: torch.Tensor
    past: PackedPast
    exact: ExactTokens
    scaling: float


def quantize_cases() -> list[QuantizeCase]:
    base = QuantizeCase("base", (2, 3, 5, 128))
    cases = [base, QuantizeCase("one_row", (1, 2, 1, 64)), QuantizeCase("no_rows", (0, 128))]
    cases += [replace(base, name=f"bits{bits}", bits=bits) for bits in (1, 2, 4, 8)]
    cases += [
        replace(base, name=f"{spread}_{bits}", spread=spread, bits=bits)
        for spread in ("equal", "zero", "outliers", "tiny", "far")
        for bits in (2, 4)
    ]
    cases += [
        replace(base, name=f"{str(dtype)[6:]}_{bits}", dtype=dtype, bits=bits)
        for dtype in (torch.float16, torch.bfloat16)
        for bits in (1, 2, 4, 8)
    ]
    cases += [
        QuantizeCase(f"row{length}_group{group}_bits{bits}", (3, 4, length), bits, group)
        for length, group, bits in [
            (8, 8, 2), (16, 8, 1), (16, 16, 4), (32, 8, 2), (64, 64, 2), (80, 16, 2), (80, 80, 4),
            (96, 32, 2), (96, 48, 8), (96, 32, 4), (256, 128, 2), (256, 64, 1), (384, 32, 2), (1024, 128, 4),
            (20, 5, 4), (48, 3, 1),
        ]
    ]  # fmt: skip
    cases += [
        QuantizeCase(f"transposed_{str(dtype)[6:]}_{bits}", (2, 3, 64, 128), bits, dtype=dtype, strides="transposed")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for bits in (2, 4)
    ]  # fmt: skip
    cases += [
        QuantizeCase("transposed_odd", (2, 1, 7, 96), 2, 32, strides="transposed"),
        QuantizeCase("sliced", (2, 3, 5, 64), strides="sliced"),
        QuantizeCase("many_rows", (4, 8, 64, 128), 2, 32, torch.bfloat16),
        QuantizeCase("many_columns", (2, 8, 128, 128), 2, 32, torch.bfloat16, strides="transposed"),
    ]
    return cases


def attend_cases() -> list[AttendCase]:
    base = AttendCase("base", (300,), (256,), (256,))
    cases = [
        base,
        replace(base, name="length_1", lengths=(1,), num_keys=(0,), num_values=(0,)),
        replace(base, name="length_0", lengths=(0,), num_keys=(0,), num_values=(0,)),
        replace(base, name="no_window", lengths=(256,)),
        replace(base, name="no_packed", lengths=(97,), num_keys=(0,), num_values=(0,)),
        replace(base, name="keys_ahead_of_values", lengths=(300,), num_keys=(256,), num_values=(172,)),
        replace(base, name="values_ahead_of_keys", lengths=(261,), num_keys=(160,), num_values=(259,)),
        replace(base, name="only_values_packed", lengths=(100,), num_keys=(0,), num_values=(37,)),
        replace(base, name="off_the_group", lengths=(205,), num_keys=(203,), num_values=(201,)),
        replace(base, name="sinks", lengths=(300,), num_sinks=4),
        replace(base, name="sinks_odd", lengths=(303,), num_sinks=13, num_values=(251,)),
        replace(base, name="sinks_only", lengths=(3,), num_keys=(0,), num_values=(0,), num_sinks=5),
        replace(base, name="sinks_all", lengths=(5,), num_keys=(0,), num_values=(0,), num_sinks=5),
        replace(base, name="long", lengths=(4001,), num_keys=(3968,), num_values=(3873,)),
        replace(
            base, name="ragged", lengths=(1, 0, 700, 256, 33, 129), num_keys=(0, 0, 640, 256, 32, 0),
            num_values=(0, 0, 572, 128, 1, 1),
        ),
        replace(
            base, name="ragged_sinks", lengths=(2, 0, 500, 4), num_keys=(0, 0, 384, 0),
            num_values=(0, 0, 400, 0), num_sinks=4, strides="sliced",
        ),
        replace(base, name="equal", spread="equal"),
        replace(base, name="outliers", spread="outliers"),
        replace(base, name="outliers_gqa", spread="outliers", num_query_heads=8, key_bits=4),
        replace(base, name="sliced", strides="sliced"),
        replace(base, name="scaling", scaling=0.7),
    ]  # fmt: skip
    cases += [
        replace(base, name=f"keys{keys}_values{values}", key_bits=keys, value_bits=values)
        for keys in (1, 2, 4, 8)
        for values in (1, 2, 4, 8)
        if (keys, values) != (2, 2)
    ]
    cases += [
        replace(base, name=f"heads{hq}_{hk}", num_query_heads=hq, num_kv_heads=hk, lengths=(190,),
                num_keys=(128,), num_values=(150,))
        for hq, hk in [(1, 1), (3, 3), (7, 1), (6, 2), (14, 2), (16, 1)]
    ]  # fmt: skip
    cases += [
        replace(base, name=f"dim{dim}_bits{bits}_group{group}", head_dim=dim, value_bits=bits, key_bits=bits,
                value_group_size=group, num_values=(211,))
        for dim, bits, group in [
            (8, 2, 8), (16, 2, 16), (16, 1, 8), (32, 2, 32), (64, 2, 8), (64, 4, 64), (80, 2, 16),
            (80, 4, 80), (96, 2, 32), (96, 4, 48), (128, 2, 32), (128, 2, 128), (128, 4, 32), (128, 8, 64),
            (128, 1, 32), (256, 2, 32), (256, 4, 256),
        ]
    ]  # fmt: skip
    cases += [
        replace(base, name=f"page{page}_group{group}_bits{bits}", page_tokens=page, key_group_size=group,
                key_bits=bits, num_keys=(224,), num_values=(231,))
        for page, group, bits in [
            (32, 32, 2), (32, 32, 4), (64, 32, 2), (64, 64, 4), (96, 32, 2), (128, 128, 2), (128, 64, 4),
            (256, 128, 2), (256, 32, 4), (32, 32, 1), (32, 16, 8), (512, 32, 2), (160, 32, 4),
        ]
    ]  # fmt: skip
    cases += [
        replace(base, name=f"{str(dtype)[6:]}_heads{hq}", dtype=dtype, num_query_heads=hq, head_dim=128)
        for dtype in (torch.float16, torch.bfloat16)
        for hq in (2, 8)
    ]
    return cases


def build_values(case: QuantizeCase, *, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """The input of a quantize case. Shapes: `case.shape`, with the strides that it names."""
    generator = torch.Generator().manual_seed(seed)
    values = _spread(torch.randn(case.shape, generator=generator), case.spread).to(case.dtype)
    return stored(values, case.strides, device)


def build_attend(case: AttendCase, *, device: str = "cpu", seed: int = 0) -> AttendInputs:
    """The input of an attention case, with everything that must not be read poisoned."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_sinks, page_tokens = len(case.lengths), case.num_sinks, case.page_tokens
    max_length = max(case.lengths)
    head_shape = (batch, case.num_kv_heads, max_length, case.head_dim)
    keys = _spread(torch.randn(head_shape, generator=generator), case.spread)
    keys[..., 0] += 8.0  # keys have a few large channels
    values = _spread(torch.randn(head_shape, generator=generator), case.spread)
    keys, values = keys.to(case.dtype), values.to(case.dtype)

    max_packed = max(*case.num_keys, *case.num_values)
    table_width = -(-max_packed // page_tokens) + 1
    num_pages = batch * table_width + 2
    table = torch.randperm(num_pages, generator=generator)[: batch * table_width].view(batch, table_width)
    past_keys = _poisoned_pool(
        num_pages, case.num_kv_heads, case.head_dim, page_tokens, case.key_bits, case.key_group_size, generator
    )
    past_values = _poisoned_pool(
        num_pages, case.num_kv_heads, page_tokens, case.head_dim, case.value_bits, case.value_group_size, generator
    )
    for row in range(batch):
        packed_keys = keys[row, :, num_sinks : num_sinks + case.num_keys[row]]
        packed_values = values[row, :, num_sinks : num_sinks + case.num_values[row]]
        for index in range(-(-case.num_keys[row] // page_tokens)):
            tokens = slice(index * page_tokens, (index + 1) * page_tokens)
            _fill_key_page(past_keys, int(table[row, index]), packed_keys[:, tokens], case)
        for index in range(-(-case.num_values[row] // page_tokens)):
            tokens = slice(index * page_tokens, (index + 1) * page_tokens)
            _fill_value_page(past_values, int(table[row, index]), packed_values[:, tokens], case)
        num_used = -(-max(case.num_keys[row], case.num_values[row]) // page_tokens)
        table[row, num_used:] = torch.tensor([NOWHERE, -1, -NOWHERE]).repeat(table_width)[: table_width - num_used]

    sinks = torch.tensor([min(num_sinks, length) for length in case.lengths])
    starts_keys = sinks + torch.tensor(case.num_keys)
    starts_values = sinks + torch.tensor(case.num_values)
    layout = PageLayout(page_tokens, case.key_bits, case.value_bits, case.key_group_size, case.value_group_size)
    query = torch.randn(batch, case.num_query_heads, case.head_dim, generator=generator).to(case.dtype)
    return AttendInputs(
        query=stored(query, case.strides, device),
        past=PackedPast(
            layout=layout,
            keys=Packed(*(stored(part, case.strides, device) for part in past_keys)),
            values=Packed(*(stored(part, case.strides, device) for part in past_values)),
            page_table=stored(table.to(torch.int32), case.strides, device),
            num_keys=torch.tensor(case.num_keys, dtype=torch.int32, device=device),
            num_values=torch.tensor(case.num_values, dtype=torch.int32, device=device),
        ),
        exact=ExactTokens(
            keys=stored(ring_of(keys, starts_keys, case.lengths), case.strides, device),
            values=stored(ring_of(values, starts_values, case.lengths), case.strides, device),
            sink_keys=stored(sinks_of(keys, num_sinks, case.lengths), case.strides, device),
            sink_values=stored(sinks_of(values, num_sinks, case.lengths), case.strides, device),
            length=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        ),
        scaling=case.head_dim**-0.5 if case.scaling is None else case.scaling,
    )


def _spread(values: torch.Tensor, spread: str) -> torch.Tensor:
    if spread == "equal":
        return torch.full_like(values, 0.3)
    if spread == "zero":
        return torch.zeros_like(values)
    if spread == "outliers":
        values = values.clone()
        values.flatten()[::37] *= 1e4
        return values
    if spread == "tiny":  # closer to one another than fp16 can tell
        return 5.0 + values * 1e-9
    if spread == "far":
        return values + 300.0
    return values


def stored(tensor: torch.Tensor, strides: str, device: str) -> torch.Tensor:
    """`tensor` on `device`, with the strides asked for. What lies between its elements is poison."""
    if strides == "transposed":
        return tensor.to(device).transpose(-1, -2).contiguous().transpose(-1, -2)
    if strides == "contiguous":
        return tensor.to(device)
    poison = torch.nan if tensor.is_floating_point() else NOWHERE % 2**15
    larger = torch.full([size + 3 for size in tensor.shape], poison, dtype=tensor.dtype, device=device)
    view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def _poisoned_pool(num_pages: int, num_heads: int, num_rows: int, row: int, bits: int, group: int, generator):
    """Codes, scale and minimum of a pool of pages that nobody has written yet."""
    codes = torch.randint(-(2**15), 2**15, (num_pages, num_heads, num_rows, row * bits // 16), generator=generator).to(
        torch.int16
    )
    scale = torch.full((num_pages, num_heads, num_rows, row // group), torch.nan, dtype=torch.float16)
    return codes, scale, scale.clone()


def _fill_key_page(pool, page: int, keys: torch.Tensor, case: AttendCase) -> None:
    """Write `keys [HK, tokens, D]` into a page; tokens and groups after them stay as they are."""
    codes, scale, minimum = pool
    bits, num_tokens = case.key_bits, keys.shape[1]
    full = keys[:, torch.arange(case.page_tokens).clamp(max=num_tokens - 1)].transpose(-1, -2)
    rows = quantize_pack(full, bits=bits, group_size=case.key_group_size)
    used = torch.arange(case.page_tokens) < num_tokens
    mixed = torch.where(used, unpack(rows.codes, bits=bits), unpack(codes[page], bits=bits))
    num_groups = -(-num_tokens // case.key_group_size)
    codes[page] = pack(mixed, bits=bits)
    scale[page, ..., :num_groups] = rows.scale[..., :num_groups]
    minimum[page, ..., :num_groups] = rows.minimum[..., :num_groups]


def _fill_value_page(pool, page: int, values: torch.Tensor, case: AttendCase) -> None:
    """Write `values [HK, tokens, D]` into a page."""
    rows = quantize_pack(values, bits=case.value_bits, group_size=case.value_group_size)
    for part, written in zip(pool, (rows.codes, rows.scale, rows.minimum), strict=True):
        part[page, :, : values.shape[1]] = written


def ring_of(tokens: torch.Tensor, starts: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Tokens `starts[row] .. lengths[row]` of each sequence in a ring just large enough for the longest."""
    window = max(int(length - start) for start, length in zip(starts, lengths, strict=True))
    ring = tokens.new_full((*tokens.shape[:2], window + 3, tokens.shape[-1]), torch.nan)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        slots = torch.arange(start, length) % ring.shape[2]
        ring[row, :, slots] = tokens[row, :, start:length]
    return ring


def sinks_of(tokens: torch.Tensor, num_sinks: int, lengths: tuple[int, ...]) -> torch.Tensor:
    sinks = tokens.new_full((*tokens.shape[:2], num_sinks, tokens.shape[-1]), torch.nan)
    for row, length in enumerate(lengths):
        used = min(num_sinks, length)
        sinks[row, :, :used] = tokens[row, :, :used]
    return sinks
