"""What tests of many sequences share: a small random model whose answers never end by themselves, and settings of every
method that pack soon."""

from pathlib import Path

from kvlens.engine.facts import StandInFacts
from kvlens.engine.methods.csr import CsrConfig
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.model import LoadedModel, load_model
from tests import tiny

CONFIGS = {
    "dense": DenseConfig(),
    "kivi": KiviConfig(residual_length=32, num_sinks=2),
    "csr": CsrConfig(num_atoms=256, window=16, flush=8),
}


def endless_model(folder: Path, **options) -> LoadedModel:
    """Written to `folder` and loaded with `options` of `load_model`."""
    model = load_model(tiny.save(folder, head_dim=64, eos_token_id=None), **options)
    model.end_tokens = frozenset()
    model.facts = StandInFacts(model.shape, device=model.device)
    return model
