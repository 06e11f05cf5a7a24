"""Decode attention straight from sparse codes: one query token a sequence, everything in one call.

A sequence is `sinks exact tokens | pages of sparse codes | exact window`. A stored key or value is a sum of
a few atoms of a dictionary; probabilities are gathered by atom, y[i_j] += p c_j, before they meet the
dictionary once. Keys are coded in one of two ways:

- after RoPE: with T = query·dictionary^T, N products a head once a step, a token's score is sum_j c_j T[i_j].
  One table serves every position, and no key is restored;
- before RoPE (`SparsePast.turn`): codes are better, but no table serves two positions. A key is restored and
  turned in registers, for all query heads that read it, and never written to memory.

What all keys or values of a head have in common may be taken off before they are coded (`SparseSide.means`).

Layout of a page: **planar**. The tokens of one atom slot are neighbours. A vector of `parts` parts has
`parts * atoms` slots, those of part 0 first.
"""

from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch
from kvlens.kernels.exact_tokens import Attended, ExactTokens, KnownShapes, check_exact, check_shape

__all__ = ["Attended", "ExactTokens", "KeyTurn", "SparseLayout", "SparsePast", "SparseSide", "sparse_attend"]

PACKED_BITS, SEPARATE_BITS = 6, 16
INDEX_BITS = 10  # of a packed word; the coefficient's code takes the 6 above them
LARGEST_CODE = 31


@dataclass(frozen=True)
class SparseLayout:
    """How a page stores its tokens.

    `page_tokens` (P) tokens a page, `key_atoms` atoms a key, `value_atoms` atoms for each of the `value_parts`
    (1 or 2) that a value is cut into, in channel order. `coefficient_bits` 6: an atom is one word, index in
    the low 10 bits and a signed code of -31..31 above, coefficient = scale * code / 31 with one scale a
    vector. 16: a word is an index, and its coefficient an fp16 number beside it.

    Raises: ValueError for a number that no page can have.
    """

    page_tokens: int
    key_atoms: int
    value_atoms: int
    value_parts: int = 1
    coefficient_bits: int = PACKED_BITS

    def __post_init__(self) -> None:
        for name in ("page_tokens", "key_atoms", "value_atoms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.value_parts not in (1, 2):
            raise ValueError(f"value_parts must be 1 or 2; got {self.value_parts}")
        if self.coefficient_bits not in (PACKED_BITS, SEPARATE_BITS):
            raise ValueError(
                f"coefficient_bits must be {PACKED_BITS} (packed) or {SEPARATE_BITS} (fp16 apart); "
                f"got {self.coefficient_bits}"
            )

    @property
    def is_packed(self) -> bool:
        """Whether an atom is one word, index and coefficient together."""
        return self.coefficient_bits == PACKED_BITS

    @property
    def max_atoms(self) -> int:
        """The largest dictionary that an index can name."""
        return 2**INDEX_BITS if self.is_packed else 2**15


@dataclass(frozen=True)
class SparseSide:
    """The keys, or the values, of a pool of pages.

    Shapes: words int16 `[num_pages, HK, parts*atoms, P]`; coefficients fp16 of the same shape, or in packed
    pages the scale of every vector, `[num_pages, HK, P]`; dictionary fp32 `[N, D/parts]`, shared by all heads
    and parts; means fp32 `[HK, D]`, added to every token of a head, or None. Every index must be less than N,
    also in slots whose coefficient is 0.
    """

    words: torch.Tensor
    coefficients: torch.Tensor
    dictionary: torch.Tensor
    means: torch.Tensor | None = None


@dataclass(frozen=True)
class KeyTurn:
    """The rotary position embedding of keys that are coded before it, on pairs of channels half a width apart.

    Shapes: inverse_frequencies fp32 `[W/2]`, W <= D. Channels p and p + W/2 of token t (counted over the whole
    sequence) are turned by the angle inverse_frequencies[p] * t and multiplied by `scale`; channels from W on
    pass.
    """

    inverse_frequencies: torch.Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class SparsePast:
    """The coded tokens of a layer for every sequence of a batch.

    Shapes: page_table int32 `[B, M]`: the page of tokens m*P .. m*P+P-1, for keys and values alike;
    num_tokens int32 `[B]`, at most M*P. Entries of the table past the last used page are never read.
    `turn`: what keys are turned by once restored, means included; None if they were coded after RoPE.
    """

    layout: SparseLayout
    keys: SparseSide
    values: SparseSide
    page_table: torch.Tensor
    num_tokens: torch.Tensor
    turn: KeyTurn | None = None


def sparse_attend(query: torch.Tensor, past: SparsePast, exact: ExactTokens, *, scaling: float) -> Attended:
    """softmax(scaling * q·K^T) V over all tokens of each sequence, read from coded and exact storage.

    Shapes: query `[B, HQ, D]` with HQ a multiple of HK; query head h reads key/value head h // (HQ/HK). A key
    or value is read from the ring if S + num_tokens <= t < length. A sequence of length 0 gives zeros and a
    log-sum-exp of -inf.
    Raises: ValueError for shapes that do not belong together.
    """
    _check(query, past, exact)
    module = dispatch.implementation("sparse_attend", query.device)
    return module.sparse_attend(query, past, exact, scaling=scaling)


_known_to_fit = KnownShapes()


def _check(query: torch.Tensor, past: SparsePast, exact: ExactTokens) -> None:
    shapes = (
        past.layout, query.shape, exact.keys.shape, exact.values.shape, exact.sink_keys.shape,
        exact.sink_values.shape, exact.length.shape, past.num_tokens.shape, past.page_table.shape,
        *(part.shape for side in (past.keys, past.values) for part in (side.words, side.coefficients, side.dictionary)),
        *(None if means is None else means.shape for means in (past.keys.means, past.values.means)),
        None if past.turn is None else past.turn.inverse_frequencies.shape,
    )  # fmt: skip
    _known_to_fit.check(shapes, lambda: _compare(query, past, exact))


def _compare(query: torch.Tensor, past: SparsePast, exact: ExactTokens) -> None:
    check_exact(query, exact)
    batch, _, head_dim = query.shape
    layout = past.layout
    if head_dim % layout.value_parts != 0:
        raise ValueError(f"value_parts must divide the head dim of {head_dim}; got {layout.value_parts}")
    check_shape("past.num_tokens", past.num_tokens, (batch,))
    check_shape("past.page_table", past.page_table, (batch, None))
    for name, side, atoms, parts in (
        ("keys", past.keys, layout.key_atoms, 1),
        ("values", past.values, layout.value_atoms, layout.value_parts),
    ):
        heads, slots = exact.keys.shape[1], parts * atoms
        words = (None, heads, slots, layout.page_tokens)
        scale = (None, heads, layout.page_tokens)
        check_shape(f"past.{name}.words", side.words, words)
        check_shape(f"past.{name}.coefficients", side.coefficients, scale if layout.is_packed else words)
        check_shape(f"past.{name}.dictionary", side.dictionary, (None, head_dim // parts))
        if side.means is not None:
            check_shape(f"past.{name}.means", side.means, (heads, head_dim))
        if len(side.dictionary) > layout.max_atoms:
            raise ValueError(
                f"past.{name}.dictionary must have at most {layout.max_atoms} atoms where coefficients have "
                f"{layout.coefficient_bits} bits; got {len(side.dictionary)}"
            )
    if past.turn is not None:
        check_shape("past.turn.inverse_frequencies", past.turn.inverse_frequencies, (None,))
        width = 2 * len(past.turn.inverse_frequencies)
        if not 0 < width <= head_dim:
            raise ValueError(f"past.turn must turn 2 to {head_dim} channels, the head dim; got {width}")
    elif past.keys.means is not None:
        raise ValueError(
            "past.keys.means need past.turn: the mean of keys that were coded after RoPE changes with the position; "
            "got no turn. Code keys before RoPE, or leave their mean in."
        )
