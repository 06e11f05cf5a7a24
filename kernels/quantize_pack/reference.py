"""The definition of quantize-and-pack in plain fp32 torch.

Source: KIVI (arXiv 2402.02750), as its authors' code computes it: s = (max - min) / (2^b - 1),
code = round-half-even(clamp((x - min) / s, 0, 2^b - 1)), x^ = code * s + min.
Departures: the arithmetic is fp32 on the stored fp16 scale and minimum, where the authors stay in fp16;
a group whose scale is 0 (all values equal, or closer than fp16 can tell) gets code 0 instead of 0/0.
"""

import torch

from kvlens.kernels.quantize_pack import Packed


def quantize_pack(values: torch.Tensor, *, bits: int, group_size: int) -> Packed:
    """See `kvlens.kernels.quantize_pack.quantize_pack`."""
    groups = values.float().unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1)
    minimum = low.half()
    # On a GPU torch multiplies by the reciprocal of a number, but divides by a tensor.
    scale = ((high - low) / torch.full_like(low, 2**bits - 1)).half()
    step = scale.float().unsqueeze(-1)
    steps = (groups - minimum.float().unsqueeze(-1)) / torch.where(step == 0, 1.0, step)
    codes = steps.clamp(0, 2**bits - 1).round().to(torch.int32)
    codes = torch.where(step == 0, 0, codes).flatten(-2)
    return Packed(pack(codes, bits=bits), scale, minimum)


def dequantize(packed: Packed, *, bits: int, group_size: int) -> torch.Tensor:
    """See `kvlens.kernels.quantize_pack.dequantize`."""
    groups = unpack(packed.codes, bits=bits).float().unflatten(-1, (-1, group_size))
    return (groups * packed.scale.float().unsqueeze(-1) + packed.minimum.float().unsqueeze(-1)).flatten(-2)


def pack(codes: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Codes `[..., N]` as planar int16 words `[..., N*bits/16]`."""
    slots = codes.to(torch.int32).unflatten(-1, (16 // bits, -1))
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=codes.device).unsqueeze(-1)
    words = (slots << shifts).sum(dim=-2)
    return ((words + 0x8000) % 0x10000 - 0x8000).to(torch.int16)


def unpack(words: torch.Tensor, *, bits: int) -> torch.Tensor:
    """Planar int16 words `[..., W]` as int32 codes `[..., W*16/bits]`."""
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=words.device).unsqueeze(-1)
    return ((words.to(torch.int32).unsqueeze(-2) >> shifts) & (2**bits - 1)).flatten(-2)
