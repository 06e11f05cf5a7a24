"""Cosines and sines of a turn, and how what is derived from a cache's constants is kept.

Limits: a dictionary, means or frequencies that are changed in place later on are not read again.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from kvlens.kernels.sparse_attend import KeyTurn

_FEWEST_PLACES = 64

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
Made = TypeVar("Made")


def once(tensor: torch.Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` gave for this tensor and key, or what it gives now; kept for as long as the tensor is."""
    of_tensor = _made.get(tensor)
    if of_tensor is None:
        of_tensor = _made.setdefault(tensor, {})
    if key not in of_tensor:
        with torch.inference_mode(False):
            of_tensor[key] = make()
    return of_tensor[key]


def steps(turn: KeyTurn, count: int, *, lanes: int = 1) -> torch.Tensor:
    """Waves of the tokens 0 .. count - 1 with the turn's scale, then of token `count` without it.

    Shapes: fp32 `[count + 1, 2, W/2]`, cosines and sines, each filled up with zeros to whole `lanes`.
    """

    def make() -> torch.Tensor:
        made = _waves(turn, torch.arange(count + 1), lanes)
        made[:count] *= turn.scale
        return made

    return once(turn.inverse_frequencies, ("steps", turn.scale, count, lanes), make)


def starts(turn: KeyTurn, *, first: int, stride: int, count: int, lanes: int = 1) -> torch.Tensor:
    """Waves of the tokens first, first + stride, .. without scale, `count` of them or more. Shapes: as `steps`."""
    count = max(_FEWEST_PLACES, 1 << (count - 1).bit_length())
    places = first + stride * torch.arange(count)
    return once(turn.inverse_frequencies, ("starts", first, stride, count, lanes), lambda: _waves(turn, places, lanes))


def _waves(turn: KeyTurn, places: torch.Tensor, lanes: int) -> torch.Tensor:
    frequencies = turn.inverse_frequencies
    half = len(frequencies)
    angles = places.to(frequencies.device, torch.float64).unsqueeze(1) * frequencies.double()
    made = torch.zeros(len(places), 2, -(-half // lanes) * lanes, device=frequencies.device)
    made[:, 0, :half], made[:, 1, :half] = angles.cos(), angles.sin()
    return made
