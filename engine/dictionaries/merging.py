"""Which neighbouring layers may share one dictionary, by how alike their keys or values are spread.

Source: CSR (arXiv 2412.11741), equations 6 and 7: vectors of two neighbouring layers are brought to length 1 and
projected on their first two principal components; their 200 x 200 histograms are compared by Jensen-Shannon divergence.
Layers join while every divergence of neighbours is at most `pair_limit` (delta 1) and the sum within the group at
most `group_limit` (delta 2). The paper does not give the two limits. Divergences here are in bits, 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

NUM_BINS = 200


@dataclass(frozen=True)
class MergeLimits:
    """How unlike layers may be that share a dictionary. Units: bits of Jensen-Shannon divergence."""

    pair_limit: float
    group_limit: float


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Jensen-Shannon divergence of two sets of vectors `[M, W]` in the plane of their principal components, in bits."""
    one, other = normalize(one.float(), dim=1), normalize(other.float(), dim=1)
    both = torch.cat([one, other])
    mean = both.mean(dim=0)
    _, axes = torch.linalg.eigh((both - mean).T @ (both - mean))
    plane = axes[:, -2:]
    points = (both - mean) @ plane
    low, high = points.aminmax(dim=0)
    spread = (high - low).clamp(min=1e-12)
    cells = ((points - low) / spread * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    cells = cells[:, 0] * NUM_BINS + cells[:, 1]
    shares = [
        torch.bincount(part, minlength=NUM_BINS**2).double() / len(part)
        for part in (cells[: len(one)], cells[len(one) :])
    ]
    middle = (shares[0] + shares[1]) / 2
    return sum(_relative_entropy(share, middle) for share in shares) / 2


def _relative_entropy(share: torch.Tensor, middle: torch.Tensor) -> float:
    filled = share > 0
    return (share[filled] * (share[filled] / middle[filled]).log2()).sum().item()


def groups(divergences: Sequence[float], limits: MergeLimits | None) -> list[list[int]]:
    """Layers that share a dictionary, from the divergences of neighbours; every layer alone without limits."""
    merged, total = [[0]], 0.0
    for layer, value in enumerate(divergences, start=1):
        total += value
        if limits is not None and value <= limits.pair_limit and total <= limits.group_limit:
            merged[-1].append(layer)
        else:
            merged.append([layer])
            total = 0.0
    return merged
