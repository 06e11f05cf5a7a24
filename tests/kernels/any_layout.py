"""Property tests of packed attention: small batches of every layout, drawn by hypothesis."""

import torch
from cases import AttendCase
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_checks import check_attend


def check_any_layout(device: str, max_examples: int) -> None:
    """`packed_attend` equals its reference on `max_examples` layouts, always the same ones."""

    @settings(max_examples=max_examples, deadline=None, derandomize=True)
    @given(case=any_attend_case())
    def check(case: AttendCase) -> None:
        check_attend(case, device)

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
