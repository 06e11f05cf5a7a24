"""Picks the implementation of an operation: `triton`, `cpu` or `reference`.

`KERNELS=auto|triton|cpu|reference` forces one; `auto` takes Triton on a GPU, the native kernels on a
CPU, and the reference elsewhere. A fallback is logged once and kept in `fallbacks()`, which the page
shows. This module does not know what the operations compute.
"""

import importlib
import logging
import os
import sys
from functools import cache
from types import ModuleType

import torch

CHOICES = ("auto", "triton", "cpu", "reference")

_log = logging.getLogger(__name__)
_fallbacks: dict[str, str] = {}


def requested() -> str:
    """The implementation asked for in the environment variable `KERNELS` (default `auto`).

    Raises: ValueError if it is none of `CHOICES`.
    """
    choice = os.environ.get("KERNELS", "auto").lower()
    if choice not in CHOICES:
        raise ValueError(f"KERNELS must be one of {', '.join(CHOICES)}; got {choice!r}")
    return choice


def preferred(device: torch.device) -> str:
    """The implementation wanted on `device` before it is known whether it loads."""
    choice = requested()
    if choice != "auto":
        return choice
    return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "reference")


def implementation(operation: str, device: torch.device) -> ModuleType:
    """The module that computes `operation` (a folder of `kernels/`) on `device`."""
    return _load(operation, preferred(device))


@cache
def _load(operation: str, name: str) -> ModuleType:
    package = f"{__package__}.{operation}"
    if name == "reference":
        return importlib.import_module(f"{package}.reference")
    try:
        return importlib.import_module(f"{package}.{name}")
    except ImportError as error:
        note_fallback(operation, f"the {name} kernels cannot be loaded here ({error})")
        return importlib.import_module(f"{package}.reference")


def runs_triton(operation: str, device: torch.device) -> bool:
    """Whether `operation` is computed by a Triton kernel on `device`."""
    return preferred(device) == "triton" and implementation(operation, device).__name__.endswith(".triton")


def describe(operation: str, device: torch.device) -> str:
    """What computes `operation` on `device`, in words for the screen."""
    name = implementation(operation, device).__name__.rsplit(".", 1)[-1]
    return {"triton": "Triton kernel", "cpu": "native CPU kernel"}.get(name, "plain reference (slow)")


def note_fallback(operation: str, reason: str) -> None:
    """Record, and log once, that `operation` runs on its reference because of `reason`."""
    if _fallbacks.get(operation) != reason:
        _fallbacks[operation] = reason
        _log.warning("%s runs on its plain reference: %s", operation, reason)


def notices() -> list[str]:
    """What a person should know about the kernels of this process: fallbacks, and threads that cannot be used."""
    said = [f"{operation} runs on its plain reference: {reason}" for operation, reason in _fallbacks.items()]
    threads = sys.modules.get(f"{__package__}.native.threads")
    if threads is not None and threads.limitation() is not None:
        said.append(threads.limitation())
    return said


def fallbacks() -> dict[str, str]:
    """Operations that run on their reference though another was wanted, with the reason."""
    return dict(_fallbacks)
