"""What every test shares: fixed seeds, NaN in memory that nobody has written, small models."""

import contextlib
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Before torch is loaded: threads that spin while they wait starve a browser, or a second test process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# On a GPU cuBLAS refuses to work under deterministic algorithms (kernels/conftest.py) without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests import tiny

with contextlib.suppress(ImportError):  # a machine for the GPU tests alone may lack it
    import hypothesis

    # "same": the cases depend on the code alone, so that a run that passes here passes there. "fresh": search anew.
    hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
    hypothesis.settings.register_profile("fresh", deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN (the largest integer for integers): reading what was never written shows."""
    original = torch.empty

    def empty(*size, **options):
        tensor = original(*size, **options)
        worst = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        return tensor.fill_(worst)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama of two layers and a byte tokenizer with a chat template."""
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: str):
    """The model of `tiny_folder`, loaded as any other, with random dictionaries."""
    from kvlens.engine.facts import StandInFacts
    from kvlens.engine.model import load_model

    model = load_model(tiny_folder, device="cpu")
    model.facts = StandInFacts(model.shape)
    return model
