"""What a cache occupies and what one head of it looks like: plain data."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

PARTS = (
    "codes",
    "scales",
    "indices",
    "coefficients",
    "window",
    "sinks",
    "tables",
    "dictionary",
    "scratch",
)
"""What a cache is made of, in the order in which figures stack it."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a cache.

    `parts` are live: what the stored tokens occupy. `reserved_bytes` is what is allocated for the cache,
    each storage counted once. `checkpoint_bytes` (windows kept for going back) and `probe_bytes` (the
    microscope's exact copies and statistics) are held besides and belong to neither; `shared_bytes`
    (learned dictionaries) are read by every cache of the model and belong to none.
    """

    num_tokens: int
    parts: dict[str, int]
    reserved_bytes: int = 0
    checkpoint_bytes: int = 0
    probe_bytes: int = 0
    shared_bytes: int = 0

    @property
    def live_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class CacheView:
    """One head of one layer of one sequence, for figures.

    Shapes: keys, values fp32 `[T, D]` as attention sees them (rebuilt where packed); key_codes uint8
    `[num_packed_keys, D]` and value_codes `[num_packed_values, D]`, or None where a method has none. The
    packed tokens follow the `num_sinks` exact first ones.
    """

    keys: np.ndarray
    values: np.ndarray
    num_sinks: int = 0
    num_packed_keys: int = 0
    num_packed_values: int = 0
    key_codes: np.ndarray | None = None
    value_codes: np.ndarray | None = None


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once: a view that pins a tensor shows."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def tensors_in(saved: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(saved, torch.Tensor):
        yield saved
    elif isinstance(saved, (tuple, list)):
        for entry in saved:
            yield from tensors_in(entry)
