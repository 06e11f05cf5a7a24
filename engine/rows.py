"""Sequences that join and leave a cache between steps.

An opened cache has its memory allocated once: rows for a number of sequences, and room for the tokens that they
share. A step takes the first `num_rows` rows, as many as the smallest bucket that holds every sequence, so that few
shapes are ever prepared. Rows without a sequence, idle ones, take part and are put back to length 0.

What a row is made of is the method's, which implements the five methods below that are abstract.
"""

from abc import ABC, abstractmethod
from typing import Self

from kvlens.engine.errors import EngineError, OutOfMemory

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows that a step may have; above, multiples of the last."""


def bucket(num_rows: int) -> int:
    """The least number of rows a step may have that is not below `num_rows`."""
    fitting = (size for size in BUCKETS if size >= num_rows)
    return next(fitting, -(-num_rows // BUCKETS[-1]) * BUCKETS[-1])


class OpenRows(ABC):
    """Rows of a cache as places for sequences. `lengths[layer][row]` is the cache's own."""

    num_rows: int
    lengths: list[list[int]]

    def __init__(self, num_rows: int) -> None:
        self.num_rows = self._max_rows = num_rows
        self._promised: dict[int, int] | None = None

    @abstractmethod
    def _rows_that_fit(self, max_tokens: int, limit_bytes: int) -> int:
        """How many rows fit into `limit_bytes` if one of them may grow to `max_tokens`; not more than there are."""

    @abstractmethod
    def _open(self, max_tokens: int, limit_bytes: int | None) -> None:
        """Allocate `max_rows` rows for sequences of up to `max_tokens`. Raises: OutOfMemory."""

    @abstractmethod
    def _has_room(self, promised: list[int]) -> bool:
        """Whether sequences may grow to these numbers of tokens, all at once."""

    @abstractmethod
    def _take_row(self, row: int, other: Self) -> None:
        """Copy the only sequence of `other` into an empty row."""

    @abstractmethod
    def _clear_row(self, row: int) -> None:
        """Give back what a row holds, in every layer; on the device its lengths are then 0."""

    def open(self, *, max_tokens: int, limit_bytes: int | None = None) -> None:
        """Start without sequences. They may then join, each of up to `max_tokens`, within `limit_bytes` in all.

        Raises: EngineError if the cache is in use; OutOfMemory if not even one sequence fits.
        """
        if any(self.lengths[0]):
            raise EngineError("only an empty cache can be opened for sequences that join and leave; free() it first")
        if limit_bytes is not None:
            self._max_rows = self._rows_that_fit(max_tokens, limit_bytes)
        if not self._max_rows:
            raise OutOfMemory(
                f"{limit_bytes / 2**20:,.0f} MiB do not hold one sequence of {max_tokens:,} tokens. "
                "Raise the budget, shorten the sequences or compress more."
            )
        self._open(max_tokens, limit_bytes)
        self._promised = {}
        self._fit_rows()

    @property
    def max_rows(self) -> int:
        """How many sequences there is room for, as far as rows go."""
        return self._max_rows

    @property
    def rows(self) -> list[int]:
        """Rows that hold a sequence."""
        return list(range(self.num_rows)) if self._promised is None else sorted(self._promised)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a sequence that grows to `num_tokens` may join now."""
        return len(self._promised) < self._max_rows and self._has_room([*self._promised.values(), num_tokens])

    def join(self, other: Self, *, num_tokens: int) -> int:
        """Take the only sequence of `other`, which may grow to `num_tokens`; gives its row.

        `other` has the same method and settings, and is as before. Raises: OutOfMemory while there is no room.
        """
        if not self.has_room(num_tokens):
            raise OutOfMemory(
                f"There is no room for another sequence of {num_tokens:,} tokens beside the {len(self._promised)} "
                "that are here. Wait until one ends, ask for fewer tokens or compress more."
            )
        row = next(row for row in range(self._max_rows) if row not in self._promised)
        self._promised[row] = num_tokens
        self._fit_rows()
        self._take_row(row, other)
        for lengths, (length,) in zip(self.lengths, other.lengths, strict=True):
            lengths[row] = length
        return row

    def leave(self, row: int) -> None:
        """Forget a sequence; its memory is free for the next one."""
        del self._promised[row]
        self._empty(row)
        self._fit_rows()

    def rest_idle_rows(self) -> None:
        """Put rows without a sequence, which a step has moved on, back to length 0."""
        if self._promised is not None:
            for row in range(self.num_rows):
                if row not in self._promised and any(lengths[row] for lengths in self.lengths):
                    self._empty(row)

    def close(self) -> None:
        """Forget that the cache was open; it is empty and has as many rows as there was room for."""
        self._promised = None
        self.num_rows = self._max_rows

    def _empty(self, row: int) -> None:
        for lengths in self.lengths:
            lengths[row] = 0
        self._clear_row(row)

    def _fit_rows(self) -> None:
        """As few rows as hold every sequence. Those beyond hold nothing."""
        self.num_rows = min(self._max_rows, bucket(max(self._promised, default=0) + 1))
        for lengths in self.lengths:
            del lengths[self.num_rows :]
            lengths.extend([0] * (self.num_rows - len(lengths)))
