"""Prompt tokens that wait, exact, until the prompt is through and a method packs them."""

from collections.abc import Iterator

import torch

from kvlens.engine.segments import Tile


class WaitingPrompt:
    """Exact tiles of every layer and sequence, in the order in which they came."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self._tiles: list[list[list[Tile]]] = [[[] for _ in range(num_rows)] for _ in range(num_layers)]

    def add(self, layer: int, row: int, tile: Tile) -> None:
        self._tiles[layer][row].append(tile)

    def add_batch(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The same tokens of every sequence. Shapes: `[B, HK, T, D]`."""
        for row, tiles in enumerate(self._tiles[layer]):
            tiles.append(Tile(keys[row], values[row]))

    def of(self, layer: int, row: int) -> list[Tile]:
        return self._tiles[layer][row]

    def waits(self, layer: int | None = None) -> bool:
        """Whether anything waits, in `layer` or anywhere."""
        layers = self._tiles if layer is None else [self._tiles[layer]]
        return any(any(rows) for rows in layers)

    def lengths(self, layer: int) -> list[int]:
        """Waiting tokens of each sequence."""
        return [sum(tile.keys.shape[1] for tile in tiles) for tiles in self._tiles[layer]]

    def take(self, layer: int, row: int) -> Tile:
        """All that waits of a sequence as one tile; nothing of it waits any longer. Shapes: `[HK, T, D]`."""
        tiles, self._tiles[layer][row] = self._tiles[layer][row], []
        return Tile(torch.cat([tile.keys for tile in tiles], dim=1), torch.cat([tile.values for tile in tiles], dim=1))

    def tensors(self) -> Iterator[torch.Tensor]:
        for tile in (tile for rows in self._tiles for tiles in rows for tile in tiles):
            yield from (tile.keys, tile.values)
