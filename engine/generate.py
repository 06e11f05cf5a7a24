"""The decode loop: token ids in, a token and its trace out.

Knows a model, a cache and a sampler. Knows no text templates, no lanes and no screen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from kvlens.engine.cache import KVCache
from kvlens.engine.measure import Stopwatch
from kvlens.engine.model import LoadedModel
from kvlens.engine.sampling import Sampling, choose

PREFILL_CHUNK = 512
"""Prompt tokens a forward pass: a stop takes effect between chunks."""


@dataclass(frozen=True)
class Forward:
    """What a forward pass gave. Shapes: logits `[V]` of the newest token. Units: milliseconds of the pass."""

    logits: torch.Tensor
    milliseconds: float
    num_tokens: int


def forward(model: LoadedModel, cache: KVCache, token_ids: Sequence[int]) -> Forward:
    """One pass of one sequence over `token_ids`, timed by itself."""
    result = forward_batch(model, cache, [token_ids])
    return replace(result, logits=result.logits[0])


def forward_batch(model: LoadedModel, cache: KVCache, rows: Sequence[Sequence[int]]) -> Forward:
    """The same for as many tokens of each sequence of a batch; a step takes the short way where there is one.

    Shapes: rows `[B][T]`, logits `[B, V]`. In a step every token has its own sequence's position.
    """
    is_step = len(rows[0]) == 1 and not cache.is_in_prefill
    pass_over = _short_step if is_step and model.short_step is not None else _network_pass
    watch = Stopwatch()
    with torch.inference_mode(), watch.measure(model.device):
        logits = pass_over(model, cache, rows)
    cache.observe()
    return Forward(logits, watch.milliseconds, len(rows) * len(rows[0]))


def _short_step(model: LoadedModel, cache: KVCache, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return model.short_step.run(cache, [token for (token,) in rows])


def _network_pass(model: LoadedModel, cache: KVCache, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """A ragged batch must be told its positions: the network would count columns."""
    ids, options = torch.tensor(rows, device=model.device), {}
    if not cache.is_in_prefill and min(cache.lengths[0]) != max(cache.lengths[0]):
        first = torch.tensor(cache.lengths[0], device=model.device).unsqueeze(1)
        options["position_ids"] = first + torch.arange(ids.shape[1], device=model.device)
    return model.network(ids, past_key_values=cache, logits_to_keep=1, **options).logits[:, -1]


def prefill(model: LoadedModel, cache: KVCache, token_ids: Sequence[int]) -> Iterator[Forward]:
    """A prompt in chunks; packed when the last one is through. The last pass gives the first token.

    The time of the last pass includes packing. Closing the iterator early leaves the cache as before.
    """
    # Each pass enters inference mode by itself: it belongs to a thread, and who asks for the next chunk may be another.
    with cache.prefill():
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            result = forward(model, cache, chunk)
            if start + PREFILL_CHUNK < len(token_ids):
                yield result
        watch = Stopwatch()
        with torch.inference_mode(), watch.measure(model.device):
            cache.end_prefill()
    yield Forward(result.logits, result.milliseconds + watch.milliseconds, result.num_tokens)


def generate(
    model: LoadedModel, cache: KVCache, token_ids: Sequence[int], *, max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Iterator[int]:  # fmt: skip
    """New tokens after `token_ids`, one at a time; ends with the model's end token, which is given too."""
    sampling = sampling or Sampling()
    *_, result = prefill(model, cache, token_ids)
    for step in range(max_new_tokens):
        token = choose(result.logits, sampling, step)
        yield token
        if token in model.end_tokens or step + 1 == max_new_tokens:
            return
        result = forward(model, cache, [token])
