"""Decode attention straight from a packed cache: one query token a sequence, everything in one launch.

A sequence is `sinks exact tokens | packed pages | exact window`. Keys and values may be packed to
different lengths (KIVI flushes keys in blocks and values token by token), so a token's key can already
be packed while its value is still exact. Nothing here rebuilds the dense cache: scale and minimum are
folded into the query (keys) and into the probabilities (values).

Keys are stored after RoPE, so the order of tokens does not matter to the result and pages may lie
anywhere in the pool.
"""

from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch
from kvlens.kernels.exact_tokens import Attended, ExactTokens, KnownShapes, check_exact, check_shape
from kvlens.kernels.quantize_pack import Packed

__all__ = ["Attended", "ExactTokens", "PackedPast", "PageLayout", "check_past", "packed_attend"]


@dataclass(frozen=True)
class PageLayout:
    """How a page stores its tokens.

    `page_tokens` (P) tokens a page; keys in groups of `key_group_size` tokens of one channel, values in
    groups of `value_group_size` channels of one token.
    """

    page_tokens: int
    key_bits: int
    value_bits: int
    key_group_size: int
    value_group_size: int


@dataclass(frozen=True)
class PackedPast:
    """The packed tokens of a layer for every sequence of a batch.

    Shapes: keys.codes `[num_pages, HK, D, P*key_bits/16]`, keys.scale `[num_pages, HK, D, P/key_group_size]`;
    values.codes `[num_pages, HK, P, D*value_bits/16]`, values.scale `[num_pages, HK, P, D/value_group_size]`
    (planar rows, see `quantize_pack`); page_table int32 `[B, M]`: the page of tokens m*P .. m*P+P-1;
    num_keys, num_values int32 `[B]`: packed tokens, each at most M*P. Entries of the table past the last
    used page are never read.
    """

    layout: PageLayout
    keys: Packed
    values: Packed
    page_table: torch.Tensor
    num_keys: torch.Tensor
    num_values: torch.Tensor


def packed_attend(query: torch.Tensor, past: PackedPast, exact: ExactTokens, *, scaling: float) -> Attended:
    """softmax(scaling * q·K^T) V over all tokens of each sequence, read from packed and exact storage.

    Shapes: query `[B, HQ, D]` with HQ a multiple of HK; query head h reads key/value head h // (HQ/HK).
    A sequence of length 0 gives zeros and a log-sum-exp of -inf.
    Raises: ValueError for shapes that do not belong together.
    """
    _check(query, past, exact)
    module = dispatch.implementation("packed_attend", query.device)
    return module.packed_attend(query, past, exact, scaling=scaling)


_known_to_fit = KnownShapes()


def _check(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> None:
    shapes = (
        past.layout, query.shape, exact.keys.shape, exact.values.shape, exact.sink_keys.shape,
        exact.sink_values.shape, exact.length.shape, past.num_keys.shape, past.num_values.shape,
        past.page_table.shape, past.keys.codes.shape, past.values.codes.shape,
    )  # fmt: skip
    _known_to_fit.check(shapes, lambda: _compare(query, past, exact))


def _compare(query: torch.Tensor, past: PackedPast, exact: ExactTokens) -> None:
    check_exact(query, exact)
    check_past(past, len(query), exact.keys.shape[1], query.shape[-1])


def check_past(past: PackedPast, batch: int, num_kv_heads: int, head_dim: int) -> None:
    """Raises: ValueError where the packed tokens have other shapes than such a cache's."""
    layout = past.layout
    check_shape("past.num_keys", past.num_keys, (batch,))
    check_shape("past.num_values", past.num_values, (batch,))
    check_shape("past.page_table", past.page_table, (batch, None))
    for name, packed, num_rows, row, bits, group_size in (
        ("keys", past.keys, head_dim, layout.page_tokens, layout.key_bits, layout.key_group_size),
        ("values", past.values, layout.page_tokens, head_dim, layout.value_bits, layout.value_group_size),
    ):
        for part, size in (("codes", row * bits // 16), ("scale", row // group_size), ("minimum", row // group_size)):
            check_shape(f"past.{name}.{part}", getattr(packed, part), (None, num_kv_heads, num_rows, size))
