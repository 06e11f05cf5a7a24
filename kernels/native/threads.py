"""Runs a native kernel on torch's own OpenMP threads.

A second thread pool beside torch's would fight it for the cores: both spin while they wait. Every OpenMP
runtime for C exports `GOMP_parallel(function, data, num_threads, flags)`, so a kernel can enter the very
team that torch's operators use, from any Python thread.

This module does not know what runs; whoever shares out the work counts atomically.
"""

import ctypes
import logging
import sys
from functools import cache
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_LIMITATION = "native kernels run on one thread: no OpenMP runtime with GOMP_parallel was found beside torch"


@cache
def parallel_address() -> int:
    """The address of `GOMP_parallel` in the runtime that torch loaded; 0 if there is none."""
    for library in _loaded_runtimes():
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    _log.warning(_LIMITATION)
    return 0


def limitation() -> str | None:
    """Why native kernels run on one thread here, as a sentence; None where they use torch's threads."""
    return None if parallel_address() else _LIMITATION


def num_threads() -> int:
    """Threads that a kernel may use: torch's own setting, or 1 where its runtime cannot be entered."""
    return torch.get_num_threads() if parallel_address() else 1


def run(worker: int, arguments: int, num_threads: int) -> None:
    """Call the kernel at `worker` with the address `arguments` on every thread of a team, or on this one."""
    if num_threads > 1:
        _gomp_parallel(parallel_address())(worker, arguments, num_threads, 0)
    else:
        _one_argument(worker)(arguments)


@cache
def _gomp_parallel(address: int):
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return kind(address)


@cache
def _one_argument(address: int):
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _loaded_runtimes() -> list[str]:
    """OpenMP libraries mapped into this process, else those that lie in torch's folder."""
    folder = Path(torch.__file__).parent
    names = ("libgomp", "libomp", "libiomp5")
    mapped: list[str] = []
    if sys.platform == "linux":
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count("/"))
        mapped = [path for path in paths if Path(path).name.startswith(names)]
    beside = [str(path) for name in names for path in sorted(folder.glob(f"lib/{name}*"))]
    in_torch = [path for path in mapped if path.startswith(str(folder.parent))]
    return in_torch + mapped + ([] if mapped else beside)
