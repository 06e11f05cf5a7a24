"""Fixtures of the kernel tests: every implementation by name, fixed seeds, poisoned new tensors."""

import importlib

import pytest
import torch

# `cpu-generic` is the native kernels as a processor without AVX-512 runs them.
IMPLEMENTATIONS = ("cpu", "cpu-generic")


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    """Fixed seed; `torch.empty` holds NaN (integers: their largest), so that unwritten output shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """A function from the name of an operation to that operation, as one implementation computes it."""
    name, _, features = request.param.partition("-")
    monkeypatch.setenv("KVLENS_CPU_FEATURES", features or "auto")

    def operation(folder: str):
        return getattr(importlib.import_module(f"kvlens.kernels.{folder}.{name}"), folder)

    return operation
