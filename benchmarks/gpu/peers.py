"""Other people's code, measured from a checkout that is given by its path; nothing of it is kept here.

    python -m benchmarks.gpu --only attention --peer kivi=PATH

`kivi` is github.com/jy-yuan/KIVI, whose CUDA extension must be built first: `cd PATH/quant && pip install -e .`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.layers import Case, DenseLayer
from benchmarks.gpu.timing import Step
from kvlens.engine.config import MethodConfig
from kvlens.engine.methods.kivi import KiviConfig


@dataclass(frozen=True)
class Peer:
    """`steps` takes a case, an exact layer of it and a number of copies. `config`: ours of the same settings."""

    name: str
    config: MethodConfig
    steps: Callable[[Case, DenseLayer, int], list[Step]]


def load(given: str) -> list[Peer]:
    """The peers of `name=PATH`. Raises: ValueError for a name that is not known or a path that is no folder."""
    name, _, path = given.partition("=")
    if name not in PEERS:
        raise ValueError(f"a peer is given as name=PATH with a name of {', '.join(PEERS)}; got {given!r}")
    if not path or not Path(path).is_dir():
        raise ValueError(f"the path of the peer {name} must be a folder; got {path!r}")
    return PEERS[name](Path(path))


def kivi(checkout: Path) -> list[Peer]:
    """KIVI's own decode attention, as `models/llama_kivi.py` computes it, at 2 and 4 bits."""
    return [
        Peer(f"KIVI's own code, {bits} bit, no graph", config, KiviCode(checkout, config).steps)
        for bits in (2, 4)
        for config in [KiviConfig(key_bits=bits, value_bits=bits)]
    ]


PEERS = {"kivi": kivi}


class KiviCode:
    """One layer's step in KIVI's own functions: two products with packed codes, two with the exact rest, a softmax.

    Left out, in its favour: joining the new token to its tensors, which copies the packed values at every step. Its
    kernels run on the default stream, so no graph can hold them.
    """

    MOST_COPIES = 16

    def __init__(self, checkout: Path, config: KiviConfig) -> None:
        self._checkout, self._config = checkout, config

    def steps(self, case: Case, layer: DenseLayer, copies: int) -> list[Step]:
        """Raises: ImportError where its extension is not built."""
        return [self._step(case, layer) for _ in range(min(copies, self.MOST_COPIES))]

    def _step(self, case: Case, layer: DenseLayer) -> Step:
        config, product, pack = (
            self._config,
            self._function("quant.matmul", "cuda_bmm_fA_qB_outer"),
            self._function("quant.new_pack", "triton_quantize_and_pack_along_last_dim"),
        )
        group, bits = config.group_size, config.key_bits
        num_keys, num_values = (config.num_packed(side, case.tokens - 1) for side in range(2))
        keys = pack(layer.keys[:, :, :num_keys].transpose(2, 3).contiguous(), group, bits)
        values = pack(layer.values[:, :, :num_values].contiguous(), group, bits)
        per_head = case.shape.num_query_heads // case.shape.num_kv_heads
        rest_keys, rest_values = (
            tensor[:, :, count:].repeat_interleave(per_head, dim=1)
            for tensor, count in ((layer.keys, num_keys), (layer.values, num_values))
        )

        def step() -> torch.Tensor:
            packed = product(group, layer.query, *keys, bits)
            scores = torch.cat([packed, layer.query @ rest_keys.transpose(2, 3)], dim=-1) * case.scaling
            weights = scores.softmax(dim=-1, dtype=torch.float32).to(layer.query.dtype)
            output = product(group, weights[..., :num_values], *values, bits)
            return output + weights[..., num_values:] @ rest_values

        return step

    def _function(self, module: str, name: str) -> Callable:
        if f"{self._checkout}" not in sys.path:
            sys.path.append(f"{self._checkout}")
        return getattr(importlib.import_module(module), name)
