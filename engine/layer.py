"""What transformers sees of a cache, and of one layer: a handle that passes fresh keys and values on."""

from typing import TYPE_CHECKING
from weakref import ref

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvlens.engine.errors import EngineError

if TYPE_CHECKING:
    from kvlens.engine.cache import KVCache


class LayerHandle(CacheLayerMixin):
    """A layer of a `KVCache`. `update` returns the handle itself in place of keys and of values.

    A Hugging Face attention block hands what `update` returns straight to its attention function, which
    here is ours (`bridge.py`): it sees the handle and calls `attend`. No dense cache ever exists.
    """

    def __init__(self, cache: "KVCache", layer: int) -> None:
        super().__init__()
        # The cache owns its handles: a reference back would keep its tensors until a full collection of garbage.
        self._cache = ref(cache)
        self.layer = layer
        self._fresh: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple["LayerHandle", "LayerHandle"]:
        self._fresh = (key_states, value_states)
        return self, self

    def attend(self, query: torch.Tensor, *, scaling: float, mask: torch.Tensor | None) -> torch.Tensor:
        """See `KVCache.attend`, with the keys and values of the last `update`."""
        keys, values = self._fresh
        self._fresh = None
        return self._cache().attend(self.layer, query, keys, values, scaling=scaling, mask=mask)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache knows its shape from the start."""

    def get_seq_length(self) -> int:
        return self._cache().seen_tokens(self.layer)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
    """The name that transformers 5.17 uses."""


class TransformersCache(Cache):
    """What `generate` may ask of a cache beside its layers, and what a packed cache cannot do."""

    def reset(self) -> None:
        self.free()

    def crop(self, tokens_to_remove: int) -> None:
        raise EngineError(
            "a packed cache cannot be cropped token by token (assisted decoding needs that); "
            "take a checkpoint() and go back to it with rollback()"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise EngineError("beam search is not served: a KVLens cache does not reorder its sequences")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise EngineError("several returned sequences are not served; repeat the prompt in the batch instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise EngineError("a KVLens cache does not drop sequences from its batch")
