"""The rotation is the model's own: undone, the cache's keys are what its key projection gave."""

import pytest
import torch
import transformers

from kvlens.engine.errors import ModelError
from kvlens.engine.rotary import Rotary
from kvlens.kernels.sparse_attend import reference as sparse_reference
from tests import tiny

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def build(family: str, **changes) -> torch.nn.Module:
    config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


NETWORKS = {
    **{family: lambda family=family: tiny.network(family) for family in tiny.FAMILIES},
    "yarn scales as it turns": lambda: build("Llama", rope_parameters=YARN),
    "llama3 angles": lambda: build("Llama", rope_parameters=LLAMA3),
    "a part of the channels": lambda: build(
        "Phi", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "pairs of neighbours": lambda: build("Cohere"),
    "a part, in pairs of neighbours": lambda: build("Glm", head_dim=16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_undone_keys_are_those_before_rope(name, monkeypatch):
    network = NETWORKS[name]()
    given = []
    module = __import__(type(network).__module__, fromlist=["apply_rotary_pos_emb"])
    original = module.apply_rotary_pos_emb

    def spy(query, key, *rest, **options):
        given.append(key.clone())
        return original(query, key, *rest, **options)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(module, "apply_rotary_pos_emb", spy)
        ids = torch.arange(90).remainder(60).unsqueeze(0)
        cache = network(ids, use_cache=True).past_key_values
    rotary, positions = Rotary.of(network), torch.arange(90)
    assert len(given) == 2
    for layer, before in enumerate(given):
        seen = cache.layers[layer].keys
        width = before.shape[-1]
        assert not torch.allclose(seen[..., :width], before, atol=1e-2)
        undone = rotary.unrotate(seen, positions)
        torch.testing.assert_close(undone[..., :width], before, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rotary.rotate(undone, positions), seen, atol=1e-4, rtol=1e-4)
        later = rotary.unrotate(seen[0, :, 40:], positions[40:])
        torch.testing.assert_close(later, undone[0, :, 40:], atol=1e-4, rtol=1e-4)


def test_sixteen_bits_come_back_in_sixteen_bits():
    rotary = Rotary.of(tiny.network())
    keys = torch.randn(2, 5, 32, dtype=torch.float16)
    positions = torch.arange(1000, 1005)
    back = rotary.unrotate(rotary.rotate(keys, positions), positions)
    assert back.dtype == torch.float16
    torch.testing.assert_close(back, keys, atol=4e-3, rtol=0)


def test_a_model_without_rotary_keeps_its_keys():
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)
    rotary = Rotary.of(transformers.GPT2LMHeadModel(config))
    keys = torch.randn(2, 3, 8)
    assert torch.equal(rotary.rotate(keys, torch.arange(3)), keys)
    assert torch.equal(rotary.unrotate(keys, torch.arange(3)), keys)


def test_an_embedding_that_cannot_be_undone_is_refused():
    class OddRotaryEmbedding(torch.nn.Module):
        def forward(self, x, positions):
            wave = positions.unsqueeze(-1).float().repeat(1, 1, 4).cos()
            return wave, wave

    with pytest.raises(ModelError, match="OddRotaryEmbedding"):
        Rotary.of(torch.nn.Sequential(OddRotaryEmbedding()))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_turn_in_numbers_is_the_models_or_absent(name):
    rotary = Rotary.of(NETWORKS[name]())
    if "neighbours" in name:
        assert rotary.turn is None
        return
    width = 2 * len(rotary.turn.inverse_frequencies)
    keys, first = torch.randn(3, 40, width + 4), 50
    got = sparse_reference.turned(keys, rotary.turn, first=first)
    want = rotary.rotate(keys, torch.arange(first, first + 40))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
