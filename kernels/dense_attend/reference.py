"""The definition of dense decode attention in plain fp32 torch."""

import torch


def dense_attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """See `kvlens.kernels.dense_attend.dense_attend`."""
    output = torch.zeros_like(query)
    for row, count in enumerate(length.tolist()):
        queries = query[row].float().unflatten(0, (keys.shape[1], -1))
        scores = scaling * queries @ keys[row, :, :count].float().transpose(-1, -2)
        output[row] = (scores.softmax(dim=-1) @ values[row, :, :count].float()).flatten(0, 1).to(query.dtype)
    return output
