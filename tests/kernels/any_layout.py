"""Property tests of attention: small batches of every layout, drawn by hypothesis."""

import torch
from cases import AttendCase
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import SparseCase
from triton_checks import check_attend, check_sparse


def check_any_layout(device: str, max_examples: int) -> None:
    """`packed_attend` equals its reference on `max_examples` layouts, always the same ones."""

    @settings(max_examples=max_examples, deadline=None)
    @given(case=any_attend_case())
    def check(case: AttendCase) -> None:
        check_attend(case, device)

    check()


def check_any_sparse_layout(device: str, max_examples: int) -> None:
    """`sparse_attend` equals its reference on `max_examples` batches, always the same ones."""

    @settings(max_examples=max_examples, deadline=None)
    @given(case=any_sparse_case())
    def check(case: SparseCase) -> None:
        check_sparse(case, device)

    check()


@st.composite
def any_attend_case(draw) -> AttendCase:
    """Small batches of every layout: bits, groups, pages, heads, sinks, ragged lengths."""
    key_bits, value_bits = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    page_tokens = draw(st.sampled_from([32, 64, 96, 128]))
    head_dim = draw(st.sampled_from([16, 32, 48, 64, 128]))
    heads_per_kv = draw(st.sampled_from([1, 2, 3, 8, 9]))
    num_kv_heads = draw(st.sampled_from([1, 2]))
    num_sinks = draw(st.integers(0, 5))
    num_keys, num_values, lengths = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        keys, values = draw(st.integers(0, 200)), draw(st.integers(0, 200))
        num_keys.append(keys)
        num_values.append(values)
        is_packed = max(keys, values) > 0
        window = draw(st.integers(0, 40))
        lengths.append(num_sinks * is_packed + max(keys, values) + window)
    return AttendCase(
        name="any",
        lengths=tuple(lengths),
        num_keys=tuple(num_keys),
        num_values=tuple(num_values),
        num_query_heads=heads_per_kv * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        page_tokens=page_tokens,
        key_group_size=draw(st.sampled_from([group for group in (16, 32, 64) if page_tokens % group == 0])),
        value_group_size=draw(st.sampled_from([group for group in (8, 16, 32, 64) if head_dim % group == 0])),
        num_sinks=num_sinks,
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
    )


@st.composite
def any_sparse_case(draw) -> SparseCase:
    """Any batch, in few formats: each is compiled anew."""
    num_sinks = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, 500), min_size=1, max_size=3))
    num_kv_heads, parts = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    return SparseCase(
        name="drawn",
        lengths=tuple(lengths),
        num_coded=tuple(draw(st.integers(0, max(0, length - num_sinks))) for length in lengths),
        num_query_heads=num_kv_heads * draw(st.sampled_from([1, 2, 5])),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([16, 64])),
        key_atoms=3,
        value_atoms=4,
        value_parts=parts,
        coefficient_bits=draw(st.sampled_from([6, 16])),
        num_key_atoms=draw(st.integers(1, 1024)),
        num_value_atoms=draw(st.integers(1, 1024)),
        page_tokens=draw(st.integers(1, 100)),
        num_sinks=num_sinks,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        spread=draw(st.sampled_from(["normal", "equal", "outliers"])),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
    )
