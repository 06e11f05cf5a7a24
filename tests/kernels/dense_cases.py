"""Ugly cases for dense decode attention: buffers whose tokens behind each sequence's last one are NaN."""

from dataclasses import dataclass, replace

import torch
from cases import stored


@dataclass(frozen=True)
class DenseCase:
    """One batch for `dense_attend`; `lengths` has one entry a sequence, `strides="sliced"` makes views."""

    name: str
    lengths: tuple[int, ...]
    capacity: int = 320
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    strides: str = "contiguous"
    scaling: float | None = None  # None: 1 / sqrt(head_dim)


@dataclass(frozen=True)
class DenseInputs:
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor
    scaling: float


def dense_cases() -> list[DenseCase]:
    base = DenseCase("base", (300,))
    return [
        base,
        *(replace(base, name=f"length{length}", lengths=(length,)) for length in (0, 1, 2, 63, 64, 65, 320)),
        replace(base, name="ragged", lengths=(1, 0, 320, 256, 33, 129)),
        replace(base, name="one_part", lengths=(1, 0, 40), capacity=48, num_kv_heads=4),
        replace(base, name="capacity_off_the_tile", lengths=(77,), capacity=77),
        replace(base, name="sliced", lengths=(201, 7), strides="sliced"),
        replace(base, name="large_scores", dtype=torch.float32, scaling=3.0),
        *(
            replace(base, name=f"heads{hq}_{hk}", num_query_heads=hq, num_kv_heads=hk, lengths=(150,))
            for hq, hk in [(1, 1), (3, 3), (7, 1), (6, 2), (14, 2), (16, 1), (17, 1)]
        ),
        *(
            replace(base, name=f"{str(dtype)[6:]}_dim{dim}", head_dim=dim, dtype=dtype, lengths=(130, 3))
            for dim in (16, 64, 80, 96, 128, 256)
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ),
    ]


def build_dense(case: DenseCase, *, device: str = "cpu", seed: int = 0) -> DenseInputs:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(case.lengths), case.num_kv_heads, case.capacity, case.head_dim)
    keys, values = (torch.randn(shape, generator=generator).to(case.dtype) for _ in range(2))
    for row, length in enumerate(case.lengths):
        keys[row, :, length:] = torch.nan
        values[row, :, length:] = torch.nan
    query = torch.randn(len(case.lengths), case.num_query_heads, case.head_dim, generator=generator).to(case.dtype)
    return DenseInputs(
        *(stored(tensor, case.strides, device) for tensor in (query, keys, values)),
        length=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        scaling=case.head_dim**-0.5 if case.scaling is None else case.scaling,
    )
