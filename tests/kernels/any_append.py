"""Property tests of append-and-pack: small batches of every rule and layout, drawn by hypothesis."""

import torch
from append_checks import AppendCase, Prepare, check_append
from hypothesis import given, settings
from hypothesis import strategies as st


def check_any_append(prepare: Prepare, max_examples: int, device: str = "cpu") -> None:
    """Steps of `prepare`d calls give what the history gives on `max_examples` batches, always the same ones."""

    @settings(max_examples=max_examples, deadline=None)
    @given(case=any_append_case())
    def check(case: AppendCase) -> None:
        check_append(case, prepare, device)

    check()


@st.composite
def any_append_case(draw) -> AppendCase:
    """Any rule and batch, with sequences near their next flush as often as elsewhere."""
    key_bits, value_bits = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8]))
    page_tokens, head_dim = draw(st.sampled_from([32, 48, 64, 128])), draw(st.sampled_from([16, 48, 64, 128]))
    residual = page_tokens * draw(st.integers(1, 2))
    num_sinks = draw(st.integers(0, 40))
    flushes = st.builds(
        lambda blocks, offset: max(-1, num_sinks + residual * blocks + offset), st.integers(0, 3), st.integers(-3, 3)
    )
    starts = draw(st.lists(flushes | st.integers(-1, 300), min_size=1, max_size=3))
    return AppendCase(
        name="drawn",
        starts=tuple(starts),
        num_steps=draw(st.integers(1, 4)),
        num_kv_heads=draw(st.integers(1, 2)),
        head_dim=head_dim,
        key_bits=key_bits,
        value_bits=value_bits,
        page_tokens=page_tokens,
        key_group_size=draw(st.sampled_from([group for group in (16, 24, 32, 64, 128) if page_tokens % group == 0])),
        value_group_size=draw(st.sampled_from([group for group in (8, 12, 16, 32, 128) if head_dim % group == 0])),
        residual=residual,
        key_window=draw(st.sampled_from([0, 0, 3, 40])),
        value_window=draw(st.sampled_from([None, None, 0, 17])),
        value_flush=draw(st.sampled_from([1, 2, 8, 20, 32, 128])),
        num_sinks=num_sinks,
        spare_slots=draw(st.sampled_from([0, 0, 5])),
        dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        spread=draw(st.sampled_from(["normal", "equal", "outliers"])),
        strides=draw(st.sampled_from(["contiguous", "sliced"])),
        packs=draw(st.sampled_from([True, True, True, False])),
    )
