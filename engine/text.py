"""Turns a stream of tokens into a stream of text without cutting characters in half."""

from collections.abc import Callable, Sequence


class TextStream:
    """Text of an answer as it grows. A token that ends in the middle of a character gives "" until it is whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that `token` adds."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._shown])
        after = self._decode(self._tokens[self._start :])
        if after.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]
