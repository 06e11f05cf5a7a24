"""Exact keys or values to sparse codes and back: turned before RoPE or not, means apart or not, atoms chosen.

It knows one side of a model's dictionaries. Where codes are kept is `sparse_pages`; when tokens are coded, and what
attends to them, is the method's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvlens.engine.prompt_atoms import PromptAtoms
from kvlens.engine.rotary import Rotary
from kvlens.kernels.pursuit import SparseCodes, pursue, restore

PURSUITS = {
    "MP": {},
    "MP + fit": {"refit": True},
    "OMP": {"orthogonal": True},
}
"""The ways to choose atoms, by the name that a person sees, as options of `pursue`."""


@dataclass(frozen=True)
class SparseRecipe:
    """How vectors of one side become codes.

    `atoms` atoms for each of the `parts` equal parts of a vector; `is_packed`: an atom is one 16-bit word and the
    vector has one fp16 scale, else an int16 index with an fp16 coefficient.
    """

    atoms: int
    parts: int
    is_packed: bool
    pursuit: str

    @property
    def slots(self) -> int:
        """Atoms of a whole vector."""
        return self.atoms * self.parts

    @property
    def word_bytes(self) -> int:
        """Bytes of a vector's indices, or of its packed atoms."""
        return 2 * self.slots

    @property
    def coefficient_bytes(self) -> int:
        """Bytes of a vector's coefficients, or of its one scale."""
        return 2 if self.is_packed else 2 * self.slots


@dataclass
class SparseCoder:
    """One side, of all layers: its learned atoms and, where there are some, means and atoms of the prompt.

    Shapes: learned[layer] fp32 `[N, W]`, means[layer] fp32 `[HK, D]`. Means of keys are those before RoPE.
    `unturned`: the embedding that is taken off before coding; `turned_means`: the one that turns the means of
    keys that are coded after it.
    """

    recipe: SparseRecipe
    learned: Sequence[torch.Tensor]
    means: Sequence[torch.Tensor] | None = None
    unturned: Rotary | None = None
    turned_means: Rotary | None = None
    prompt: PromptAtoms | None = None

    def encode(self, layer: int, row: int, tokens: torch.Tensor, first: int) -> SparseCodes:
        """Codes of exact tokens, the first of them token `first`. Shapes: `[HK, t, D]` to codes `[HK, t, slots]`."""
        codes = pursue(
            self._parts(self.coded(layer, tokens, first)),
            self.atoms(layer, row),
            sparsity=self.recipe.atoms,
            **PURSUITS[self.recipe.pursuit],
        )
        return SparseCodes(codes.indices.flatten(-2), codes.coefficients.flatten(-2))

    def restore(self, layer: int, row: int, codes: SparseCodes, first: int) -> torch.Tensor:
        """What attention sees of codes, the first of them of token `first`. Shapes: fp32 `[HK, t, D]`."""
        cut = (self.recipe.parts, self.recipe.atoms)
        parts = SparseCodes(codes.indices.unflatten(-1, cut), codes.coefficients.unflatten(-1, cut))
        tokens = restore(parts, self.atoms(layer, row)).flatten(-2)
        if self.means is not None:
            tokens = tokens + self._mean(layer, tokens, first)
        return tokens if self.unturned is None else self.unturned.rotate(tokens, _places(tokens, first))

    def learn_prompt(self, layer: int, row: int, tokens: torch.Tensor) -> None:
        """Take atoms from the first tokens of a sequence, if it is to have some. Shapes: `[HK, T, D]`."""
        if self.prompt is not None:
            vectors = self._parts(self.coded(layer, tokens, 0))
            self.prompt.fill(layer, row, vectors, self.learned[layer], sparsity=self.recipe.atoms)

    def atoms(self, layer: int, row: int) -> torch.Tensor:
        """The atoms that a sequence's codes name. Shapes: fp32 `[N, W]`."""
        learned = self.learned[layer]
        return learned if self.prompt is None else self.prompt.after(learned, layer, row)

    def coded(self, layer: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """What of exact tokens the atoms have to say. Shapes: `[HK, t, D]`, in fp32."""
        tokens = tokens.float()
        if self.unturned is not None:
            tokens = self.unturned.unrotate(tokens, _places(tokens, first))
        return tokens if self.means is None else tokens - self._mean(layer, tokens, first)

    def _mean(self, layer: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Each head's mean, turned as the tokens are. Shapes: `[HK, 1 or t, D]`."""
        mean = self.means[layer].unsqueeze(1)
        if self.turned_means is None:
            return mean
        return self.turned_means.rotate(mean.expand(-1, tokens.shape[1], -1), _places(tokens, first))

    def _parts(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors.unflatten(-1, (self.recipe.parts, -1))


def _places(tokens: torch.Tensor, first: int) -> torch.Tensor:
    return torch.arange(first, first + tokens.shape[1], device=tokens.device)
