"""Sparse codes of keys or values in pages: kept, and read back. What codes stand for is `sparse_coder`'s."""

from collections.abc import Sequence

import torch

from kvlens.engine.sparse_coder import SparseRecipe
from kvlens.engine.storage import PagePool
from kvlens.kernels.pursuit import PackedAtoms, SparseCodes, pack_atoms, unpack_atoms


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
