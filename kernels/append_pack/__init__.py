"""One new token of each sequence into its exact window, and what falls due into the pages, decided on the device.

All that depends on the lengths is found where they lie, in one launch of a fixed shape, so that a step of a ragged
batch can be captured in a CUDA graph. Keys fall due in blocks of whole pages, values in runs of tokens (see
`FlushRule`); both are packed as `quantize_pack` packs them, to the bit.
"""

from dataclasses import asdict, dataclass

import torch

from kvlens.kernels import dispatch
from kvlens.kernels.exact_tokens import ExactTokens, KnownShapes, check_exact, check_shape
from kvlens.kernels.packed_attend import PackedPast, check_past
from kvlens.kernels.quantize_pack import check_layout


@dataclass(frozen=True)
class FlushRule:
    """When a token leaves the exact window: a pure function of the length, for keys and for values.

    Of n tokens the first `num_sinks` stay exact for ever; of the others, those older than the window are packed, a
    flush of them at a time.
    """

    num_sinks: int
    key_window: int
    key_flush: int
    value_window: int
    value_flush: int

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            least = 1 if name.endswith("flush") else 0
            if number < least:
                raise ValueError(f"{name} must be at least {least}; got {number}")

    def packed(self, side: int, num_tokens: int) -> int:
        """How many keys (side 0) or values (side 1) of `num_tokens` tokens are packed."""
        window, flush = (self.value_window, self.value_flush) if side else (self.key_window, self.key_flush)
        return max(0, num_tokens - self.num_sinks - window) // flush * flush


def append_pack(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> None:
    """Store token n - 1 of each sequence, whose `exact.length` n counts it already, and pack what is then due.

    The token is rounded to the window's dtype and written to its sink or its place in the rings. With a `past`,
    `past.num_keys` and `past.num_values` become what is packed of n - 1 tokens, which is what attention reads in
    this step; and the tokens that n tokens have due beyond those are written to their pages, behind the counts. They
    stay in the rings until the next token comes. Without a `past` only the window is written. A sequence of
    length 0 is left alone.

    Shapes: keys and values `[B, HK, D]`, any float dtype, any strides.
    Raises: ValueError for shapes that do not belong together, rings too short for what waits in them, or blocks of
    keys that do not fill whole pages.
    Limits: `past.page_table` must name the pages of what becomes due.
    """
    _check(keys, values, exact, rule, past)
    module = dispatch.implementation("append_pack", keys.device)
    module.append_pack(keys, values, exact, rule, past)


_known_to_fit = KnownShapes()


def _check(keys, values, exact: ExactTokens, rule: FlushRule, past: PackedPast | None) -> None:
    shapes = (
        rule, keys.shape, values.shape, exact.keys.shape, exact.values.shape, exact.sink_keys.shape,
        exact.sink_values.shape, exact.length.shape,
    )  # fmt: skip
    if past is not None:
        shapes += (
            past.layout, past.num_keys.shape, past.num_values.shape, past.page_table.shape,
            *(part.shape for side in (past.keys, past.values) for part in (side.codes, side.scale, side.minimum)),
        )  # fmt: skip
    _known_to_fit.check(shapes, lambda: _compare(keys, values, exact, rule, past))


def _compare(keys, values, exact: ExactTokens, rule: FlushRule, past: PackedPast | None) -> None:
    batch, num_kv_heads, _, head_dim = exact.keys.shape
    check_shape("keys", keys, (batch, num_kv_heads, head_dim))
    check_shape("values", values, (batch, num_kv_heads, head_dim))
    check_exact(keys, exact)
    for name in ("sink_keys", "sink_values"):
        check_shape(f"exact.{name}", getattr(exact, name), (None, None, rule.num_sinks, None))
    if past is None:
        return
    check_past(past, batch, num_kv_heads, head_dim)
    layout = past.layout
    check_layout(layout.page_tokens, bits=layout.key_bits, group_size=layout.key_group_size)
    check_layout(head_dim, bits=layout.value_bits, group_size=layout.value_group_size)
    if rule.key_flush % layout.page_tokens != 0:
        raise ValueError(f"key_flush must fill whole pages of {layout.page_tokens} tokens; got {rule.key_flush}")
    for name, needed in (
        ("keys", rule.key_window + rule.key_flush), ("values", rule.value_window + rule.value_flush)
    ):  # fmt: skip
        capacity = getattr(exact, name).shape[2]
        if capacity < needed:
            raise ValueError(f"the ring of {name} must hold a window and a flush, {needed} tokens; got {capacity}")
