"""Well-known models as shapes: dimensions without weights, for measuring with random tensors.

The numbers are those of the public `config.json` of each model on the Hugging Face Hub.
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvlens.engine import bridge
from kvlens.engine.facts import StandInFacts
from kvlens.engine.model import LoadedModel, take_short_way
from kvlens.engine.shape import ModelShape


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a decoder. `kind` is its `model_type` in transformers; `max_context` in tokens."""

    name: str
    kind: str
    shape: ModelShape
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    is_tied: bool = False

    def config(self):
        """A Hugging Face configuration of these dimensions."""
        shape = self.shape
        return AutoConfig.for_model(
            self.kind, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_query_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, vocab_size=self.vocab_size,
            max_position_embeddings=self.max_context, tie_word_embeddings=self.is_tied,
        )  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in 16 bits."""
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(self.config())
        return 2 * sum(parameter.numel() for parameter in network.parameters())


ARCHITECTURES = {
    entry.name: entry
    for entry in (
        Architecture("Llama-3.1-8B", "llama", ModelShape(32, 32, 8, 128), 4096, 14336, 128256, 131072),
        Architecture("Llama-2-7B", "llama", ModelShape(32, 32, 32, 128), 4096, 11008, 32000, 4096),
        Architecture("Mistral-7B-v0.3", "mistral", ModelShape(32, 32, 8, 128), 4096, 14336, 32768, 32768),
        Architecture("Qwen3-8B", "qwen3", ModelShape(36, 32, 8, 128), 4096, 12288, 151936, 40960),
        Architecture("Qwen3-0.6B", "qwen3", ModelShape(28, 16, 8, 128), 1024, 3072, 151936, 40960, is_tied=True),
        Architecture("Llama-3.2-1B", "llama", ModelShape(16, 32, 8, 64), 2048, 8192, 128256, 131072, is_tied=True),
    )
}


def random_model(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """The whole network with random weights, for measuring: it has no tokenizer and says nothing that makes sense.

    Its dictionaries are random too. On a GPU it takes the short way of a decode step as a loaded model does.
    """
    bridge.install()
    config = architecture.config()
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=bridge.NAME).eval()
    model = LoadedModel(
        name=architecture.name, network=network, tokenizer=None, shape=architecture.shape, device=device, dtype=dtype,
        max_context=architecture.max_context,
    )  # fmt: skip
    model.facts = StandInFacts(architecture.shape, device=device)
    if device.type == "cuda":
        take_short_way(model, dtype)
    return model


def has_room(architecture: Architecture, device: torch.device, kv_bytes: int) -> bool:
    """Whether the whole network runs here: on a GPU whose free memory takes the weights and `kv_bytes` of cache."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return architecture.weight_bytes + kv_bytes < 0.9 * free
