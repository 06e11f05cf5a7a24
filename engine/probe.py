"""The microscope: errors measured where exact and packed meet, at the flush.

A method hands over each block of exact tokens as it packs it (`stage`). Later, outside the clock of the
step, `measure` compares the block with what the cache now rebuilds, keeps small statistics, and drops the
block; only the layer under the microscope keeps its exact tokens. It looks at the first sequence of a batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvlens.engine.footprint import storage_bytes
from kvlens.engine.shape import ModelShape
from kvlens.engine.trace import ErrorSnapshot

if TYPE_CHECKING:
    from kvlens.engine.cache import KVCache


@dataclass(frozen=True)
class _Block:
    """Neighbouring exact tokens of a layer, before they were packed. Shapes: exact `[HK, t, D]`."""

    layer: int
    side: int
    first_token: int
    exact: torch.Tensor

    @property
    def stop(self) -> int:
        return self.first_token + self.exact.shape[1]


class ErrorProbe:
    """Relative errors by token, and sums of squares by channel, for keys (side 0) and values (side 1).

    Shapes: by token fp16 `[2, L, HK, capacity]`, NaN where a token is still exact; by channel fp32
    `[2, 2, L, HK, D]` (squared error or squared norm, side, ...); peak fp32 `[2, L, HK, D]`, the largest
    magnitude in each channel; exact tokens of the layer under the microscope as
    `(side, first token, [HK, t, D])`.
    """

    def __init__(self, shape: ModelShape, layer: int, *, device: torch.device) -> None:
        self.layer = layer
        heads = (shape.num_layers, shape.num_kv_heads)
        self._by_token = torch.empty(2, *heads, 0, dtype=torch.float16, device=device)
        self._by_channel = torch.zeros(2, 2, *heads, shape.head_dim, device=device)
        self._peak = torch.zeros(2, *heads, shape.head_dim, device=device)
        self._exact: list[_Block] = []
        self._staged: list[_Block] = []
        self._check(layer)

    @property
    def nbytes(self) -> int:
        blocks = [block.exact for block in (*self._exact, *self._staged)]
        return storage_bytes([self._by_token, self._by_channel, self._peak, *blocks])

    def look_at(self, layer: int) -> None:
        """Turn the microscope to another layer; exact copies are kept from here on."""
        if layer != self.layer:
            self._check(layer)
            self.layer, self._exact = layer, []

    def _check(self, layer: int) -> None:
        num_layers = self._peak.shape[1]
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer must lie between 0 and {num_layers - 1}; got {layer}")

    def stage(self, layer: int, side: int, first_token: int, exact: torch.Tensor) -> None:
        """Remember a block that was just packed. Shapes: exact `[HK, t, D]`."""
        self._staged.append(_Block(layer, side, first_token, exact.clone()))

    def measure(self, cache: "KVCache") -> None:
        """Compare what was staged with what `cache` rebuilds, and add it to the statistics."""
        staged, self._staged = self._staged, []
        for block in _joined(staged):
            tile = cache.rebuild(block.layer, 0, block.first_token, block.stop)
            rebuilt = (tile.keys, tile.values)[block.side].float()
            self._add(block, block.exact.float(), rebuilt)
            if block.layer == self.layer:
                self._exact.append(block)

    def _add(self, block: "_Block", exact: torch.Tensor, rebuilt: torch.Tensor) -> None:
        capacity = self._by_token.shape[-1]
        if block.stop > capacity:
            room = max(block.stop, 2 * capacity) - capacity
            self._by_token = torch.nn.functional.pad(self._by_token, (0, room), value=torch.nan)
        error, norm = (exact - rebuilt).square(), exact.square()
        at = (block.side, block.layer)
        by_token = _relative(error.sum(dim=-1), norm.sum(dim=-1))
        self._by_token[at][:, block.first_token : block.stop] = by_token.half()
        self._by_channel[(0, *at)] += error.sum(dim=1)
        self._by_channel[(1, *at)] += norm.sum(dim=1)
        torch.maximum(self._peak[at], exact.abs().amax(dim=1), out=self._peak[at])

    def snapshot(self, cache: "KVCache") -> ErrorSnapshot:
        """All statistics so far, for the screen."""
        self.measure(cache)
        num_tokens = cache.lengths[0][0]
        exact_tail = max(0, num_tokens - self._by_token.shape[-1])
        by_token = torch.nn.functional.pad(self._by_token, (0, exact_tail), value=torch.nan)[..., :num_tokens]
        error, norm = self._by_channel
        exact, rebuilt = self._microscope(cache, num_tokens)
        return ErrorSnapshot(
            by_token=by_token.float().cpu().numpy(),
            by_head=_relative(error.sum(dim=-1), norm.sum(dim=-1)).cpu().numpy(),
            by_channel=_relative(error, norm).cpu().numpy(),
            peak_channel=self._peak.cpu().numpy().copy(),
            probed_layer=self.layer,
            exact=exact,
            rebuilt=rebuilt,
        )

    def _microscope(self, cache: "KVCache", num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact and rebuilt tokens of the layer under the microscope. Shapes: fp32 `[2, HK, T, D]` each."""
        tile = cache.rebuild(self.layer, 0, 0, num_tokens)
        rebuilt = torch.stack([tile.keys.float(), tile.values.float()])
        exact = rebuilt.clone()
        # What was packed before the microscope was turned to this layer is not known exactly any more.
        known = self._by_token.shape[-1]
        is_packed = ~self._by_token[:, self.layer].isnan()[..., :num_tokens]
        exact[:, :, :known][is_packed] = torch.nan
        for block in self._exact:
            exact[block.side, :, block.first_token : block.stop] = block.exact.float()
        return exact.cpu().numpy(), rebuilt.cpu().numpy()

    def save(self, cache: "KVCache") -> Any:
        """What `restore` needs to return to this moment: nothing of what was staged, which is measured now."""
        self.measure(cache)
        by_token = self._by_token[..., : cache.lengths[0][0]].clone()
        return by_token, self._by_channel.clone(), self._peak.clone(), list(self._exact)

    def restore(self, saved: Any) -> None:
        """Forget what was measured after `save`."""
        by_token, by_channel, peak, exact = saved
        self._by_token, self._by_channel, self._peak = by_token.clone(), by_channel.clone(), peak.clone()
        # The microscope may have been turned to another layer since.
        self._exact, self._staged = [block for block in exact if block.layer == self.layer], []


def _joined(blocks: list[_Block]) -> list[_Block]:
    """Neighbouring blocks of one layer and side as one block: values come token by token."""
    runs: list[list[_Block]] = []
    for block in sorted(blocks, key=lambda block: (block.layer, block.side, block.first_token)):
        last = runs[-1][-1] if runs else None
        if last and (last.layer, last.side, last.stop) == (block.layer, block.side, block.first_token):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [
        _Block(run[0].layer, run[0].side, run[0].first_token, torch.cat([part.exact for part in run], dim=1))
        for run in runs
    ]


def _relative(error: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """The root of squared error over squared norm; NaN where there is no norm, as nothing was packed."""
    return torch.where(norm > 0, (error / norm).sqrt(), torch.nan)
