"""Turns keys by the model's own rotary position embedding, and back.

Attention sees keys turned by their positions; a key before that turn is what its token says wherever it
stands. A frozen copy of the model's rotary module gives the angles and the model's own function applies them, so every
layout of pairs (halves, neighbours, a part of the channels) is that model's. The module knows no caches.
"""

import copy
import sys
from functools import cached_property
from math import prod

import torch

from kvlens.engine.errors import ModelError
from kvlens.kernels.sparse_attend import KeyTurn


class Rotary:
    """The position embedding of one model. Made by `Rotary.of(network)`.

    Limits: angles stay those of the moment it was made; embeddings that change them with the length
    (dynamic NTK, LongRoPE beyond the first range) are turned back by the first range's angles, which is
    still an exact pair of `rotate` and `unrotate`.
    """

    def __init__(self, embedding: torch.nn.Module | None, apply) -> None:
        self._embedding = embedding
        self._apply = apply
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def of(cls, network: torch.nn.Module) -> "Rotary":
        """The embedding of `network`; keys pass unchanged if it has none. Raises: ModelError if ours cannot undo it."""
        found = [module for module in network.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        if not found:
            return cls(None, None)
        embedding = copy.deepcopy(found[0])
        # Otherwise a call with other positions than the model's last would change the angles.
        embedding.rope_type = "default"
        apply = getattr(sys.modules[type(found[0]).__module__], "apply_rotary_pos_emb", None)
        rotary = cls(embedding, apply)
        rotary._check()
        return rotary

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys as attention sees them. Shapes: keys `[..., T, D]`, positions `[T]`; in fp32, given in keys' dtype."""
        if self._embedding is None:
            return keys
        cosines, sines = self._waves(keys, positions)
        return self._turn(keys, cosines, sines)

    def unrotate(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys as before the position embedding. Shapes: as `rotate`."""
        if self._embedding is None:
            return keys
        cosines, sines = self._waves(keys, positions)
        # Some embeddings scale as they turn (YaRN's attention factor); the way back divides by its square.
        squares = cosines.square() + sines.square()
        return self._turn(keys, cosines / squares, -sines / squares)

    @cached_property
    def turn(self) -> KeyTurn | None:
        """The same in numbers, for kernels that turn keys themselves; None where it pairs channels differently."""
        if self._embedding is None:
            return KeyTurn(torch.zeros(1))
        frequencies = getattr(self._embedding, "inv_freq", None)
        if frequencies is None:
            return None
        frequencies, scale = frequencies.float(), float(getattr(self._embedding, "attention_scaling", 1.0))
        places = torch.tensor([0, 1, 7, 100], device=frequencies.device)
        keys = torch.randn(1, len(places), 2 * len(frequencies), device=frequencies.device)
        angles = places.unsqueeze(1) * frequencies
        low, high = keys.chunk(2, dim=-1)
        halves = low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()
        is_alike = torch.allclose(self.rotate(keys, places), scale * torch.cat(halves, dim=-1), atol=1e-3)
        return KeyTurn(frequencies, scale) if is_alike else None

    def _waves(self, keys: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each fp32 `[1, T, W]` with W turned channels."""
        positions = positions.to(keys.device)
        # Every layer of a prompt asks for the same positions.
        if self._last is None or self._last[0].device != keys.device or not torch.equal(self._last[0], positions):
            like = torch.empty(0, dtype=torch.float32, device=keys.device)
            self._last = positions, self._embedding(like, positions.reshape(1, -1))
        return self._last[1]

    def _turn(self, keys: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        flat = keys.float().reshape(1, prod(keys.shape[:-2]), *keys.shape[-2:])
        width = cosines.shape[-1]
        _, turned = self._apply(flat[:, :0, :, :width], flat[..., :width], cosines, sines)
        return torch.cat([turned, flat[..., width:]], dim=-1).reshape(keys.shape).to(keys.dtype)

    def _check(self) -> None:
        """Raises: ModelError if a turned key does not come back."""
        try:
            positions = torch.tensor([0, 1, 7])
            width = self._waves(torch.empty(0), positions)[0].shape[-1]
            keys = torch.linspace(-1, 1, 3 * width).reshape(1, 3, width)
            back = self.unrotate(self.rotate(keys, positions), positions)
        except (TypeError, ValueError, RuntimeError) as error:
            back = error
        if not (isinstance(back, torch.Tensor) and torch.allclose(keys, back, atol=1e-4)):
            name = type(self._embedding).__name__
            raise ModelError(
                f"The position embedding {name} of this model cannot be undone, so its keys cannot be coded before "
                "RoPE. Choose a method or a preset that codes them after it."
            )
