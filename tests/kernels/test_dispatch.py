"""Which implementation runs, and that a fallback is said."""

import sys

import pytest
import torch

from kvlens.kernels import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    dispatch._load.cache_clear()
    yield
    dispatch._load.cache_clear()


@pytest.mark.parametrize(
    ("choice", "device", "name"),
    [
        ("auto", "cpu", "cpu"),
        ("auto", "cuda", "triton"),
        ("auto", "mps", "reference"),
        ("reference", "cuda", "reference"),
    ],
)
def test_the_environment_or_the_device_decides(choice, device, name, monkeypatch):
    monkeypatch.setenv("KERNELS", choice)
    assert dispatch.preferred(torch.device(device)) == name


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv("KERNELS", "fast")
    with pytest.raises(ValueError, match="KERNELS must be one of auto, triton, cpu, reference; got 'fast'"):
        dispatch.requested()


def test_a_fallback_is_logged_once_and_kept(monkeypatch, caplog):
    monkeypatch.setenv("KERNELS", "cpu")
    monkeypatch.setitem(sys.modules, "kvlens.kernels.quantize_pack.cpu", None)
    for _ in range(2):
        module = dispatch.implementation("quantize_pack", CPU)
        dispatch._load.cache_clear()
    assert module.__name__.endswith("reference")
    assert "cannot be loaded" in dispatch.fallbacks()["quantize_pack"]
    assert len(caplog.records) == 1
    assert dispatch.describe("quantize_pack", CPU) == "plain reference (slow)"
