"""One side of a comparison: a cache that lives through a conversation, and the answer it is giving.

A lane keeps its cache between turns. The longest common prefix of old and new tokens is reused, also
where a chat template rewrites history: the lane goes back to the last checkpoint before the difference.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass

import torch

from kvlens.engine import atoms
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.cache import Checkpoint, KVCache
from kvlens.engine.config import MethodConfig
from kvlens.engine.generate import forward, prefill
from kvlens.engine.model import LoadedModel
from kvlens.engine.registry import method
from kvlens.engine.sampling import Sampling, choose
from kvlens.engine.text import TextStream
from kvlens.engine.trace import LaneLog, MemorySample, StepTrace

MAX_ANCHORS = 8
"""Moments to go back to that a lane remembers; the oldest goes first."""

NUM_ALTERNATIVES = 5


@dataclass(frozen=True)
class LaneSpec:
    """What a lane runs: a method by name with its settings."""

    lane_id: str
    method: str
    config: MethodConfig


@dataclass(frozen=True)
class _Anchor:
    """A checkpoint after `num_tokens` tokens, with the logits that followed if they are known."""

    num_tokens: int
    checkpoint: Checkpoint
    logits: torch.Tensor | None


class Lane:
    """A cache with the tokens that are in it. `log` is the record of the run that is going on."""

    def __init__(self, model: LoadedModel, spec: LaneSpec, *, probed_layer: int, budget: MemoryBudget | None) -> None:
        self.spec = spec
        self.log = LaneLog(spec.lane_id, spec.method, "")
        self._model = model
        self._cache = model.new_cache(spec.method, spec.config, budget=budget)
        self._probe = self._cache.watch(probed_layer)
        self._tokens: list[int] = []
        self._anchors: list[_Anchor] = []
        self._logits: torch.Tensor | None = None
        self._stream = TextStream(model.decode)

    @property
    def cache(self) -> KVCache:
        return self._cache

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a conversation, keeping those that this lane holds already."""
        return self._model.encode_after(self._tokens, text)

    def begin(self, num_prompt_tokens: int) -> None:
        """Open the log of a new run; the other lanes may take the prompt in before this one does."""
        entry, settings = method(self.spec.method), self.spec.config.describe()
        self.log = LaneLog(
            self.spec.lane_id,
            entry.name,
            f"{entry.title} · {settings}" if settings else entry.title,
            is_simulated=entry.is_simulated,
            settings=asdict(self.spec.config),
            prompt_tokens=num_prompt_tokens,
        )

    def start(self, token_ids: Sequence[int], *, max_new_tokens: int, probed_layer: int) -> Iterator[None]:
        """Take the prompt in, chunk by chunk, after `begin`; yields between chunks.

        Closing the iterator early leaves the lane as it was before the prompt.
        """
        self._probe.look_at(probed_layer)
        reused = self._rewind(token_ids)
        self._stream = TextStream(self._model.decode)
        self.log.reused_tokens = reused
        self._cache.reserve(len(token_ids) + max_new_tokens)
        milliseconds = 0.0
        if reused < len(token_ids):
            with closing(prefill(self._model, self._cache, token_ids[reused:])) as passes:
                for result in passes:
                    milliseconds += result.milliseconds
                    yield
            self._tokens, self._logits = list(token_ids), result.logits
            self._anchor()
        # A part of the time beside the whole prompt would read as a speed that never was.
        self.log.prefill_ms = milliseconds
        self._sample_memory()

    def advance(self, sampling: Sampling) -> None:
        """Choose the next token and, unless it ends the answer, run the model on the one before it."""
        log, step = self.log, len(self.log.steps)
        milliseconds = log.prefill_ms
        if step:
            result = forward(self._model, self._cache, [log.steps[-1].token_id])
            self._tokens.append(log.steps[-1].token_id)
            self._logits, milliseconds = result.logits, result.milliseconds
        token = choose(self._logits, sampling, step)
        log.steps.append(self._trace(token, milliseconds))
        if step:
            self._sample_memory()
        if token in self._model.end_tokens:
            log.finish = "end"

    def look(self) -> None:
        """Bring errors, atoms and held bytes in the log up to date; not for every token."""
        footprint = self._cache.footprint()
        self.log.reserved_bytes = footprint.reserved_bytes
        self.log.probe_bytes = footprint.probe_bytes
        self.log.shared_bytes = footprint.shared_bytes
        self.log.attention_path = self._cache.attention_path
        if self._cache.lengths[0][0]:
            self.log.errors = self._probe.snapshot(self._cache)
            self.log.atoms = atoms.snapshot(self._cache, self.log.errors)

    def free(self) -> None:
        self._cache.free()
        self._tokens, self._anchors, self._logits = [], [], None

    # ------------------------------------------------------------------ inside

    def _trace(self, token: int, milliseconds: float) -> StepTrace:
        log_probs = self._logits.float().log_softmax(dim=-1)
        best = log_probs.topk(min(NUM_ALTERNATIVES, log_probs.numel()))
        alternatives = tuple(
            (self._model.token_text(other), probability)
            for other, probability in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        )
        text = "" if token in self._model.end_tokens else self._stream.add(token)
        return StepTrace(token, text, milliseconds, log_probs[token].item(), alternatives)

    def _sample_memory(self) -> None:
        self.log.memory.append(MemorySample(self._cache.num_tokens, self._cache.parts()))

    def _anchor(self) -> None:
        self._anchors.append(_Anchor(len(self._tokens), self._cache.checkpoint(), self._logits))
        if len(self._anchors) > MAX_ANCHORS:
            self._cache.forget(self._anchors.pop(0).checkpoint)

    def _rewind(self, token_ids: Sequence[int]) -> int:
        """Go back to the longest stored prefix of `token_ids`; gives how many tokens it has."""
        common = _common_prefix(self._tokens, token_ids)
        if self._tokens and common == len(self._tokens) and common < len(token_ids):
            return common
        while self._anchors and not self._fits(self._anchors[-1], common, len(token_ids)):
            self._cache.forget(self._anchors.pop().checkpoint)
        if not self._anchors:
            probed = self._probe.layer
            self.free()
            self._probe = self._cache.watch(probed)
            return 0
        anchor = self._anchors[-1]
        self._cache.rollback(anchor.checkpoint)
        self._tokens, self._logits = list(token_ids[: anchor.num_tokens]), anchor.logits
        return anchor.num_tokens

    @staticmethod
    def _fits(anchor: _Anchor, common: int, num_tokens: int) -> bool:
        """Whether what follows the anchor can be computed: at the very end its logits must be known."""
        return anchor.num_tokens <= common and (anchor.num_tokens < num_tokens or anchor.logits is not None)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (mine, other) in enumerate(zip(left, right, strict=False)):
        if mine != other:
            return index
    return min(len(left), len(right))
