"""Keys or values of a layer as sparse codes, in pages: encoded, kept, read back.

It knows pages and codes. Which tokens are coded when, and what attends to them, is the method's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvlens.engine.storage import PagePool
from kvlens.kernels.pursuit import PackedAtoms, SparseCodes, pack_atoms, pursue, restore, unpack_atoms

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

    def encode(self, vectors: torch.Tensor, dictionary: torch.Tensor, gram: torch.Tensor | None) -> SparseCodes:
        """The codes of `vectors`. Shapes: vectors `[HK, t, D]`, dictionary `[N, D / parts]`; codes `[HK, t, slots]`."""
        cut = vectors.unflatten(-1, (self.parts, -1))
        codes = pursue(cut, dictionary, sparsity=self.atoms, gram=gram, **PURSUITS[self.pursuit])
        return SparseCodes(codes.indices.flatten(-2), codes.coefficients.flatten(-2))

    def restore(self, codes: SparseCodes, dictionary: torch.Tensor) -> torch.Tensor:
        """The vectors that codes stand for, in fp32. Shapes: codes `[..., slots]` → `[..., D]`."""
        cut = SparseCodes(
            codes.indices.unflatten(-1, (self.parts, self.atoms)),
            codes.coefficients.unflatten(-1, (self.parts, self.atoms)),
        )
        return restore(cut, dictionary).flatten(-2)


class SparsePages:
    """One side's share of the pages of a pool: planar, as `sparse_attend` reads them.

    Shapes of a page: words int16 `[HK, slots, P]`; coefficients fp16 of the same shape, or the scales, `[HK, P]`.
    """

    def __init__(self, side: str, recipe: SparseRecipe, *, num_heads: int, page_tokens: int) -> None:
        self.recipe = recipe
        self._words, self._coefficients = f"{side}_words", f"{side}_coefficients"
        self._page_tokens = page_tokens
        word_shape = (num_heads, recipe.slots, page_tokens)
        self.layout = {
            self._words: (word_shape, torch.int16),
            self._coefficients: ((num_heads, page_tokens) if recipe.is_packed else word_shape, torch.float16),
        }

    def words(self, pool: PagePool) -> torch.Tensor:
        return pool.tensors[self._words]

    def coefficients(self, pool: PagePool) -> torch.Tensor:
        return pool.tensors[self._coefficients]

    def write(self, pool: PagePool, pages: Sequence[int], first: int, codes: SparseCodes) -> None:
        """Keep codes as the tokens first.. of a sequence whose pages are `pages`. Shapes: codes `[HK, t, slots]`."""
        if self.recipe.is_packed:
            packed = pack_atoms(codes)
            words, coefficients = packed.words.transpose(1, 2), packed.scale
        else:
            words, coefficients = codes.indices.transpose(1, 2), codes.coefficients.half().transpose(1, 2)
        for store, fresh in ((self.words(pool), words), (self.coefficients(pool), coefficients)):
            self._spread(store, pages, first, fresh)

    def _spread(self, store: torch.Tensor, pages: Sequence[int], first: int, fresh: torch.Tensor) -> None:
        """Tokens along the last axis of `fresh` into pages: whole ones at once, the ends by themselves."""
        size, count = self._page_tokens, fresh.shape[-1]
        page, slot = divmod(first, size)
        head = min(count, -first % size)
        if head:
            store[pages[page], ..., slot : slot + head] = fresh[..., :head]
            page += 1
        whole = (count - head) // size
        if whole:
            full = fresh[..., head : head + whole * size].unflatten(-1, (whole, size)).movedim(-2, 0)
            store[list(pages[page : page + whole])] = full
        done = head + whole * size
        if done < count:
            store[pages[page + whole], ..., : count - done] = fresh[..., done:]

    def read(self, pool: PagePool, pages: Sequence[int], first: int, stop: int) -> SparseCodes:
        """Codes of the tokens first..stop-1. Shapes: `[HK, stop - first, slots]`."""
        skipped = first // self._page_tokens
        chosen = list(pages[skipped : -(-stop // self._page_tokens)]) if stop > first else []
        at = slice(first - skipped * self._page_tokens, stop - skipped * self._page_tokens)
        words = _in_order(self.words(pool)[chosen])[..., at].transpose(1, 2)
        coefficients = _in_order(self.coefficients(pool)[chosen])[..., at]
        if self.recipe.is_packed:
            return unpack_atoms(PackedAtoms(words, coefficients))
        return SparseCodes(words, coefficients.transpose(1, 2).float())


def _in_order(pages: torch.Tensor) -> torch.Tensor:
    """Pages `[n, HK, ..., P]` as one row of tokens `[HK, ..., n * P]`."""
    return pages.movedim(0, -2).flatten(-2)
