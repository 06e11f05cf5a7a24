"""From logits to a token, with the same noise in every lane.

The noise of step i depends on the seed and on i alone, so that two lanes that see the same logits choose
the same token, and a difference between their texts comes from their caches.
"""

from dataclasses import dataclass

import torch

from kvlens.engine.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy. Raises: EngineError for values out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 5:
            raise EngineError(f"temperature must lie between 0 and 5; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p must be above 0 and at most 1; got {self.top_p}")


def choose(logits: torch.Tensor, sampling: Sampling, step: int) -> int:
    """The token for step `step` of an answer. Shapes: logits `[V]`.

    Sampling adds Gumbel noise to the log-probabilities of the smallest set of tokens whose probability
    reaches `top_p`, and takes the largest: exactly a draw from that distribution.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        return int(logits.argmax())
    log_probs = (logits / sampling.temperature).log_softmax(dim=-1).cpu()
    ordered, order = log_probs.sort(descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    log_probs[order[before >= sampling.top_p]] = -torch.inf
    generator = torch.Generator().manual_seed((sampling.seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(log_probs.shape, generator=generator, dtype=torch.float64)
    noise = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
    return int((log_probs.double() + noise).argmax())
