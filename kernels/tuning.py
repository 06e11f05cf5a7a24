"""Launch configurations: what shapes do not decide and only measuring on a device can.

`python -m benchmarks.tune` measures them and saves one file a device in `tuned/`, with the conditions. A device
without a file takes that of the nearest compute capability of its generation, and where there is none the
defaults below. Those are derived from what the compiler says (registers, shared memory, no spills; see
`benchmarks/instructions.py`) and were not measured. This module does not know what the kernels compute.
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvlens.kernels.compiled import arch_of

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Shape:
    """What a configuration is chosen for; `bits` are those of packed keys, 0 where nothing is packed."""

    head_dim: int
    heads_per_kv: int
    batch: int
    bits: int = 0


@dataclass(frozen=True)
class PackedConfiguration:
    """Of `packed_attend`, one warp a program: no two share a product's rows."""

    num_stages: int  # tiles in flight
    programs: int  # that run at once on a multiprocessor
    exact_tokens: int = 16  # that one program reads
    exact_channels: int = 32  # that it takes at a time


@dataclass(frozen=True)
class DenseConfiguration:
    """Of `dense_attend`; for more than 8 query heads a key/value head, or 128 channels, the warps are doubled."""

    num_stages: int
    programs: int
    num_warps: int = 1
    tile_bytes: int = 8192  # of keys, and as many of values


@dataclass(frozen=True)
class SparseConfiguration:
    """Of `sparse_attend`, one warp a program."""

    programs: int
    tile_tokens: int = 64


Configuration = PackedConfiguration | DenseConfiguration | SparseConfiguration

# The least compute capability that a line is for, bits of the keys and head dim (None: any); the first that fits is
# taken.
# Packed: three stages are page number, copies, products; more would double the 20 KiB of shared memory (34 for heads of
# 256). Registers allow 8 programs; shared memory 7 on 80 and 4 where a multiprocessor has 100 KiB (86, 89, 120).
# Dense: two buffers for a tile of keys and of values are 33 to 41 KiB a program.
DEFAULTS: dict[str, tuple[tuple[tuple[int, int | None, int | None], Configuration], ...]] = {
    "packed_attend": (
        ((120, None, 256), PackedConfiguration(num_stages=3, programs=2)),
        ((120, None, None), PackedConfiguration(num_stages=3, programs=4)),
        ((90, None, 256), PackedConfiguration(num_stages=3, programs=6)),
        ((90, None, None), PackedConfiguration(num_stages=3, programs=8)),
        ((81, None, 256), PackedConfiguration(num_stages=3, programs=2)),
        ((81, None, None), PackedConfiguration(num_stages=3, programs=4)),
        ((80, None, 256), PackedConfiguration(num_stages=3, programs=4)),
        ((80, None, None), PackedConfiguration(num_stages=3, programs=7)),
    ),
    "dense_attend": (
        ((120, None, None), DenseConfiguration(num_stages=3, programs=2)),
        ((90, None, None), DenseConfiguration(num_stages=3, programs=6)),
        ((81, None, None), DenseConfiguration(num_stages=3, programs=2)),
        ((80, None, None), DenseConfiguration(num_stages=3, programs=4)),
    ),
    "sparse_attend": (((80, None, None), SparseConfiguration(programs=16)),),
}


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration of one shape, with what was measured."""

    shape: Shape
    configuration: Configuration
    tokens: int
    milliseconds: float
    default_milliseconds: float


def configuration_for(
    operation: str, query: torch.Tensor, num_kv_heads: int, *, bits: int = 0, arch: int | None = None
) -> Configuration:
    """That of attention by `query [B, HQ, D]`, on its device or on `arch`. Raises: ValueError below 80."""
    batch, num_query_heads, head_dim = query.shape
    shape = Shape(head_dim, num_query_heads // num_kv_heads, batch, bits)
    return configuration_of(operation, shape, arch or arch_of(query.device), query.device)


@cache
def configuration_of(operation: str, shape: Shape, arch: int, device: torch.device) -> Configuration:
    """The saved configuration of the nearest shape, on a GPU that has one; else the default.

    Raises: ValueError below compute capability 80.
    """
    default = default_of(operation, shape, arch)
    if device.type != "cuda":  # kernels are compiled for a GPU that is not here, or interpreted
        return default
    tuned = [
        each
        for each in load(torch.cuda.get_device_name(device), arch).get(operation, ())
        if (each.shape.bits, each.shape.head_dim) == (shape.bits, shape.head_dim)
    ]

    def distance(each: Tuned) -> tuple[float, float]:
        return (
            abs(math.log(each.shape.heads_per_kv / shape.heads_per_kv)),
            abs(math.log(each.shape.batch / max(1, shape.batch))),
        )

    return min(tuned, key=distance).configuration if tuned else default


def default_of(operation: str, shape: Shape, arch: int) -> Configuration:
    for (least_arch, bits, head_dim), configuration in DEFAULTS[operation]:
        if arch >= least_arch and bits in (None, shape.bits) and head_dim in (None, shape.head_dim):
            return configuration
    raise ValueError(f"Triton attention needs compute capability 80 or newer; got {arch}")


@cache
def load(device_name: str, arch: int) -> dict[str, tuple[Tuned, ...]]:
    """What was saved for a device of this name, or else for the nearest one of its generation, by operation.

    Raises: ValueError for a file that this version cannot read.
    """
    path = path_of(device_name)
    if path.exists():
        return read(path)[1]
    related = [
        (abs(its_arch - arch), other.name, tuned)
        for other in TUNED.glob("*.json")
        for its_arch, tuned in [read(other)]
        # what fits more shared memory may not fit less
        if its_arch // 10 == arch // 10 and shared_kibibytes(its_arch) <= shared_kibibytes(arch)
    ]
    return min(related, key=lambda each: each[:2])[2] if related else {}


def save(
    device_name: str,
    arch: int,
    conditions: dict[str, str],
    tuned: dict[str, list[Tuned]],
    folder: Path | None = None,
) -> Path:
    """Write operations into the file of a device, where others that it has stay; gives its path, in TUNED or `folder`.

    Raises: ValueError if there is one that this version cannot read.
    """
    path = path_of(device_name, folder)
    path.parent.mkdir(exist_ok=True)
    operations = {}
    if path.exists():
        read(path)
        operations = json.loads(path.read_text())["operations"]
    for operation, found in tuned.items():
        operations[operation] = {"conditions": conditions, "tuned": [asdict(each) for each in found]}
    written = {"device": device_name, "compute_capability": arch, "operations": operations}
    path.write_text(json.dumps(written, indent=1) + "\n")
    load.cache_clear()
    configuration_of.cache_clear()
    return path


def path_of(device_name: str, folder: Path | None = None) -> Path:
    return (folder or TUNED) / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")


def read(path: Path) -> tuple[int, dict[str, tuple[Tuned, ...]]]:
    """The compute capability of a file and what it holds."""
    try:
        written = json.loads(path.read_text())
        tuned = {
            operation: tuple(_tuned(operation, **each) for each in found["tuned"])
            for operation, found in written["operations"].items()
        }
        return int(written["compute_capability"]), tuned
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is of another version ({error!r}): run `python -m benchmarks.tune`") from error


def _tuned(operation: str, *, shape: dict, configuration: dict, **figures: Any) -> Tuned:
    kind = type(DEFAULTS[operation][0][1])
    return Tuned(Shape(**shape), kind(**configuration), **figures)


def shared_kibibytes(arch: int) -> int:
    """Shared memory that one program may have (CUDA C++ programming guide, compute capabilities)."""
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}.get(arch, 99)
