"""Where caches put things: a pool of equal pages, and rings of exact tokens.

Neither knows what a page means to its method.
"""

from collections.abc import Callable, Iterator

import torch

Allocate = Callable[..., torch.Tensor]
Discard = Callable[[torch.Tensor | None], None]


class PagePool:
    """Pages of one shape, each made of several parts (codes, scales, ...), handed out by number.

    `parts` gives the shape and dtype of one page's share of each part; `tensors[part]` holds all pages:
    `[capacity, *shape]`. The pool grows when it must, by copying, and `reserve` lets an owner that
    knows its size avoid that.
    """

    def __init__(
        self,
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]],
        *,
        allocate: Allocate,
        discard: Discard,
    ) -> None:
        self._parts = parts
        self._allocate = allocate
        self._discard = discard
        self.release()

    @property
    def num_used(self) -> int:
        return self.capacity - len(self._free)

    def reserve(self, capacity: int) -> None:
        """Room for `capacity` pages in all. Raises: OutOfMemory; the pool is then as before."""
        if capacity <= self.capacity:
            return
        grown: dict[str, torch.Tensor] = {}
        try:
            for part, (shape, dtype) in self._parts.items():
                grown[part] = self._allocate(capacity, *shape, dtype=dtype)
        except BaseException:
            for tensor in grown.values():
                self._discard(tensor)
            raise
        for part, tensor in grown.items():
            tensor[: self.capacity] = self.tensors[part]
            self._discard(self.tensors[part])
        self._free = [*range(capacity - 1, self.capacity - 1, -1), *self._free]
        self.tensors, self.capacity = grown, capacity

    @property
    def page_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._parts.values())

    def take(self, num_pages: int) -> list[int]:
        """Numbers of `num_pages` free pages, whose content is undefined. Grows by half if there are too few."""
        if num_pages > len(self._free):
            self.reserve(max(self.num_used + num_pages, self.capacity * 3 // 2))
        return [self._free.pop() for _ in range(num_pages)]

    def give(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))

    def release(self) -> None:
        """Drop all pages, whose bytes the owner gives back."""
        self.capacity = 0
        self._free: list[int] = []
        self.tensors = {part: self._allocate(0, *shape, dtype=dtype) for part, (shape, dtype) in self._parts.items()}


class PageTable:
    """Which pages of a pool hold a sequence: on the host as lists, on the device as one tensor.

    Shapes: tensor int32 `[L, B, M]`, in which entry m of a sequence is its m-th page; entries past its last
    page are undefined.
    """

    def __init__(self, num_layers: int, num_rows: int, pool: PagePool, *, allocate: Allocate, discard: Discard) -> None:
        self.pool = pool
        self._size = (num_layers, num_rows)
        self._allocate = allocate
        self._discard = discard
        self.release()

    def reserve(self, num_pages: int, *, in_all: int | None = None) -> None:
        """Room for `num_pages` pages in every layer of every sequence, `in_all` of them if not all at once.

        Raises: OutOfMemory.
        """
        old = self.tensor
        if num_pages <= old.shape[2]:
            return
        num_layers, num_rows = self._size
        self.pool.reserve(num_layers * num_rows * num_pages if in_all is None else in_all)
        self.tensor = self._allocate(num_layers, num_rows, num_pages, dtype=torch.int32)
        self.tensor[:, :, : old.shape[2]] = old
        self._discard(old)

    def of(self, layer: int, row: int) -> list[int]:
        """Pages of a sequence, in the order of its tokens."""
        return self._pages[layer][row]

    def add(self, layer: int, row: int, count: int) -> list[int]:
        """`count` more pages for a sequence; their numbers."""
        pages, fresh = self._pages[layer][row], self.pool.take(count)
        self.tensor[layer, row, len(pages) : len(pages) + count] = torch.tensor(fresh, dtype=torch.int32)
        pages.extend(fresh)
        return fresh

    def extend(self, row: int, num_pages: int) -> None:
        """Pages for a sequence in every layer until it has `num_pages` in each; written to the device at once."""
        layers = [pages[row] for pages in self._pages]
        held = len(layers[0])
        if num_pages <= held:
            return
        fresh = [self.pool.take(num_pages - held) for _ in layers]
        self.tensor[:, row, held:num_pages] = torch.tensor(fresh, dtype=torch.int32)
        for pages, more in zip(layers, fresh, strict=True):
            pages.extend(more)

    def cut(self, layer: int, row: int, kept: int) -> None:
        """Give back all but the first `kept` pages of a sequence."""
        pages = self._pages[layer][row]
        self.pool.give(pages[kept:])
        del pages[kept:]

    def release(self) -> None:
        """Forget every page, whose bytes the owner gives back."""
        num_layers, num_rows = self._size
        self.pool.release()
        self.tensor = self._allocate(num_layers, num_rows, 0, dtype=torch.int32)
        self._pages: list[list[list[int]]] = [[[] for _ in range(num_rows)] for _ in range(num_layers)]


class Ring:
    """The newest exact tokens of a row of sequences: token t lies at slot `t % capacity`.

    Shapes: tensor `[B, HK, capacity, D]`.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.capacity = tensor.shape[2]

    def read(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Tokens start..stop-1 of a row, in order. Shapes: `[HK, stop - start, D]`; a view where it can."""
        count = stop - start
        if count > self.capacity:
            raise ValueError(f"a ring of {self.capacity} tokens cannot give {count}")
        first = start % self.capacity
        ring = self.tensor[row]
        if first + count <= self.capacity:
            return ring[:, first : first + count]
        return torch.cat([ring[:, first:], ring[:, : first + count - self.capacity]], dim=1)

    def write(self, row: int, start: int, tokens: torch.Tensor) -> None:
        """Tokens start.. of a row; only the newest `capacity` are kept. Shapes: tokens `[HK, T, D]`."""
        surplus = max(0, tokens.shape[1] - self.capacity)
        tokens, start = tokens[:, surplus:], start + surplus
        first = start % self.capacity
        head = min(tokens.shape[1], self.capacity - first)
        ring = self.tensor[row]
        ring[:, first : first + head] = tokens[:, :head]
        if head < tokens.shape[1]:
            ring[:, : tokens.shape[1] - head] = tokens[:, head:]


def exact_since(ring: Ring, row: int, first: int, before: int, fresh: torch.Tensor) -> torch.Tensor:
    """Tokens `first`.. of a row: those in the ring, then the fresh ones, which begin at `before`.

    Shapes: `[HK, T, D]`.
    """
    if before <= first:
        return fresh[:, first - before :]
    return torch.cat([ring.read(row, first, before).to(fresh.dtype), fresh], dim=1)


def around(
    sinks: torch.Tensor, ring: Ring, row: int, packed: torch.Tensor, *, first_exact: int, start: int, stop: int
) -> torch.Tensor:
    """Tokens start..stop-1 of a row in fp32, of which `packed` are those between the sinks and `first_exact`.

    Shapes: sinks `[HK, S, D]`, packed `[HK, t, D]`; `[HK, stop - start, D]`.
    """
    pieces = [sinks[:, start : min(stop, sinks.shape[1])].float(), packed]
    if max(start, first_exact) < stop:
        pieces.append(ring.read(row, max(start, first_exact), stop).float())
    return torch.cat(pieces, dim=1)


class ExactWindow:
    """The exact tokens of one layer: the first `num_sinks` for ever, and rings of the newest.

    Shapes: sink_keys, sink_values `[B, HK, S, D]`; counts int32 `[3, B]` on the device, which the owner keeps for all
    layers: length, num_keys and num_values, tokens in all and how many of them are packed elsewhere.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        key_capacity: int,
        value_capacity: int,
        num_sinks: int,
        counts: torch.Tensor,
        dtype: torch.dtype,
        allocate: Allocate,
    ) -> None:
        def exact(capacity: int) -> torch.Tensor:
            return allocate(batch_size, num_heads, capacity, head_dim, dtype=dtype)

        self.keys, self.values = Ring(exact(key_capacity)), Ring(exact(value_capacity))
        self.sink_keys, self.sink_values = exact(num_sinks), exact(num_sinks)
        self.length, self.num_keys, self.num_values = counts

    def write_sinks(self, row: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep those of the tokens start.. that are sinks. Shapes: keys, values `[HK, T, D]`."""
        stop = min(start + keys.shape[1], self.sink_keys.shape[2])
        if start < stop:
            self.sink_keys[row, :, start:stop] = keys[:, : stop - start]
            self.sink_values[row, :, start:stop] = values[:, : stop - start]

    def take_row(self, row: int, other: "ExactWindow") -> None:
        """Copy the only sequence of `other`, counts apart."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine[row] = theirs[0]

    def set_lengths(self, row: int, length: int, num_keys: int, num_values: int) -> None:
        self.length[row] = length
        self.num_keys[row] = num_keys
        self.num_values[row] = num_values

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.keys.tensor, self.values.tensor, self.sink_keys, self.sink_values)
