"""Attention in pieces: every part of a cache answers queries with an output and a log-sum-exp.

A cache is a list of segments (exact sinks, packed past, exact window, ...). Each segment yields its
tokens in tiles small enough to rebuild; the answers merge by log-sum-exp into exactly one softmax over
all of them. It is the oracle of the tests, the way of a method that has no kernel, and the way in which
several new tokens at once attend to a packed past.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.nn.functional import scaled_dot_product_attention

TILE_TOKENS = 1024
"""How many tokens a segment rebuilds at a time: what bounds the memory of the slow path."""

SCORE_BYTES = 64 * 2**20
"""How large a block of fp32 scores may grow before queries are split."""


@dataclass(frozen=True)
class Tile:
    """Some tokens of a sequence. Shapes: keys, values `[HK, t, D]`."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Partial:
    """Attention over a part of the tokens. Shapes: output fp32 `[HQ, T, D]`, log_sum_exp fp32 `[HQ, T]`."""

    output: torch.Tensor
    log_sum_exp: torch.Tensor


def attend_tile(query: torch.Tensor, tile: Tile, *, scaling: float, is_causal: bool = False) -> Partial:
    """Attention of `query` over one tile, in fp32.

    Shapes: query `[HQ, T, D]`; with `is_causal` the queries are the last T of the tile's tokens.
    """
    num_queries = query.shape[1]
    rows = max(1, SCORE_BYTES // (4 * query.shape[0] * max(1, tile.keys.shape[1])))
    if num_queries <= rows:
        return _attend(query, tile, scaling=scaling, first=0 if is_causal else None)
    blocks = [
        _attend(query[:, start : start + rows], tile, scaling=scaling, first=start if is_causal else None,
                total=num_queries)
        for start in range(0, num_queries, rows)
    ]  # fmt: skip
    return Partial(
        torch.cat([block.output for block in blocks], dim=1),
        torch.cat([block.log_sum_exp for block in blocks], dim=1),
    )


def _attend(query: torch.Tensor, tile: Tile, *, scaling: float, first: int | None, total: int | None = None) -> Partial:
    num_kv_heads, num_tokens, head_dim = tile.keys.shape
    num_query_heads, num_queries, _ = query.shape
    grouped = query.float().reshape(num_kv_heads, -1, head_dim)
    scores = scaling * grouped @ tile.keys.float().transpose(-1, -2)
    scores = scores.view(num_query_heads, num_queries, num_tokens)
    if first is not None:
        total = num_queries if total is None else total
        newest = torch.arange(first, first + num_queries, device=query.device) + num_tokens - total
        hidden = torch.arange(num_tokens, device=query.device) > newest.unsqueeze(-1)
        scores = scores.masked_fill(hidden, -torch.inf)
    log_sum_exp = scores.logsumexp(dim=-1)
    weights = (scores - log_sum_exp.unsqueeze(-1)).exp()
    output = weights.view(num_kv_heads, -1, num_tokens) @ tile.values.float()
    return Partial(output.view(num_query_heads, num_queries, head_dim), log_sum_exp)


def attend_exact(query: torch.Tensor, tiles: Sequence[Tile], *, scaling: float) -> torch.Tensor:
    """Causal attention over exact tiles alone, the last tokens of which are the queries' own; by torch's own kernel.

    Shapes: query `[HQ, T, D]` → `[HQ, T, D]`.
    """
    keys, values = (torch.cat(side, dim=1) for side in zip(*((tile.keys, tile.values) for tile in tiles), strict=True))
    num_queries, num_keys = query.shape[1], keys.shape[1]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    return scaled_dot_product_attention(
        query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale=scaling, attn_mask=visible,
        enable_gqa=len(query) != len(keys),
    )[0]  # fmt: skip


def merge(left: Partial, right: Partial) -> Partial:
    """Attention over the union of two disjoint sets of tokens."""
    total = torch.logaddexp(left.log_sum_exp, right.log_sum_exp)
    # Where both sides are empty the weights are exp(-inf - -inf): no tokens, no output.
    safe = torch.where(total.isneginf(), 0.0, total)
    output = (left.log_sum_exp - safe).exp().unsqueeze(-1) * left.output
    output = output + (right.log_sum_exp - safe).exp().unsqueeze(-1) * right.output
    return Partial(output, total)


def merge_all(partials: Iterable[Partial]) -> Partial:
    """Attention over the union of all parts. Raises: TypeError if there is none."""
    return reduce(merge, partials)


def exact_tiles(keys: torch.Tensor, values: torch.Tensor) -> Iterator[Tile]:
    """Exact tokens as a single tile; nothing if there are none. Shapes: `[HK, T, D]`."""
    if keys.shape[1]:
        yield Tile(keys, values)
