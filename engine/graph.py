"""A decode step on a GPU as one CUDA graph: one token of each sequence through an unmodified network.

At batch 1 a step through transformers is bound by launches, not by bytes: thousands of small kernels, each sent from
Python. A graph sends them all at once. What it holds may read only the device: tokens and positions lie in
fixed tensors, lengths are counted there, the cache's `step_on_device` decides there what is packed.

A step is captured once for every set of tensors that a cache has had (its `step_key`); the first step of a set runs
by itself and warms everything up. A network that cannot be captured, because it asks the device something on the way,
takes every step by itself, and `reason` says why.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from transformers import PreTrainedModel

from kvlens.engine.cache import KVCache

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""From a body of work to what repeats it, and the tensor in which its result then lies. Nothing has run yet."""


class CudaCapture:
    """Captures on one GPU. All graphs share their scratch memory: no two run at once, and results are copied out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, body: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """Raises: RuntimeError for a body that asks the device something."""
        # The inner stream is not left where a capture fails; the outer one is, and gives the caller's back.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            if not self._graphs:  # torch takes no graph into memory whose graphs are all gone
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the GPU, and allocating.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = body()
            except RuntimeError:
                self._graphs = WeakSet()  # nor into memory that a failed capture never closed
                raise
        self._graphs.add(graph)
        return graph.replay, result


class StepGraph:
    """Steps of one cache on the device: the first by itself, the others as a graph. It does not keep the cache alive.

    `reason` says why they are not a graph, where they cannot be one.
    """

    def __init__(self, cache: KVCache, body: Callable[[KVCache], torch.Tensor], capture: Capture) -> None:
        self.reason: str | None = None
        self._cache = ref(cache)
        self._body = body
        self._capture = capture
        self._key: Hashable = None
        self._graph: tuple[Replay, torch.Tensor] | None = None

    def run(self, key: Hashable) -> torch.Tensor:
        """A step, for which the cache gave `key`. What the body gave is valid until the next step of any cache."""
        cache = self._cache()
        cache.begin_step()
        result = self._run(key)
        cache.end_tasks()
        return result

    def _run(self, key: Hashable) -> torch.Tensor:
        if key != self._key:
            self._key, self._graph = key, None
            return self._on_device()
        if self._graph is None and self.reason is None:
            try:
                self._graph = self._capture(self._on_device)
            except RuntimeError as error:
                self.reason = str(error).strip().partition("\n")[0]
        if self._graph is None:
            return self._on_device()
        replay, result = self._graph
        replay()
        return result

    def _on_device(self) -> torch.Tensor:
        cache = self._cache()
        with cache.on_device():
            return self._body(cache)


class GraphStep:
    """The short way of a network on a GPU. One graph for each cache, dropped with it."""

    extra_bytes = 0

    def __init__(self, network: PreTrainedModel, capture: Capture | None = None) -> None:
        self._network = network
        self._capture = capture or CudaCapture(network.device)
        self._bound: WeakKeyDictionary[KVCache, _Bound] = WeakKeyDictionary()

    def run(self, cache: KVCache, tokens: Sequence[int]) -> torch.Tensor:
        """Logits after `tokens`, one of which joins each sequence of `cache`. Shapes: `[B, V]`."""
        key = cache.next_step_key()
        bound = self._bound.get(cache)
        if bound is None or bound.num_rows != len(tokens):
            bound = self._bound[cache] = _Bound(self._network, cache, self._capture)
        return bound.run(cache, tokens, key)

    def reason(self, cache: KVCache) -> str | None:
        """Why steps over `cache` are no graph; None where they are, or none was taken yet."""
        bound = self._bound.get(cache)
        return None if bound is None else bound.graph.reason


class _Bound:
    """Fixed tensors for one cache's tokens and positions, and the graph that reads them."""

    def __init__(self, network: PreTrainedModel, cache: KVCache, capture: Capture) -> None:
        self.num_rows = cache.num_rows
        self._inputs = torch.zeros(2, cache.num_rows, 1, dtype=torch.int64, device=network.device)
        # Of the network and the inputs alone: a method would keep this object, and the network, in a cycle.
        self._pass_over = partial(_pass_over, network, self._inputs)
        self.graph = StepGraph(cache, self._pass_over, capture)

    def run(self, cache: KVCache, tokens: Sequence[int], key: Hashable) -> torch.Tensor:
        self._inputs.copy_(torch.tensor([list(tokens), cache.lengths[0]]).unsqueeze(-1))
        return self._pass_over(cache) if key is None else self.graph.run(key).clone()


def _pass_over(network: PreTrainedModel, inputs: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The network's own forward over the tokens and positions in `inputs`. Shapes: int64 `[2, B, 1]` → `[B, V]`."""
    ids, positions = inputs
    return network(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits[:, -1]
