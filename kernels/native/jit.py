"""Compiles kernels once a format, keeps machine code on disk, and says what it cost.

A kernel is a *factory*: a function that takes compile-time constants and gives the Python function to be
compiled. Numba's disk cache tells kernels apart by those constants; a digest of all kernel sources and of
the processor's features is one of them, so an edit in any of these files compiles anew.

This module does not know what a kernel computes.
"""

import hashlib
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numba
from numba.core import types
from numba.core.ccallback import CFunc
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_kernels: dict[tuple, "Kernel"] = {}
_watchers: list[Callable[[int], None]] = []


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel. `compile_ms` is what this process waited for it, from the disk cache or not."""

    name: str
    address: int
    compile_ms: float
    from_disk: bool
    function: CFunc  # owns the machine code


def has_lookups() -> bool:
    """Whether vectors can be looked up in registers here: AVX-512F on x86.

    `KVLENS_CPU_FEATURES=generic` says no, to test the arithmetic that other processors run.
    Raises: ValueError if that variable is neither `auto` nor `generic`.
    """
    return _allows(os.environ.get("KVLENS_CPU_FEATURES", "auto"), "+avx512f")


def has_half_arithmetic() -> bool:
    """Whether vectors of fp16 are multiplied and added as they are here: AVX512-FP16 on x86. Otherwise as above."""
    return _allows(os.environ.get("KVLENS_CPU_FEATURES", "auto"), "+avx512fp16")


@cache
def _allows(choice: str, feature: str) -> bool:
    if choice not in ("auto", "generic"):
        raise ValueError(f"KVLENS_CPU_FEATURES must be auto or generic; got {choice!r}")
    return choice == "auto" and feature in _host_features().split(",")


def require_half_floats() -> None:
    """Raises: ImportError on an x86 processor without F16C, where fp16 cannot be read by vectors."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and "+f16c" not in _host_features().split(","):
        raise ImportError("the processor has no F16C instructions")


@cache
def _host_features() -> str:
    """The features that Numba compiles for, as `+avx,-sse4a,...`."""
    if numba.config.CPU_FEATURES is not None:
        return numba.config.CPU_FEATURES
    return get_host_cpu_features()


@cache
def _source_digest(factory_file: str) -> int:
    """Changes with the processor, with any file beside this one, and with the factory's own."""
    digest = hashlib.sha256(_host_features().encode())
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(factory_file)]:
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


def kernel(factory: Callable[..., Callable], *constants: int) -> Kernel:
    """The kernel `factory(*constants, source)` compiled; the same object every time.

    Every parameter of the kernel is an int64, and it returns nothing.
    """
    key = (factory, *constants)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                found = _kernels[key] = _compile(factory, constants)
    return found


def _compile(factory: Callable[..., Callable], constants: tuple[int, ...]) -> Kernel:
    start = time.perf_counter()
    python_function = factory(*constants, _source_digest(factory.__code__.co_filename))
    parameters = python_function.__code__.co_argcount
    signature = types.void(*[types.int64] * parameters)
    options = {"error_model": "numpy", "nopython": True}
    try:
        function = numba.cfunc(signature, cache=True, **options)(python_function)
    except (RuntimeError, OSError) as error:  # no directory that may be written, or no room in it
        _log.warning("kernels are compiled in every process: %s", error)
        function = numba.cfunc(signature, **options)(python_function)
    elapsed_ms = (time.perf_counter() - start) * 1e3
    name = " ".join([factory.__name__, *map(str, constants)])
    from_disk = function.cache_hits > 0
    if not from_disk:
        _tell(1 + sum(not known.from_disk for known in _kernels.values()))
    return Kernel(name, function.address, elapsed_ms, from_disk, function)


@contextmanager
def watched(tell: Callable[[int], None]) -> Iterator[None]:
    """Within it `tell` hears, after each kernel that was not on disk, how many this process has compiled."""
    _watchers.append(tell)
    try:
        yield
    finally:
        _watchers.remove(tell)


def _tell(num_compiled: int) -> None:
    if num_compiled == 1:
        _log.warning("KVLens compiles CPU kernels for this machine; the next start finds them on disk")
    for tell in _watchers:
        tell(num_compiled)


def compiled() -> list[Kernel]:
    """Every kernel that this process has, in the order in which it was first needed."""
    return list(_kernels.values())


@intrinsic(prefer_literal=True)
def depends_on(typing, source):
    """Nothing at run time; names the source digest inside a kernel, so that the disk cache sees it."""
    return types.void(source), lambda context, builder, signature, values: context.get_dummy_value()
