"""Ugly cases for attention over sparse codes, shared by every implementation's tests.

As in `cases`, all memory that must not be read is poisoned: unused page slots and spare pages hold NaN
coefficients and indices that no dictionary has, rings and sinks out of range hold NaN, and page-table entries
past the end point nowhere.

This module does not know which implementation is tested.
"""

from dataclasses import dataclass, replace

import torch
from cases import NOWHERE, ring_of, sinks_of, stored

from kvlens.kernels.sparse_attend import ExactTokens, KeyTurn, SparseLayout, SparsePast, SparseSide


@dataclass(frozen=True)
class SparseCase:
    """One batch for `sparse_attend`: a sequence of `lengths[b]` tokens, `num_coded[b]` of them coded.

    `spread="equal"` gives every slot the same atom, `"outliers"` a few huge coefficients, `"zero"` none but 0;
    `strides="sliced"` makes every tensor a view into a larger one.
    """

    name: str
    lengths: tuple[int, ...]
    num_coded: tuple[int, ...]
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    key_atoms: int = 7
    value_atoms: int = 8
    value_parts: int = 1
    coefficient_bits: int = 6
    num_key_atoms: int = 200
    num_value_atoms: int = 100
    page_tokens: int = 64
    num_sinks: int = 0
    dtype: torch.dtype = torch.float32
    spread: str = "normal"
    strides: str = "contiguous"
    scaling: float | None = None  # None: 1 / sqrt(head_dim)
    turned_channels: int = 0  # of keys that are coded before RoPE; 0: they are coded after it
    turn_scale: float = 1.0
    means: tuple[str, ...] = ()  # "keys", "values"


@dataclass(frozen=True)
class SparseInputs:
    """`keys` and `values` are what the codes stand for, fp32 `[B, HK, max coded, D]`, found without words or pages.

    Both with their means; keys that are coded before RoPE are turned.
    """

    query: torch.Tensor
    past: SparsePast
    exact: ExactTokens
    scaling: float
    keys: torch.Tensor
    values: torch.Tensor


def sparse_cases() -> list[SparseCase]:
    base = SparseCase("base", (300,), (256,))
    cases = [
        base,
        replace(base, name="length_1", lengths=(1,), num_coded=(0,)),
        replace(base, name="length_1_coded", lengths=(1,), num_coded=(1,)),
        replace(base, name="length_0", lengths=(0,), num_coded=(0,)),
        replace(base, name="no_window", lengths=(256,)),
        replace(base, name="none_coded", lengths=(97,), num_coded=(0,)),
        replace(base, name="off_the_page", lengths=(210,), num_coded=(203,)),
        replace(base, name="sinks", num_sinks=4),
        replace(base, name="sinks_odd", lengths=(303,), num_coded=(251,), num_sinks=13),
        replace(base, name="sinks_only", lengths=(3,), num_coded=(0,), num_sinks=5),
        replace(base, name="long", lengths=(4001,), num_coded=(3873,)),
        replace(base, name="ragged", lengths=(1, 0, 700, 256, 33, 129), num_coded=(0, 0, 572, 256, 1, 65)),
        replace(base, name="ragged_sinks", lengths=(2, 0, 500, 4), num_coded=(0, 0, 400, 0), num_sinks=4,
                strides="sliced"),
        replace(base, name="one_atom", spread="equal"),
        replace(base, name="zeros", spread="zero"),
        replace(base, name="outliers", spread="outliers"),
        replace(base, name="sliced", strides="sliced"),
        replace(base, name="scaling", scaling=0.7),
        replace(base, name="largest_dictionaries", num_key_atoms=1024, num_value_atoms=1024, value_parts=2),
        replace(base, name="tiny_dictionaries", num_key_atoms=1, num_value_atoms=3),
        replace(base, name="wide_indices", num_key_atoms=5000, num_value_atoms=4096, coefficient_bits=16),
    ]  # fmt: skip
    cases += [
        replace(base, name=f"keys{keys}_values{values}_parts{parts}_bits{bits}", key_atoms=keys, value_atoms=values,
                value_parts=parts, coefficient_bits=bits, num_coded=(219,))
        for keys, values in [(1, 1), (4, 2), (8, 4), (16, 8), (3, 9)]
        for parts in (1, 2)
        for bits in (6, 16)
    ]  # fmt: skip
    cases += [
        replace(base, name=f"heads{hq}_{hk}", num_query_heads=hq, num_kv_heads=hk, lengths=(190,), num_coded=(150,))
        for hq, hk in [(1, 1), (3, 3), (2, 1), (7, 1), (6, 2), (14, 2), (16, 1)]
    ]
    cases += [
        replace(base, name=f"dim{dim}_parts{parts}_page{page}", head_dim=dim, value_parts=parts, page_tokens=page,
                num_coded=(231,))
        for dim, parts, page in [
            (8, 1, 16), (16, 2, 32), (32, 1, 128), (80, 2, 20), (96, 1, 48), (128, 2, 7), (256, 1, 256),
        ]
    ]  # fmt: skip
    cases += [
        replace(base, name=f"{str(dtype)[6:]}_heads{hq}", dtype=dtype, num_query_heads=hq, head_dim=128, num_sinks=4)
        for dtype in (torch.float16, torch.bfloat16)
        for hq in (2, 8)
    ]
    turned = replace(base, turned_channels=64, means=("keys", "values"))
    cases += [
        replace(base, name="value_means", means=("values",), num_sinks=4),
        replace(base, name="value_means_parts", means=("values",), value_parts=2, lengths=(0, 70), num_coded=(0, 64)),
        replace(turned, name="turned"),
        replace(turned, name="turned_no_means", means=()),
        replace(turned, name="turned_ragged", lengths=(1, 0, 701, 257, 34, 130), num_coded=(0, 0, 572, 256, 1, 65),
                num_sinks=1, strides="sliced"),
        replace(turned, name="turned_long", lengths=(4001,), num_coded=(3873,), num_sinks=13),
        replace(turned, name="turned_outliers", spread="outliers", num_sinks=4),
        replace(turned, name="turned_zeros", spread="zero"),
        replace(turned, name="turned_paper", means=(), num_key_atoms=4096, num_value_atoms=4096, key_atoms=4,
                value_atoms=2, value_parts=2, coefficient_bits=16),
        replace(turned, name="turned_yarn", turn_scale=1.3, scaling=0.05),
        replace(turned, name="turned_page_7", page_tokens=7),
        *(replace(turned, name=f"turned_{width}_of_{dim}", turned_channels=width, head_dim=dim, num_coded=(231,))
          for width, dim in [(8, 8), (16, 32), (10, 24), (80, 80), (96, 96), (64, 128), (128, 128), (256, 256)]),
        *(replace(turned, name=f"turned_heads{hq}_{hk}", num_query_heads=hq, num_kv_heads=hk, lengths=(190,),
                  num_coded=(150,))
          for hq, hk in [(1, 1), (3, 3), (7, 1), (14, 2), (17, 1)]),
        *(replace(turned, name=f"turned_{str(dtype)[6:]}_{width}_of_{dim}", dtype=dtype, head_dim=dim,
                  turned_channels=width, num_sinks=4, coefficient_bits=bits, means=means)
          for dtype, width, dim, bits, means in [
              (torch.bfloat16, 128, 128, 6, ("keys", "values")), (torch.float16, 128, 128, 16, ()),
              (torch.float16, 64, 64, 6, ("keys",)), (torch.float16, 10, 24, 6, ("keys",)),
              (torch.float16, 8, 8, 6, ()), (torch.float16, 96, 96, 6, ("keys",)),
              (torch.float16, 32, 80, 16, ("keys",)),
          ]),
        replace(turned, name="turned_float16_outliers", dtype=torch.float16, spread="outliers"),
        replace(turned, name="turned_float16_long", dtype=torch.float16, lengths=(4001,), num_coded=(3873,)),
        replace(turned, name="turned_float16_heads17", dtype=torch.float16, num_query_heads=17, num_kv_heads=1),
    ]  # fmt: skip
    return cases


def build_sparse(case: SparseCase, *, device: str = "cpu", seed: int = 0) -> SparseInputs:
    """The input of a case, with everything that must not be read poisoned."""
    generator = torch.Generator().manual_seed(seed)
    batch, page_tokens, most_coded = len(case.lengths), case.page_tokens, max(case.num_coded)
    width = -(-most_coded // page_tokens) + 1
    num_pages = batch * width + 2
    table = torch.randperm(num_pages, generator=generator)[: batch * width].view(batch, width)
    keys, key_tokens = _side(case, table, num_pages, case.key_atoms, 1, case.num_key_atoms, generator)
    values, value_tokens = _side(
        case, table, num_pages, case.value_atoms, case.value_parts, case.num_value_atoms, generator
    )
    if "keys" in case.means:
        keys, key_tokens = _with_means(keys, key_tokens, generator)
    if "values" in case.means:
        values, value_tokens = _with_means(values, value_tokens, generator)
    turn = None
    if case.turned_channels:
        turn = KeyTurn(10_000.0 ** (-torch.arange(0, 1, 2 / case.turned_channels)), case.turn_scale)
        key_tokens = _turned(key_tokens, turn, case.num_sinks)
    for row, count in enumerate(case.num_coded):
        num_used = -(-count // page_tokens)
        table[row, num_used:] = torch.tensor([NOWHERE, -1, -NOWHERE]).repeat(width)[: width - num_used]

    exact_shape = (batch, case.num_kv_heads, max(case.lengths), case.head_dim)
    tokens = [torch.randn(exact_shape, generator=generator).to(case.dtype) for _ in ("keys", "values")]
    sinks = torch.tensor([min(case.num_sinks, length) for length in case.lengths])
    starts = sinks + torch.tensor(case.num_coded)
    query = torch.randn(batch, case.num_query_heads, case.head_dim, generator=generator).to(case.dtype)

    def on_device(side: SparseSide) -> SparseSide:
        parts = (stored(part, case.strides, device) for part in (side.words, side.coefficients))
        means = None if side.means is None else stored(side.means, case.strides, device)
        return SparseSide(*parts, stored(side.dictionary, case.strides, device), means)

    return SparseInputs(
        query=stored(query, case.strides, device),
        past=SparsePast(
            SparseLayout(page_tokens, case.key_atoms, case.value_atoms, case.value_parts, case.coefficient_bits),
            on_device(keys),
            on_device(values),
            stored(table.to(torch.int32), case.strides, device),
            torch.tensor(case.num_coded, dtype=torch.int32, device=device),
            turn and replace(turn, inverse_frequencies=turn.inverse_frequencies.to(device)),
        ),
        exact=ExactTokens(
            *(stored(ring_of(each, starts, case.lengths), case.strides, device) for each in tokens),
            *(stored(sinks_of(each, case.num_sinks, case.lengths), case.strides, device) for each in tokens),
            torch.tensor(case.lengths, dtype=torch.int32, device=device),
        ),
        scaling=case.head_dim**-0.5 if case.scaling is None else case.scaling,
        keys=key_tokens.to(device),
        values=value_tokens.to(device),
    )


def _side(case: SparseCase, table: torch.Tensor, num_pages: int, atoms: int, parts: int, num_atoms: int, generator):
    """A side of a pool, and the tokens that it stands for."""
    batch, heads, page_tokens = len(case.lengths), case.num_kv_heads, case.page_tokens
    slots, is_packed = parts * atoms, case.coefficient_bits == 6
    dictionary = torch.randn(num_atoms, case.head_dim // parts, generator=generator)
    dictionary /= dictionary.norm(dim=-1, keepdim=True)

    shape = (batch, heads, max(case.num_coded), slots)
    indices = torch.randint(num_atoms, shape, generator=generator)
    codes = torch.randint(-31, 32, shape, generator=generator)
    size = torch.rand(shape[:-1], generator=generator) + 0.5
    if case.spread == "equal":
        indices[:] = num_atoms - 1
    elif case.spread == "zero":
        codes[:] = 0
    elif case.spread == "outliers":
        size[..., ::37] *= 60.0
    scale = size.half()
    numbers = scale.float().unsqueeze(-1) * codes / 31
    if not is_packed:
        numbers = numbers.half().float()

    every_slot = (num_pages, heads, slots, page_tokens)
    words = torch.full(every_slot, 0x7FFF, dtype=torch.int16)
    coefficients = torch.full(every_slot[:2] + every_slot[3:] if is_packed else every_slot, torch.nan).half()
    for row, count in enumerate(case.num_coded):
        for token in range(0, count, page_tokens):
            page, here = int(table[row, token // page_tokens]), slice(token, min(token + page_tokens, count))
            used = here.stop - here.start
            if is_packed:
                written = (codes[row, :, here] << 10 | indices[row, :, here]).to(torch.int16)
                coefficients[page, :, :used] = scale[row, :, here]
            else:
                written = indices[row, :, here].to(torch.int16)
                coefficients[page, :, :, :used] = numbers[row, :, here].transpose(-1, -2).half()
            words[page, :, :, :used] = written.transpose(-1, -2)

    matrix = torch.zeros((*shape[:-1], parts, num_atoms)).scatter_add_(
        -1, indices.unflatten(-1, (parts, atoms)), numbers.unflatten(-1, (parts, atoms))
    )
    return SparseSide(words, coefficients, dictionary), (matrix @ dictionary).flatten(-2)


def _with_means(side: SparseSide, tokens: torch.Tensor, generator) -> tuple[SparseSide, torch.Tensor]:
    """The same codes, of tokens with a mean for every head that is larger than what the codes say."""
    means = 2 * torch.randn(tokens.shape[1], tokens.shape[3], generator=generator)
    return replace(side, means=means), tokens + means.unsqueeze(1)


def _turned(tokens: torch.Tensor, turn: KeyTurn, first: int) -> torch.Tensor:
    """Rotary embedding as a product of complex numbers, in fp64."""
    half = len(turn.inverse_frequencies)
    places = torch.arange(first, first + tokens.shape[2], dtype=torch.float64)
    wave = torch.polar(torch.ones(()).double(), places.unsqueeze(1) * turn.inverse_frequencies.double())
    pairs = torch.complex(tokens[..., :half].double(), tokens[..., half : 2 * half].double()) * wave * turn.scale
    return torch.cat([pairs.real.float(), pairs.imag.float(), tokens[..., 2 * half :]], dim=-1)
