"""A wider MLP from a narrower one that computes the same, so that a finished model can go on learning with more room.

New neurons read with weights of the old ones' spread and write nothing yet: their columns of `down_proj` are zero.
The first step of training changes that. The module does not know the training.
"""

from __future__ import annotations

import torch

READING = ("gate_proj", "up_proj")
WRITING = "down_proj"


def widened(state: dict[str, torch.Tensor], *, mlp_size: int, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a Llama with `mlp_size` neurons in each MLP; the same if it has as many already.

    `gate_proj` and `up_proj` are `(neurons, hidden)`, `down_proj` is `(hidden, neurons)`.
    Raises: ValueError if the MLPs are wider than `mlp_size`.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _widened(name, weight, mlp_size, generator) for name, weight in state.items()}


def _widened(name: str, weight: torch.Tensor, mlp_size: int, generator: torch.Generator) -> torch.Tensor:
    is_reading = any(part in name for part in READING)
    if not is_reading and WRITING not in name:
        return weight
    num_old, num_hidden = weight.shape if is_reading else weight.shape[::-1]
    if num_old > mlp_size:
        raise ValueError(f"an MLP can only be widened: {name} has {num_old} neurons, got mlp_size {mlp_size}")
    if is_reading:
        new = torch.randn(mlp_size - num_old, num_hidden, generator=generator) * weight.std()
        return torch.cat([weight, new.to(weight)])
    return torch.cat([weight, weight.new_zeros(num_hidden, mlp_size - num_old)], dim=1)
