"""Small random models of several families, and a byte tokenizer: engine tests need no weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SPECIAL = ("<end>", "<system>", "<user>", "<assistant>")

_SIZE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "initializer_range": 0.2,
    "sliding_window": None,
}

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def network(family: str = "llama", **changes) -> PreTrainedModel:
    """A random network of a family, the same at every call."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**(_SIZE | changes))).eval()
    model.generation_config.eos_token_id = 0
    # Roles are never part of an answer, as in a trained model.
    model.lm_head.weight.data[1 : len(SPECIAL)] = 0
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after four special ones; the readable bytes first, which are all the networks know."""
    readable = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]
    alphabet = [*readable, *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(readable))]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    base = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="<end>", pad_token="<end>",
        additional_special_tokens=list(SPECIAL[1:]), padding_side="left",
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder: Path, family: str = "llama", **changes) -> str:
    """Writes a network and its tokenizer as safetensors; gives the folder."""
    network(family, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
