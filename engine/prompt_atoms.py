"""Atoms of a conversation's own prompt, beside the learned ones: one small dictionary a layer and sequence.

It keeps them and counts them; which vectors become atoms is `dictionaries.online`.
"""

from collections.abc import Iterator

import torch

from kvlens.engine.dictionaries.online import extra_atoms
from kvlens.engine.storage import Allocate


class PromptAtoms:
    """Room for `num_sampled` and `num_guarded` atoms of one side, for every layer and sequence.

    Shapes: tensor fp16 `[L, B, count, W]`; atoms that the prompt did not fill are zero and are never chosen.
    The learned atoms with those behind them are kept joined, in fp32, for as long as they hold.
    """

    def __init__(
        self, num_layers: int, num_rows: int, width: int, *, num_sampled: int, num_guarded: int, allocate: Allocate
    ) -> None:
        self._num_sampled, self._num_guarded, self._allocate = num_sampled, num_guarded, allocate
        self._tensor = allocate(num_layers, num_rows, num_sampled + num_guarded, width, dtype=torch.float16).zero_()
        self._joined: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def row_bytes(self) -> int:
        """Bytes of one layer of one sequence."""
        return self._tensor[0, 0].nbytes

    def fill(self, layer: int, row: int, vectors: torch.Tensor, learned: torch.Tensor, *, sparsity: int) -> None:
        """Take the atoms of a prompt. Shapes: vectors `[HK, T, parts, W]`, learned fp32 `[N, W]`."""
        atoms = extra_atoms(
            vectors.movedim(-2, 0),
            learned,
            num_sampled=self._num_sampled,
            num_guarded=self._num_guarded,
            sparsity=sparsity,
        )
        own = self._tensor[layer, row].zero_()
        own[: len(atoms)] = atoms
        if (layer, row) in self._joined:
            self._joined[layer, row][len(learned) :] = own

    def after(self, learned: torch.Tensor, layer: int, row: int) -> torch.Tensor:
        """The learned atoms with those of a sequence behind them. Shapes: fp32 `[N + count, W]`."""
        if (layer, row) not in self._joined:
            own = self._tensor[layer, row]
            joined = self._allocate(len(learned) + len(own), learned.shape[1], dtype=torch.float32)
            self._joined[layer, row] = torch.cat([learned, own.float()], out=joined)
        return self._joined[layer, row]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self._tensor, *self._joined.values())
