"""The dimensions of a model that decide the size of its KV cache."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Layers and heads of a decoder. Units: all counts; `head_dim` is the width of one head."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if self.num_query_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_query_heads must be a multiple of num_kv_heads ({self.num_kv_heads}); got {self.num_query_heads}"
            )

    @property
    def values_per_token(self) -> int:
        """Numbers that one token adds to the cache: keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def fp16_bytes(self, num_tokens: int) -> int:
        """Bytes of a plain 16-bit cache of `num_tokens` tokens."""
        return 2 * self.values_per_token * num_tokens

    @classmethod
    def of(cls, config) -> "ModelShape":
        """The shape in a Hugging Face model configuration."""
        text = config.get_text_config()
        num_query_heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_query_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_query_heads
        return cls(text.num_hidden_layers, num_query_heads, num_kv_heads, head_dim)
