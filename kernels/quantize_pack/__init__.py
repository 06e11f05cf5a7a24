"""Asymmetric group quantization with bit packing, along the last axis.

One operation serves both sides of KIVI: keys are handed over as `[..., D, tokens]`, so that a group is
G consecutive tokens of one channel, and values as `[..., tokens, D]`, so that a group is G consecutive
channels of one token.

Layout of `codes`: **planar**. A row of N values at b bits fills W = N*b/16 words of int16. Value i lies
in word `i % W`, slot `i // W`, at bits `b*slot .. b*slot + b - 1` (slot 0 in the low bits). A slot is
thus a run of W consecutive values, which a kernel unpacks with one shift for the whole run.
"""

from dataclasses import dataclass

import torch

from kvlens.kernels import dispatch

BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Packed:
    """Quantized rows.

    Shapes: codes int16 `[..., N*bits/16]`, scale and minimum fp16 `[..., N/group_size]`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes

    def __getitem__(self, index) -> "Packed":
        return Packed(self.codes[index], self.scale[index], self.minimum[index])

    def __setitem__(self, index, rows: "Packed") -> None:
        self.codes[index] = rows.codes
        self.scale[index] = rows.scale
        self.minimum[index] = rows.minimum


def check_layout(length: int, *, bits: int, group_size: int) -> None:
    """Raises: ValueError where a row of `length` values cannot be stored at these bits and groups."""
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}; got {bits}")
    if group_size < 1 or length % group_size != 0:
        raise ValueError(f"group_size must divide the row of {length} values; got {group_size}")
    if length * bits % 16 != 0:
        raise ValueError(f"a row must fill whole 16-bit words: {length} values of {bits} bits are {length * bits} bits")


def quantize_pack(values: torch.Tensor, *, bits: int, group_size: int) -> Packed:
    """`values` as codes with a scale and a minimum for every `group_size` neighbours of the last axis.

    Shapes: values `[..., N]`, any float dtype, any strides; see `Packed` for the result.
    Raises: ValueError if N does not fit the groups or whole words.
    """
    check_layout(values.shape[-1], bits=bits, group_size=group_size)
    module = dispatch.implementation("quantize_pack", values.device)
    return module.quantize_pack(values, bits=bits, group_size=group_size)


def dequantize(packed: Packed, *, bits: int, group_size: int) -> torch.Tensor:
    """The fp32 values that `packed` stands for. Shapes: `[..., N]`."""
    check_layout(packed.codes.shape[-1] * 16 // bits, bits=bits, group_size=group_size)
    from kvlens.kernels.quantize_pack import reference

    return reference.dequantize(packed, bits=bits, group_size=group_size)


def unpack(words: torch.Tensor, *, bits: int) -> torch.Tensor:
    """The codes in planar words. Shapes: int16 `[..., W]` to int32 `[..., W*16/bits]`."""
    from kvlens.kernels.quantize_pack import reference

    return reference.unpack(words, bits=bits)
