"""What a method may ask of a model beyond its shape: its rotary embedding and the dictionaries learned from it."""

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from kvlens.engine.dictionaries.store import DictionaryKind, DictionarySet, DictionaryStore, fingerprint, folders
from kvlens.engine.rotary import Rotary
from kvlens.engine.shape import ModelShape


class Facts(ABC):
    """Looked up when first asked for, then kept: most methods ask for nothing."""

    @property
    @abstractmethod
    def rotary(self) -> Rotary:
        """The position embedding. Raises: ModelError if it cannot be undone."""

    @abstractmethod
    def dictionary(self, kind: DictionaryKind) -> DictionarySet:
        """The dictionaries of `kind` on the caches' device. Raises: MissingDictionary."""

    def check(self, kind: DictionaryKind) -> None:
        """Raises: MissingDictionary if there is no dictionary of `kind`."""
        self.dictionary(kind)


class ModelFacts(Facts):
    """Those of a loaded model."""

    def __init__(self, network: nn.Module, *, name: str) -> None:
        self._network = network
        self._name = name
        self._placed: dict[DictionaryKind, tuple[DictionarySet, DictionarySet]] = {}

    @cached_property
    def rotary(self) -> Rotary:
        return Rotary.of(self._network)

    @cached_property
    def dictionaries(self) -> DictionaryStore:
        """The dictionaries of this model. Raises: EngineError if none can be tied to it."""
        return DictionaryStore(folders(), fingerprint(self._network), model_name=self._name)

    def check(self, kind: DictionaryKind) -> None:
        self.dictionaries.check(kind)

    def dictionary(self, kind: DictionaryKind) -> DictionarySet:
        stored = self.dictionaries.find(kind)
        # A set that was learned anew replaces the one in use.
        if kind not in self._placed or self._placed[kind][0] is not stored:
            self._placed[kind] = stored, stored.to(next(self._network.parameters()).device)
        return self._placed[kind][1]


class StandInFacts(Facts):
    """Of a shape without weights: random dictionaries, the same at every call. For measuring speed and for tests."""

    def __init__(self, shape: ModelShape, *, device: torch.device | str = "cpu") -> None:
        self._shape, self._device = shape, device
        self._made: dict[DictionaryKind, DictionarySet] = {}

    @cached_property
    def rotary(self) -> Rotary:
        dim = self._shape.head_dim
        config = LlamaConfig(hidden_size=dim, num_attention_heads=1, num_key_value_heads=1, head_dim=dim)
        return Rotary.of(LlamaRotaryEmbedding(config).to(self._device))

    def dictionary(self, kind: DictionaryKind) -> DictionarySet:
        if kind not in self._made:
            heads, dim = self._shape.num_kv_heads, self._shape.head_dim
            noise = torch.Generator().manual_seed(2412_11741)
            sides = [
                [
                    normalize(torch.randn(kind.num_atoms, width, generator=noise), dim=1).to(self._device)
                    for _ in range(self._shape.num_layers)
                ]
                for width in (dim, dim // kind.value_parts)
            ]
            means = (
                [
                    [torch.randn(heads, dim, generator=noise).to(self._device) for _ in range(self._shape.num_layers)]
                    for _ in sides
                ]
                if kind.is_centred
                else [None, None]
            )
            self._made[kind] = DictionarySet(kind, *sides, key_means=means[0], value_means=means[1])
        return self._made[kind]
