"""What every decode attention over a compressed cache has around it: the exact tokens, and the answer.

This module does not know how the other tokens are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExactTokens:
    """The exact tokens around the packed ones.

    Shapes: keys `[B, HK, CK, D]`, values `[B, HK, CV, D]`, rings: token t of a sequence lies at slot
    `t % CK` and `t % CV`; sink_keys, sink_values `[B, HK, S, D]`, tokens 0..S-1 (S may be 0);
    length int32 `[B]`: all tokens of the sequence, sinks and packed ones included.

    Token t < S is a sink (sinks past `length` do not exist). Packed token i is token S + i. A key is
    read from the ring if S + num_keys <= t < length, a value if S + num_values <= t < length.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    length: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """Output `[B, HQ, D]` in the query's dtype and log-sum-exp fp32 `[B, HQ]` of the scaled scores."""

    output: torch.Tensor
    log_sum_exp: torch.Tensor


class KnownShapes:
    """Combinations of shapes that were found to fit: decode asks the same question at every step."""

    _MOST = 10_000

    def __init__(self) -> None:
        self._known: set[tuple] = set()

    def check(self, shapes: tuple, compare: Callable[[], None]) -> None:
        """Run `compare`, which raises where they do not fit, unless `shapes` are known. Shapes that fit are kept."""
        if shapes not in self._known:
            compare()
            if len(self._known) > self._MOST:
                self._known.clear()
            self._known.add(shapes)


def check_exact(query: torch.Tensor, exact: ExactTokens) -> None:
    """Raises: ValueError where the query and the exact tokens do not belong together."""
    if query.ndim != 3:
        raise ValueError(f"query must be [B, HQ, D]; got shape {tuple(query.shape)}")
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads = exact.keys.shape[1]
    if num_query_heads % num_kv_heads != 0:
        raise ValueError(f"query heads must be a multiple of the {num_kv_heads} key/value heads; got {num_query_heads}")
    for name in ("keys", "values", "sink_keys", "sink_values"):
        check_shape(f"exact.{name}", getattr(exact, name), (batch, num_kv_heads, None, head_dim))
    check_shape("exact.length", exact.length, (batch,))


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises: ValueError where `tensor` has another shape; a size of None is any."""
    if tensor.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}]; got {list(tensor.shape)}")
