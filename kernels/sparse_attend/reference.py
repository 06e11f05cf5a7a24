"""The definition of attention over sparse codes: restore every key and value in fp32, then one softmax.

It is what the fast kernels are tested against, and what runs where neither Triton nor the native CPU
kernels load.
"""

import torch

from kvlens.kernels.exact_tokens import Attended, ExactTokens
from kvlens.kernels.rebuilt import attend_rebuilt, join
from kvlens.kernels.sparse_attend import INDEX_BITS, LARGEST_CODE, KeyTurn, SparseLayout, SparsePast, SparseSide


def sparse_attend(query: torch.Tensor, past: SparsePast, exact: ExactTokens, *, scaling: float) -> Attended:
    """See `kvlens.kernels.sparse_attend.sparse_attend`."""
    return attend_rebuilt(query, exact.length, lambda row: rebuild(past, exact, row), scaling=scaling)


def rebuild(past: SparsePast, exact: ExactTokens, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values of sequence `row` in fp32. Shapes: `[HK, length, D]` each."""
    length, num_tokens = int(exact.length[row]), int(past.num_tokens[row])
    pages = past.page_table[row, : -(-num_tokens // past.layout.page_tokens)].long()
    keys = _restore(past.keys, pages, num_tokens, past.layout, parts=1)
    if past.turn is not None:
        keys = turned(keys, past.turn, first=exact.sink_keys.shape[2])
    values = _restore(past.values, pages, num_tokens, past.layout, parts=past.layout.value_parts)
    return (
        join(exact.sink_keys[row], keys, exact.keys[row], length),
        join(exact.sink_values[row], values, exact.values[row], length),
    )


def _restore(
    side: SparseSide, pages: torch.Tensor, num_tokens: int, layout: SparseLayout, *, parts: int
) -> torch.Tensor:
    """The first `num_tokens` coded tokens of a sequence in fp32. Shapes: `[HK, num_tokens, D]`."""
    words = side.words[pages].permute(1, 0, 3, 2).flatten(1, 2)[:, :num_tokens].int()
    if layout.is_packed:
        scale = side.coefficients[pages].transpose(0, 1).flatten(1, 2)[:, :num_tokens].float()
        coefficients = scale.unsqueeze(-1) * (words >> INDEX_BITS) / LARGEST_CODE
        indices = words & ((1 << INDEX_BITS) - 1)
    else:
        coefficients = side.coefficients[pages].permute(1, 0, 3, 2).flatten(1, 2)[:, :num_tokens].float()
        indices = words
    atoms = side.dictionary[indices.long()] * coefficients.unsqueeze(-1)
    tokens = atoms.unflatten(2, (parts, -1)).sum(dim=3).flatten(2, 3)
    return tokens if side.means is None else tokens + side.means.unsqueeze(1)


def turned(keys: torch.Tensor, turn: KeyTurn, *, first: int) -> torch.Tensor:
    """Keys of the tokens `first`, first+1, .. turned by their places. Shapes: `[..., T, D]`; angles in fp64."""
    places = torch.arange(first, first + keys.shape[-2], dtype=torch.float64, device=keys.device)
    angles = places.unsqueeze(1) * turn.inverse_frequencies.double()
    cosines, sines = ((turn.scale * wave).float() for wave in (angles.cos(), angles.sin()))
    half = len(turn.inverse_frequencies)
    low, high, rest = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines, rest], dim=-1)
