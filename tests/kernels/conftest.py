"""Fixtures of the kernel tests: every implementation that loads here, by name."""

import importlib

import pytest
import torch


@pytest.fixture(params=["reference", "cpu"])
def quantize_pack(request):
    """The function `quantize_pack` of one implementation; compare with the reference."""
    return importlib.import_module(f"kvlens.kernels.quantize_pack.{request.param}").quantize_pack


@pytest.fixture(params=["cpu"])
def packed_attend(request):
    """The function `packed_attend` of one implementation; compare with the reference."""
    return importlib.import_module(f"kvlens.kernels.packed_attend.{request.param}").packed_attend


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
