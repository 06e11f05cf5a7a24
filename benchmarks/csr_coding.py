"""Codes real keys and values in any of the ways the ablation compares, and counts every bit.

It knows a prompt's exact keys and values and the dictionaries; nothing of caches or pages.
"""

import math
from dataclasses import dataclass

import torch

from kvlens.engine.dictionaries.online import extra_atoms
from kvlens.engine.dictionaries.store import DictionaryKind, DictionarySet
from kvlens.engine.rotary import Rotary
from kvlens.kernels.pursuit import SparseCodes, pursue, restore
from kvlens.kernels.quantize_pack import dequantize, quantize_pack

PURSUITS = {"MP": {}, "MP + fit": {"refit": True}, "OMP": {"orthogonal": True}}


@dataclass(frozen=True)
class Variant:
    """One way to code. `key_atoms` and `value_atoms` count a whole vector's, over all its parts.

    `coefficient_bits` 16: fp16 beside an int16 index. Fewer: index and coefficient side by side, with a `scale` for
    each vector (16 or 8 bits, the latter in steps of 2^(1/16)) or for each slot of a layer (no bits a vector).
    Tokens before `sinks` and the newest `window` stay exact. With `kivi_bits` the rest is KIVI's, in groups of
    `kivi_group`.
    """

    group: str
    name: str
    kind: DictionaryKind | None = None
    key_atoms: int = 4
    value_atoms: int = 4
    pursuit: str = "MP"
    coefficient_bits: int = 16
    scale: str = "vector"
    scale_bits: int = 16
    num_sampled: int = 0
    num_guarded: int = 0
    sinks: int = 0
    window: int = 0
    kivi_bits: int = 0
    kivi_group: int = 32

    def vector_bits(self, atoms: int) -> int:
        """Bits of one vector."""
        if self.coefficient_bits == 16:
            return 32 * atoms
        index_bits = math.ceil(math.log2(self.kind.num_atoms))
        return (index_bits + self.coefficient_bits) * atoms + self.scale_bits * (self.scale == "vector")

    def bits_per_value(self, num_tokens: int, num_heads: int, head_dim: int) -> dict[str, float]:
        """Bits of a key and of a value of a prompt, with exact tokens and atoms of the prompt counted in."""
        if self.kivi_bits:
            coded = dict.fromkeys(("keys", "values"), self.kivi_bits + 32 / self.kivi_group)
        else:
            coded = {
                "keys": self.vector_bits(self.key_atoms) / head_dim,
                "values": self.vector_bits(self.value_atoms) / head_dim,
            }
        exact = min(1.0, (self.sinks + self.window) / num_tokens)
        online = 16 * (self.num_sampled + self.num_guarded) / (num_tokens * num_heads)
        return {side: 16 * exact + bits * (1 - exact) + online for side, bits in coded.items()}


class Coder:
    """Restores one layer's tensors as a variant's cache would give them back. Shapes: `[HK, T, D]` throughout."""

    def __init__(self, variant: Variant, dictionaries: DictionarySet | None, rotary: Rotary) -> None:
        self.variant, self.dictionaries, self.rotary = variant, dictionaries, rotary
        self._slot_scales: dict[tuple[str, int], torch.Tensor] = {}

    def restored(self, side: str, layer: int, exact: torch.Tensor) -> torch.Tensor:
        """Keys (as attention sees them) or values of tokens 0.. after coding."""
        variant = self.variant
        coded = slice(variant.sinks, exact.shape[1] - variant.window)
        result = exact.float().clone()
        code = self._kivi if variant.kivi_bits else self._sparse
        result[:, coded] = code(side, layer, exact[:, coded].float(), coded.start)
        return result

    def _kivi(self, side: str, layer: int, exact: torch.Tensor, first: int) -> torch.Tensor:
        options = {"bits": self.variant.kivi_bits, "group_size": self.variant.kivi_group}
        if side == "values":
            return dequantize(quantize_pack(exact, **options), **options)
        # Keys in groups of tokens, channel by channel; those that fill no group are in KIVI's window.
        full = exact.shape[1] // options["group_size"] * options["group_size"]
        packed = quantize_pack(exact[:, :full].transpose(1, 2).contiguous(), **options)
        return torch.cat([dequantize(packed, **options).transpose(1, 2), exact[:, full:]], dim=1)

    def _sparse(self, side: str, layer: int, exact: torch.Tensor, first: int) -> torch.Tensor:
        kind, positions = self.variant.kind, torch.arange(first, first + exact.shape[1])
        is_before = side == "keys" and kind.space == "pre_rope"
        vectors = self.rotary.unrotate(exact, positions) if is_before else exact
        mean = self._mean(side, layer, positions)
        vectors = vectors - mean
        parts = kind.value_parts if side == "values" else 1
        atoms = self.dictionaries.keys[layer] if side == "keys" else self.dictionaries.values[layer]
        cut = vectors.unflatten(-1, (parts, -1)).transpose(1, 2).flatten(0, 1)
        if self.variant.num_sampled or self.variant.num_guarded:
            atoms = self._with_prompt(atoms, cut)
        sparsity = (self.variant.key_atoms if side == "keys" else self.variant.value_atoms) // parts
        codes = pursue(cut, atoms, sparsity=sparsity, **PURSUITS[self.variant.pursuit])
        codes = SparseCodes(codes.indices, self._stored(codes.coefficients, side, layer))
        back = restore(codes, atoms).unflatten(0, (-1, parts)).transpose(1, 2).flatten(-2) + mean
        return self.rotary.rotate(back, positions) if is_before else back

    def _with_prompt(self, atoms: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        extra = extra_atoms(
            vectors, atoms, num_sampled=self.variant.num_sampled, num_guarded=self.variant.num_guarded, sparsity=4
        )
        return torch.cat([atoms, extra.half().float()])

    def _mean(self, side: str, layer: int, positions: torch.Tensor) -> torch.Tensor:
        means = self.dictionaries.key_means if side == "keys" else self.dictionaries.value_means
        if means is None:
            return torch.zeros(1)
        mean = means[layer].unsqueeze(1)
        if side == "keys" and self.variant.kind.space == "post_rope":
            return self.rotary.rotate(mean.expand(-1, len(positions), -1), positions)
        return mean

    def _stored(self, coefficients: torch.Tensor, side: str, layer: int) -> torch.Tensor:
        """Coefficients as they come out of memory."""
        variant = self.variant
        if variant.coefficient_bits == 16:
            return coefficients.half().float()
        levels = 2 ** (variant.coefficient_bits - 1) - 1
        if variant.scale == "slot":
            step = self._slot_scale(coefficients, side, layer) / levels
        else:
            parts = variant.kind.value_parts if side == "values" else 1
            apart = coefficients.abs().unflatten(0, (-1, parts))
            scale = apart.amax(dim=(1, -1), keepdim=True).expand(-1, parts, -1, -1).flatten(0, 1)
            if variant.scale_bits == 8:
                scale = torch.exp2(torch.ceil(scale.clamp(min=2**-7).log2() * 16) / 16)
            step = scale.half().float() / levels
        step = torch.where(step == 0, 1.0, step)
        return (coefficients / step).round().clamp(-levels, levels) * step

    def _slot_scale(self, coefficients: torch.Tensor, side: str, layer: int) -> torch.Tensor:
        """The largest size but for one in a thousand, slot by slot, in the first prompt coded: learned, not stored."""
        if (side, layer) not in self._slot_scales:
            sizes = coefficients.abs().flatten(0, -2)
            self._slot_scales[side, layer] = sizes.quantile(0.999, dim=0)
        return self._slot_scales[side, layer]


def squared_error(exact: torch.Tensor, restored: torch.Tensor) -> torch.Tensor:
    """|x - x^|^2 / |x|^2 of every vector."""
    exact = exact.float()
    return (exact - restored).square().sum(dim=-1) / exact.square().sum(dim=-1).clamp(min=1e-12)
