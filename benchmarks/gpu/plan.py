"""What is measured: shapes, sizes and settings of the whole run, and of a dry run."""

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.layers import Case
from kvlens.engine.architectures import ARCHITECTURES, Architecture
from kvlens.engine.bench import Candidate
from kvlens.engine.methods.csr import CsrConfig
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.shape import ModelShape


@dataclass(frozen=True)
class Network:
    """A network with random weights, and the (batch, context) of its decode steps."""

    architecture: Architecture
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Headline:
    """The paper's measurement: one memory, batches as large as it takes. Units: tokens, bytes."""

    architecture: Architecture
    prompt: int
    output: int
    budget_bytes: int
    batch_step: int


@dataclass(frozen=True)
class Plan:
    """`seconds` that each section may take; `turn_seconds` of all methods of a case together, in turns."""

    layers: tuple[Case, ...]
    networks: tuple[Network, ...]
    headline: Headline
    memory: Network
    prefill_tokens: int
    seconds: dict[str, float]
    turn_seconds: float
    num_turns: int


DENSE = Candidate("dense", "dense", DenseConfig())
KIVI_2 = Candidate("KIVI-2 G=32 R=128", "kivi", KiviConfig())
KIVI_2_SHORT = Candidate("KIVI-2 G=32 R=32", "kivi", KiviConfig(residual_length=32))
KIVI_4 = Candidate("KIVI-4 G=32 R=128", "kivi", KiviConfig(key_bits=4, value_bits=4))
COMPACT = Candidate("CSR compact, 2 bit", "csr", CsrConfig())

PACKED = (
    KIVI_2,
    KIVI_2_SHORT,
    Candidate("KIVI-2 G=128 R=128", "kivi", KiviConfig(group_size=128)),
    KIVI_4,
    Candidate("KIVI-4 G=32 R=32", "kivi", KiviConfig(key_bits=4, value_bits=4, residual_length=32)),
    Candidate("KIVI-4 G=128 R=128", "kivi", KiviConfig(key_bits=4, value_bits=4, group_size=128)),
    COMPACT,
    Candidate("CSR look-up, 2 bit", "csr", CsrConfig(keys="after RoPE", is_centred=False)),
)
"""What attention of one layer is measured on."""

LANES = (DENSE, KIVI_2, KIVI_2_SHORT, KIVI_4)
"""What whole decode steps are measured on."""

LLAMA_2, LLAMA_3 = (
    replace(ARCHITECTURES[name], max_context=max(40960, ARCHITECTURES[name].max_context))
    for name in ("Llama-2-7B", "Llama-3.1-8B")
)
"""Random weights know no length that they were trained for: the 7B is measured beyond its 4,096 tokens too."""

_MHA, _GQA, _EMBEDDED = ModelShape(1, 32, 32, 128), ModelShape(1, 32, 8, 128), ModelShape(1, 4, 2, 64)
_SIZES = ((32, 4096), (1, 131072), (1, 32768), (1, 4096))
_STEPS = ((32, 4096), (1, 32768), (1, 500))

SECTIONS = ("attention", "steps", "headline", "memory")

FULL = Plan(
    layers=(
        *(Case(LLAMA_2.name, _MHA, *size) for size in _SIZES),
        *(Case(LLAMA_3.name, _GQA, *size) for size in _SIZES),
        Case("embedded model", _EMBEDDED, 1, 512),
    ),
    networks=(Network(LLAMA_2, _STEPS), Network(LLAMA_3, _STEPS)),
    headline=Headline(LLAMA_2, prompt=160, output=338, budget_bytes=80 * 10**9, batch_step=8),
    memory=Network(LLAMA_2, ((32, 4096), (1, 32768))),
    prefill_tokens=8192,
    seconds={"attention": 130, "steps": 210, "headline": 120, "memory": 45},
    turn_seconds=4.0,
    num_turns=4,
)

_TINY = Architecture("tiny", "llama", ModelShape(2, 4, 2, 32), 64, 96, 100, 1024)

DRY = Plan(
    layers=(
        Case("tiny", ModelShape(1, 4, 4, 32), 1, 300, torch.float32),
        Case("tiny grouped", ModelShape(1, 4, 2, 32), 2, 260, torch.float32),
    ),
    networks=(Network(_TINY, ((2, 200),)),),
    headline=Headline(_TINY, prompt=40, output=8, budget_bytes=600_000, batch_step=1),
    memory=Network(_TINY, ((2, 200),)),
    prefill_tokens=96,
    seconds=dict.fromkeys(SECTIONS, 120),
    turn_seconds=0.0,
    num_turns=1,
)
