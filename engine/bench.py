"""What decode steps are measured on: a whole network, or attention and cache alone on random tensors."""

from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from kvlens.engine.architectures import Architecture
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import EngineError
from kvlens.engine.facts import StandInFacts
from kvlens.engine.generate import forward_batch
from kvlens.engine.graph import CudaCapture, StepGraph
from kvlens.engine.measure import Stopwatch, last_cache_bytes
from kvlens.engine.model import LoadedModel
from kvlens.engine.registry import method
from kvlens.engine.shape import ModelShape

LAYER_BYTES = 256 * 2**20
"""An attention-only cell whose single layer is larger than this in fp16 is not measured."""


@dataclass(frozen=True)
class Candidate:
    """A method with its settings, under the name that figures give it."""

    label: str
    method: str
    config: MethodConfig


@dataclass(frozen=True)
class Cell:
    """What one measurement is about. `context_tokens` is the length of each sequence after the last step."""

    candidate: Candidate
    context_tokens: int
    batch_size: int


class Bench(Protocol):
    """What a cell is measured on. `scope` is "network" or "attention"; `max_context` in tokens."""

    name: str
    scope: str
    shape: ModelShape
    device: torch.device
    max_context: int

    def num_layers(self, cell: Cell) -> int:
        """How many layers are measured. Raises: ValueError where not even one can be."""

    def new_cache(self, cell: Cell, budget: MemoryBudget) -> KVCache:
        """An empty cache of that many layers. Raises: ValueError if the method does not serve the shape."""

    def prepare(self) -> None:
        """What has to happen before each step, outside its clock."""

    def step(self, cache: KVCache) -> float:
        """One decode step of the whole batch; milliseconds of all layers of the shape."""


class NetworkBench:
    """The whole network of a model, by the same decode step as a chat's."""

    scope = "network"

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.name, self.shape, self.device = model.name, model.shape, model.device
        self.max_context = model.max_context
        self._vocabulary = model.network.get_input_embeddings().num_embeddings

    def num_layers(self, cell: Cell) -> int:
        return self.shape.num_layers

    def new_cache(self, cell: Cell, budget: MemoryBudget) -> KVCache:
        candidate = cell.candidate
        return self.model.new_cache(candidate.method, candidate.config, batch_size=cell.batch_size, budget=budget)

    def prepare(self) -> None:
        pass

    def step(self, cache: KVCache) -> float:
        rows = [[(7 * (cache.seen_tokens(0) + row) + 3) % self._vocabulary] for row in range(cache.num_rows)]
        return forward_batch(self.model, cache, rows).milliseconds


class AttentionBench:
    """Attention and cache of an architecture, on random tensors: no weights, no projections, no sampling.

    Some of the layers stand for all: before each step the processor's cache is filled with something else, so
    that every layer is read from memory, as it is in a network whose weights pass in between.
    """

    scope = "attention"
    _STAND_IN_BYTES = 64 * 2**20
    _MAX_LAYERS = 8

    def __init__(self, architecture: Architecture, device: torch.device) -> None:
        self.name, self.shape, self.device = architecture.name, architecture.shape, device
        self.max_context = architecture.max_context
        is_cpu = device.type == "cpu"
        self._dtype = torch.float32 if is_cpu else torch.bfloat16
        self._cache_dtype = torch.float16 if is_cpu else torch.bfloat16
        self._filler = torch.zeros(last_cache_bytes(device) // 4, dtype=torch.int32, device=device)
        self._tokens: dict[tuple[int, int], torch.Tensor] = {}
        self._facts = StandInFacts(self.shape, device=device)
        self._capture = CudaCapture(device)
        self._graphs: WeakKeyDictionary[KVCache, StepGraph] = WeakKeyDictionary()

    def num_layers(self, cell: Cell) -> int:
        num_layers = self.shape.num_layers
        layer_bytes = self.shape.fp16_bytes(cell.context_tokens * cell.batch_size) // num_layers
        if layer_bytes > LAYER_BYTES:
            raise EngineError(
                f"One layer of this cell is {layer_bytes / 1e6:.0f} MB in fp16, and the lab takes up to "
                f"{LAYER_BYTES / 1e6:.0f} MB. Choose fewer tokens or a smaller batch."
            )
        return max(1, min(num_layers, self._MAX_LAYERS, self._STAND_IN_BYTES // layer_bytes))

    def new_cache(self, cell: Cell, budget: MemoryBudget) -> KVCache:
        shape, candidate = self.shape, cell.candidate
        measured = ModelShape(self.num_layers(cell), shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
        return method(candidate.method).cache(
            measured, candidate.config, batch_size=cell.batch_size, device=self.device, dtype=self._cache_dtype,
            budget=budget, facts=self._facts,
        )  # fmt: skip

    def prepare(self) -> None:
        self._filler.add_(1)

    def step(self, cache: KVCache) -> float:
        watch = Stopwatch()
        with torch.inference_mode(), watch.measure(self.device):
            self._take_step(cache)
        return watch.milliseconds * self.shape.num_layers / cache.shape.num_layers

    def _take_step(self, cache: KVCache) -> None:
        """As a network's step is taken: as one graph on a GPU, layer by layer elsewhere."""
        key = cache.next_step_key() if cache.steps_on_device else None
        if key is None:
            self._attend(cache)
            return
        if cache not in self._graphs:
            self._graphs[cache] = StepGraph(cache, self._attend, self._capture)
        self._graphs[cache].run(key)

    def _attend(self, cache: KVCache) -> torch.Tensor:
        """A token through every layer; what the last one gave."""
        query = self._token(cache.num_rows, cache.shape.num_query_heads)
        fresh = self._token(cache.num_rows, cache.shape.num_kv_heads)
        for layer in range(cache.shape.num_layers):
            output = cache.attend(layer, query, fresh, fresh, scaling=cache.shape.head_dim**-0.5)
        return output

    def _token(self, batch_size: int, num_heads: int) -> torch.Tensor:
        """A random token of every sequence. Shapes: `[B, H, 1, D]`."""
        size = (batch_size, num_heads, 1, self.shape.head_dim)
        key = (batch_size, num_heads)
        if key not in self._tokens:
            self._tokens[key] = torch.randn(size, device=self.device).to(self._dtype)
        return self._tokens[key]
