"""One new token of each sequence into its exact window, and what falls due into the pages, decided on the device."""

from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch
from kvlens.kernels.exact_tokens import ExactTokens
from kvlens.kernels.packed_attend import PackedPast


@dataclass(frozen=True)
class FlushRule:
    """When a token leaves the exact window: a pure function of the length, for keys and for values.

    Of n tokens the first `num_sinks` stay exact for ever; of the others, those older than the window are packed, a
    flush of them at a time.
    """

    num_sinks: int
    key_window: int
    key_flush: int
    value_window: int
    value_flush: int

    def packed(self, side: int, num_tokens: int) -> int:
        """How many keys (side 0) or values (side 1) of `num_tokens` tokens are packed."""
        window, flush = (self.value_window, self.value_flush) if side else (self.key_window, self.key_flush)
        return max(0, num_tokens - self.num_sinks - window) // flush * flush


def append_pack(
    keys: torch.Tensor, values: torch.Tensor, exact: ExactTokens, rule: FlushRule, past: PackedPast | None
) -> None:
    module = dispatch.implementation("append_pack", keys.device)
    module.append_pack(keys, values, exact, rule, past)
