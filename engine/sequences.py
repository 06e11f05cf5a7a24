"""Many answers at once: sequences of one model share a cache, join and leave it between steps.

A prompt is taken in by a cache of its own, and its packed form then joins the others; a step is one pass over all
sequences, ragged as they are. How many fit is the method's size against the bytes given, allocated once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import EngineError
from kvlens.engine.generate import forward_batch, prefill
from kvlens.engine.model import LoadedModel
from kvlens.engine.sampling import Sampling, choose


@dataclass
class Answer:
    """A sequence that is here: its place in the batch, and its tokens so far."""

    row: int
    max_new_tokens: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)


class Sequences:
    """A batch that answers come to and go from. `free` gives everything back.

    Raises: OutOfMemory if not one sequence of `max_tokens` fits `limit_bytes`.
    """

    def __init__(
        self,
        model: LoadedModel,
        method_name: str,
        config: MethodConfig,
        *,
        max_sequences: int,
        max_tokens: int,
        limit_bytes: int | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        self._model = model
        self._new_cache = lambda **options: model.new_cache(method_name, config, budget=budget, **options)
        self._cache = self._new_cache(batch_size=max_sequences)
        self._cache.open(max_tokens=max_tokens, limit_bytes=limit_bytes)
        self._max_tokens = max_tokens
        self._answers: dict[int, Answer] = {}
        self._num_joined = 0

    @property
    def answers(self) -> dict[int, Answer]:
        """The sequences that are here, by number."""
        return dict(self._answers)

    @property
    def reserved_bytes(self) -> int:
        return self._cache.footprint().reserved_bytes

    def has_room(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens, prompt and answer, may join now."""
        return num_tokens <= self._max_tokens and self._cache.has_room(num_tokens)

    def join(self, token_ids: Sequence[int], *, max_new_tokens: int, sampling: Sampling | None = None) -> int:
        """Take a prompt in and choose the first token of its answer; gives the sequence's number.

        Raises: EngineError for a sequence longer than allowed; OutOfMemory while there is no room: nothing has changed.
        """
        num_tokens = len(token_ids) + max_new_tokens
        if not token_ids or max_new_tokens < 1 or num_tokens > self._max_tokens:
            raise EngineError(
                f"A sequence needs a prompt, at least one new token, and at most {self._max_tokens:,} tokens in all; "
                f"got {len(token_ids):,} and {max_new_tokens:,}."
            )
        prompt = self._new_cache()
        try:
            *_, result = prefill(self._model, prompt, token_ids)
            row = self._cache.join(prompt, num_tokens=num_tokens)
        finally:
            prompt.free()
        answer = Answer(row, max_new_tokens, sampling or Sampling())
        self._num_joined += 1
        self._answers[self._num_joined] = answer
        self._add_token(answer, result.logits)
        return self._num_joined

    def step(self) -> dict[int, Answer]:
        """One token more for every answer that goes on; those that are through leave and are given."""
        through = {number: answer for number, answer in self._answers.items() if self._is_through(answer)}
        for number in through:
            self.leave(number)
        if self._answers:
            rows = [[0]] * self._cache.num_rows
            for answer in self._answers.values():
                rows[answer.row] = answer.tokens[-1:]
            logits = forward_batch(self._model, self._cache, rows).logits
            for answer in self._answers.values():
                self._add_token(answer, logits[answer.row])
        return through

    def leave(self, number: int) -> None:
        """Forget a sequence, through or not."""
        self._cache.leave(self._answers.pop(number).row)

    def free(self) -> None:
        self._answers = {}
        self._cache.free()

    def _add_token(self, answer: Answer, logits: torch.Tensor) -> None:
        answer.tokens.append(choose(logits, answer.sampling, len(answer.tokens)))

    def _is_through(self, answer: Answer) -> bool:
        return answer.tokens[-1] in self._model.end_tokens or len(answer.tokens) == answer.max_new_tokens
