"""What the native kernels derive from a cache's constants, once: rows of atoms and means, cosines and sines.

Each is kept for as long as the tensor that it came from. Limits: a dictionary, means or frequencies that are
changed in place later on are not read again.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvlens.kernels.native.turned_rows import row_lanes
from kvlens.kernels.native.vectors import NUM_LANES
from kvlens.kernels.sparse_attend import KeyTurn

_FEWEST_PAGES = 64

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
Made = TypeVar("Made")


def _once(tensor: torch.Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` gave for this tensor and key, or what it gives now."""
    of_tensor = _made.get(tensor)
    if of_tensor is None:
        of_tensor = _made.setdefault(tensor, {})
    if key not in of_tensor:
        with torch.inference_mode(False):
            of_tensor[key] = make()
    return of_tensor[key]


def rows(tensor: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Atoms or means with their channels in whole vectors, see `turned_rows`. Shapes: `[n, D]` to `[n, row]`."""

    def make() -> torch.Tensor:
        lanes = row_lanes(tensor.shape[1], width)
        made = torch.zeros(len(tensor), NUM_LANES * len(lanes), dtype=dtype)
        for index, (first, count) in enumerate(lanes):
            made[:, NUM_LANES * index : NUM_LANES * index + count] = tensor[:, first : first + count]
        return made

    return _once(tensor, ("rows", width, dtype), make)


@dataclass(frozen=True)
class Waves:
    """Cosines, then sines, filled up to whole vectors. Shapes: fp32, steps `[16 + 1, waves]`, starts `[pages, waves]`.

    `steps`: of the tokens 0 .. 15 with the turn's scale, then of 16 without; `starts`: of each page's first token.
    """

    steps: torch.Tensor
    starts: torch.Tensor


def waves(turn: KeyTurn, *, page_tokens: int, first: int, num_pages: int) -> Waves:
    """The waves of a sequence whose coded tokens begin with token `first`, of `num_pages` pages or more."""
    num_pages = max(_FEWEST_PAGES, 1 << (num_pages - 1).bit_length())

    def make() -> Waves:
        steps = _waves(turn.inverse_frequencies, torch.arange(NUM_LANES + 1))
        steps[:NUM_LANES] *= turn.scale
        return Waves(steps, _waves(turn.inverse_frequencies, first + page_tokens * torch.arange(num_pages)))

    return _once(turn.inverse_frequencies, (turn.scale, page_tokens, first, num_pages), make)


def _waves(inverse_frequencies: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    half = len(inverse_frequencies)
    angles = tokens.double().unsqueeze(1) * inverse_frequencies.double()
    made = torch.zeros(len(tokens), 2, -(-half // NUM_LANES) * NUM_LANES)
    made[:, 0, :half], made[:, 1, :half] = angles.cos(), angles.sin()
    return made.flatten(1)
