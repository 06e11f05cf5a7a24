"""What sparse codes are made of: which atoms, how often, and how much of a vector each brings back.

A method that stores vectors as sums of atoms tells what it stores (`CodedVectors`); here it is counted, outside the
clock of the step, for the layer under the microscope. Like the error probe it looks at the first sequence of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvlens.engine.trace import AtomSnapshot, CodedSide, ErrorSnapshot
from kvlens.kernels.pursuit import SparseCodes

if TYPE_CHECKING:
    from kvlens.engine.cache import KVCache


@dataclass(frozen=True)
class CodedVectors:
    """Keys or values of a layer as sums of atoms, from token `first_token` on.

    `coded_part` takes exact tokens as attention sees them to the vectors that the atoms add up to: it may turn them
    (keys before RoPE) and take something off (a mean).
    Shapes: codes `[HK, t, parts * s]`, the s atoms of one part of the channels after those of the other; atoms fp32
    `[N, D / parts]`; coded_part `[HK, t, D]` → the same.
    """

    first_token: int
    codes: SparseCodes
    parts: int
    atoms: torch.Tensor
    coded_part: Callable[[torch.Tensor], torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return self.codes.indices.shape[1]

    def in_steps(self) -> SparseCodes:
        """The codes as they were chosen, one atom of each part at a time. Shapes: `[HK, t, s, parts]`."""
        cut = (self.parts, self.codes.indices.shape[-1] // self.parts)
        sides = (self.codes.indices, self.codes.coefficients)
        return SparseCodes(*(side.unflatten(-1, cut).transpose(-1, -2) for side in sides))

    @property
    def coverage(self) -> float:
        """The share of the atoms that are used at least once."""
        is_used = torch.zeros(len(self.atoms), dtype=torch.bool, device=self.atoms.device)
        is_used[self.codes.indices.flatten().long()] = True
        return is_used.float().mean().item()


def snapshot(cache: "KVCache", errors: ErrorSnapshot) -> AtomSnapshot | None:
    """The atoms behind a cache's codes so far; None for a method without any. `errors` has the exact tokens."""
    layer = errors.probed_layer
    found = [[cache.coded_vectors(each, side) for each in range(cache.shape.num_layers)] for side in range(2)]
    if found[0][layer] is None:
        return None
    sides = (_side(coded[layer], torch.from_numpy(errors.exact[side])) for side, coded in enumerate(found))
    coverage = torch.tensor([[coded.coverage for coded in layers] for layers in found])
    return AtomSnapshot(layer, coverage.numpy(), *sides)


def _side(coded: CodedVectors, exact: torch.Tensor) -> CodedSide:
    """One side of the layer under the microscope. Shapes: exact fp32 `[HK, T, D]`, NaN where it is not known."""
    own = exact[:, coded.first_token : coded.first_token + coded.num_tokens].to(coded.atoms.device)
    start = -coded.coded_part(torch.zeros_like(own))
    whole = coded.coded_part(own) + start
    codes = coded.in_steps()
    remaining = _remaining(codes, coded.atoms, whole, start)
    if bool((start == start[:, :1]).all()):
        start = start[:, :1]
    host = (tensor.float().cpu().numpy() for tensor in (codes.coefficients, whole, start, remaining, coded.atoms))
    return CodedSide(coded.first_token, codes.indices.int().cpu().numpy(), *host)


def _remaining(codes: SparseCodes, atoms: torch.Tensor, whole: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """What is missing after 0, 1, 2, ... atoms, as a share of the vector's norm. Shapes: `[HK, t, s * parts + 1]`."""
    sums, width = start.clone(), atoms.shape[1]
    missing = [(whole - sums).norm(dim=-1)]
    for step in range(codes.indices.shape[2]):
        for part in range(codes.indices.shape[3]):
            chosen = atoms[codes.indices[..., step, part].long()]
            sums[..., part * width : (part + 1) * width] += codes.coefficients[..., step, part, None] * chosen
            missing.append((whole - sums).norm(dim=-1))
    return torch.stack(missing, dim=-1) / whole.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
