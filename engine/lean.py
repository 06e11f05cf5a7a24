"""A decode step without Hugging Face's forward: one token of each sequence through a known decoder in one native call.

Most of a small model's step through transformers is Python and dispatch. For the Llama family on a CPU the
step runs from the model's own weights in `kernels/decoder_step`, and a cache that offers its own step as tasks
joins the same native call; any other cache is asked once a layer. Prompts take the network's forward.

Weights that were stored in 16 bits are read in these 16 bits (every value is the same, half the bytes); what
that takes beside the network is counted. Arithmetic is fp32. A model is served so only if its logits prove it
(`model.py`); otherwise the reason is told and every step takes the network.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import psutil
import torch
from transformers import PreTrainedModel

from kvlens.engine.cache import KVCache
from kvlens.engine.errors import ModelError
from kvlens.kernels.decoder_step import DecoderWeights, LayerWeights, decoder

if TYPE_CHECKING:
    from kvlens.kernels.native.program import Program

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles do not change with the length of the text."""

_TABLE_TOKENS = 1024
"""The table of angles grows in steps of this many positions."""

_MEMORY_SHARE = 4
"""Weights are copied to their stored 16 bits if that takes at most this part of the free memory."""


class LeanStep:
    """The short way through one network. Safe from several threads as long as each has its own cache.

    `extra_bytes` is what it holds beside the network's own weights.
    Raises: ModelError with the reason if it does not serve this network.
    """

    def __init__(self, network: PreTrainedModel, stored_dtype: torch.dtype | None) -> None:
        _check(network)
        self.extra_bytes = 0
        self._network = network
        self._scaling = network.model.layers[0].self_attn.scaling
        self._dtype = self._reading_dtype(stored_dtype)
        self._weights = self._read()
        self._rotations = torch.empty(0)
        self._bound: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()
        try:
            decoder(self._weights)
        except ValueError as error:
            raise ModelError(f"its sizes do not fit the kernels ({error})") from error

    def run(self, cache: KVCache, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after `tokens`, one of which joins each sequence of `cache`. Shapes: fp32 `[B, V]`."""
        bound = self._bound.get(cache)
        if bound is None or bound.num_rows != len(tokens):
            bound = self._bound[cache] = _Bound(decoder(self._weights, len(tokens)), len(tokens), self._scaling)
        return bound.run(cache, tokens, self._table)

    # ------------------------------------------------------------------ weights

    def _reading_dtype(self, stored: torch.dtype | None) -> torch.dtype:
        """16 bits where the file has 16 bits and there is room for the copy, else as the network has them."""
        num_values = sum(parameter.numel() for parameter in self._network.parameters())
        has_room = 2 * num_values * _MEMORY_SHARE < psutil.virtual_memory().available
        return stored if stored in (torch.float16, torch.bfloat16) and has_room else torch.float32

    def _read(self) -> DecoderWeights:
        base, config = self._network.model, self._network.config
        embedding = self._stored(base.embed_tokens.weight)
        head = self._network.lm_head.weight
        tied = head.data_ptr() == base.embed_tokens.weight.data_ptr()
        return DecoderWeights(
            embedding,
            tuple(self._layer(layer) for layer in base.layers),
            base.norm.weight.detach(),
            embedding if tied else self._stored(head),
            base.layers[0].self_attn.head_dim,
            config.rms_norm_eps,
        )

    def _layer(self, layer: torch.nn.Module) -> LayerWeights:
        attention, mlp = layer.self_attn, layer.mlp
        return LayerWeights(
            attention_norm=layer.input_layernorm.weight.detach(),
            query=self._stored(attention.q_proj.weight),
            key=self._stored(attention.k_proj.weight),
            value=self._stored(attention.v_proj.weight),
            output=self._stored(attention.o_proj.weight),
            mlp_norm=layer.post_attention_layernorm.weight.detach(),
            gate=self._stored(mlp.gate_proj.weight),
            up=self._stored(mlp.up_proj.weight),
            down=self._stored(mlp.down_proj.weight),
            query_bias=_bias(attention.q_proj),
            key_bias=_bias(attention.k_proj),
            value_bias=_bias(attention.v_proj),
            query_norm=_weight(attention, "q_norm"),
            key_norm=_weight(attention, "k_norm"),
        )

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in its 16 bits if it comes back from them unchanged, else itself."""
        weight = weight.detach()
        short = weight.to(self._dtype)
        if self._dtype == torch.float32 or not torch.equal(short.float(), weight):
            return weight
        self.extra_bytes += short.nbytes
        return short

    # ------------------------------------------------------------------ positions

    def _table(self, num_tokens: int) -> torch.Tensor:
        """Cosines, then sines, of at least so many positions. Shapes: `[T, D]`."""
        if num_tokens > len(self._rotations):
            positions = torch.arange(-(-num_tokens // _TABLE_TOKENS) * _TABLE_TOKENS).unsqueeze(0)
            cosine, sine = self._network.model.rotary_emb(torch.empty(0), positions)
            half = cosine.shape[-1] // 2
            self._rotations = torch.cat([cosine[0, :, :half], sine[0, :, :half]], dim=-1)
        return self._rotations


class _Bound:
    """A decoder's buffers and program for one cache, laid out anew when the cache moves its tensors."""

    def __init__(self, decoder, num_rows: int, scaling: float) -> None:
        self.num_rows = num_rows
        self._decoder = decoder
        self._scaling = scaling
        self._program: Program | None = None
        self._key: Hashable = None

    def run(self, cache: KVCache, tokens: Sequence[int], table_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        key = cache.begin_step()
        positions = cache.lengths[0]
        table = table_of(max(positions) + 1)
        if key is None or not hasattr(self._decoder, "tasks"):
            cosine, sine = table[list(positions)].chunk(2, dim=-1)
            return self._decoder.run(
                tokens, cosine, sine, lambda layer, *heads: cache.step(layer, *heads, scaling=self._scaling)
            )
        if key != self._key:
            self._program, self._key = self._lay_out(cache), key
        first, row_bytes = table.data_ptr(), table.stride(0) * table.itemsize
        self._decoder.set(tokens, [first + row_bytes * position for position in positions])
        self._program.run()
        cache.end_tasks()
        return self._decoder.logits()

    def _lay_out(self, cache: KVCache) -> "Program":
        from kvlens.kernels.native.program import Program

        decoder = self._decoder
        places = decoder.query, decoder.key, decoder.value, decoder.attended
        first, *others = decoder.tasks()
        tasks = list(first)
        for layer, after in enumerate(others):
            tasks += [*cache.step_tasks(layer, *places, scaling=self._scaling), *after]
        return Program(tasks)


def _check(network: PreTrainedModel) -> None:
    """Raises: ModelError with the reason why this network does not take the short way."""
    config = network.config
    if network.device.type != "cpu" or network.dtype != torch.float32:
        raise ModelError(f"it serves fp32 on a CPU; the model is {network.dtype} on {network.device.type}")
    if config.model_type not in FAMILIES:
        raise ModelError(f"it knows {', '.join(FAMILIES)}; the model is {config.model_type}")
    if config.hidden_act != "silu":
        raise ModelError(f"it knows gates of silu; the model has {config.hidden_act}")
    rotation = network.model.rotary_emb.rope_type
    if rotation not in _ROTATIONS:
        raise ModelError(f"it knows the rotary embeddings {', '.join(_ROTATIONS)}; the model has {rotation}")
    first = network.model.layers[0]
    if any(_bias(part) is not None for part in (first.self_attn.o_proj, first.mlp.gate_proj, first.mlp.down_proj)):
        raise ModelError("it knows biases of queries, keys and values alone; the model has more")
    if network.lm_head.bias is not None:
        raise ModelError("it knows no bias of the logits; the model has one")


def _bias(linear: torch.nn.Linear) -> torch.Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _weight(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    norm = getattr(module, name, None)
    return None if norm is None else norm.weight.detach()
