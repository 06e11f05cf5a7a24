"""A Triton launch as a value: run it here, or compile it for a GPU that this machine does not have.

The compile goes through Triton's own `warmup`, so it specializes on the very arguments of the launch
(divisible strides, aligned pointers) and gives the machine code that a GPU would be given. This module
does not know what the kernels compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

COUNTS = ["page_table_ptr", "num_keys_ptr", "num_values_ptr", "num_tokens_ptr", "length_ptr"]
"""Arguments that are read number by number: alignment, in which layers differ, asks for no kernel of its own."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `arguments` are the kernel's by name, with `num_warps` and `num_stages`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self) -> None:
        """Launch on the GPU that holds the tensors. Raises: ValueError on the CPU, unless Triton interprets."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ValueError("a Triton kernel needs tensors on a GPU (or TRITON_INTERPRET=1); got them on the CPU")
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.arguments)

    def compile(self, arch: int) -> Any:
        """The compiled kernel (`asm`, `metadata`) for compute capability `arch`, e.g. 90.

        Raises: RuntimeError in Triton's interpreter, which compiles nothing.
        """
        if triton.knobs.runtime.interpret:
            raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, never compiled")
        with _pretended(arch):
            return self.kernel.warmup(grid=self.grid, **self.arguments)


def strides(name: str, tensor: torch.Tensor, *dims: str) -> dict[str, int]:
    """The strides of the first dims, by the kernel's argument names."""
    return {f"stride_{name}_{dim}": tensor.stride(i) for i, dim in enumerate(dims)}


def rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@cache
def arch_of(device: torch.device) -> int:
    """The compute capability, e.g. 90; without a GPU, that of the one to compile for."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@contextmanager
def _pretended(arch: int) -> Iterator[None]:
    """Triton believes that the current device is an NVIDIA GPU of compute capability `arch`."""
    from triton.runtime import driver

    driver.set_active(_AbsentDriver(arch))
    try:
        yield
    finally:
        driver.set_active(None)  # the real one, if any, is found again at the next launch


class _AbsentDriver:
    """Enough of a Triton driver to compile with. Devices are numbered by arch, which keys Triton's cache."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch

    def get_current_stream(self, device: int) -> int:
        return 0
