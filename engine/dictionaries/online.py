"""Atoms that come from the prompt itself, for what the learned ones do not know.

Source: CSR (arXiv 2412.11741): a dictionary at inference is the learned part, a part *sampled* from the prompt's own
keys or values ("reverse sequential sampling"), and a *guard* of outliers. Their sizes in the paper are 1024 to
4096 sampled and 2048 to 8192 guarded atoms a layer; they belong to one prompt and count as part of its cache.
The paper's: both parts, and that their atoms are the prompt's vectors at length 1. Ours, since the paper does not say:
"reverse sequential" as newest first; an outlier as a vector that the learned atoms restore worst.
"""

import torch
from torch.nn.functional import normalize

from kvlens.kernels.pursuit import pursue, restore


def extra_atoms(
    vectors: torch.Tensor, dictionary: torch.Tensor, *, num_sampled: int, num_guarded: int, sparsity: int
) -> torch.Tensor:
    """Atoms of one prompt to put behind `dictionary`: the guard, then the sample.

    Shapes: vectors `[..., T, W]` in the order of their tokens, dictionary fp32 `[N, W]`; fp32 `[count, W]`,
    with fewer rows than asked for if the prompt has fewer vectors.
    """
    guarded = guard(vectors, dictionary, num_guarded, sparsity=sparsity)
    return torch.cat([guarded, sample_newest(vectors, num_sampled)])


def sample_newest(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """The newest vectors that are not zero, newest first, the heads of one token together. Shapes: as `extra_atoms`."""
    newest = vectors.flatten(0, -3).flip(-2).transpose(0, -2) if vectors.ndim > 2 else vectors.flip(0)
    return _directions(newest.reshape(-1, vectors.shape[-1]), count)


def guard(vectors: torch.Tensor, dictionary: torch.Tensor, count: int, *, sparsity: int) -> torch.Tensor:
    """The vectors of which `sparsity` learned atoms lose the largest share, worst first. Shapes: as `extra_atoms`."""
    flat = vectors.reshape(-1, vectors.shape[-1]).float()
    lost = (flat - restore(pursue(flat, dictionary, sparsity=sparsity), dictionary)).square().sum(dim=1)
    share = lost / flat.square().sum(dim=1).clamp(min=1e-12)
    return _directions(flat[share.argsort(descending=True, stable=True)], count)


def _directions(vectors: torch.Tensor, count: int) -> torch.Tensor:
    return normalize(vectors[vectors.any(dim=1)][:count].float(), dim=1)
