"""The one contract of a KV cache: what a method must be able to do, and what it gets for free.

A `KVCache` owns the keys and values of all layers of a batch of sequences. It is a `transformers.Cache`:
`model.generate(..., past_key_values=cache)` works with it as it is. It does not know models, prompts or
screens; `registry.py` lists the methods, `bridge.py` hands Hugging Face attention to `attend`.

Life of a sequence: prompt tokens are appended in one or more chunks and attend exactly; `end_prefill`
hands the exact tokens to the method, which packs what it packs; from then on each token is appended and
attended to in one `step`, straight from the packed form.

A method implements `reserve`, `store`, `rebuild`, `parts`, `tensors`, `save`, `restore` and `release`; it
overrides `step` where it has a kernel. Joining and leaving is in `rows.py`, everything else here.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvlens.engine.atoms import CodedVectors
from kvlens.engine.budget import CacheMemory, MemoryBudget
from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import EngineError
from kvlens.engine.facts import Facts
from kvlens.engine.footprint import CacheView, Footprint, storage_bytes, tensors_in
from kvlens.engine.layer import LayerHandle, TransformersCache
from kvlens.engine.probe import ErrorProbe
from kvlens.engine.prompt import WaitingPrompt
from kvlens.engine.rows import OpenRows
from kvlens.engine.segments import TILE_TOKENS, Tile, attend_exact, attend_tile, merge_all
from kvlens.engine.shape import ModelShape
from kvlens.kernels import dispatch


@dataclass(frozen=True)
class Checkpoint:
    """A moment of a cache to go back to: lengths, and what the method must remember of its window.

    `saved` is the method's own; `num_bytes` what it occupies.
    """

    lengths: list[int]
    seen_tokens: int
    saved: Any
    num_bytes: int
    probe: Any = None


class KVCache(TransformersCache, OpenRows):
    """Keys and values of all layers of `batch_size` sequences, in the form of one method.

    `dtype` is the type of what is kept exact: 16 bits, so that every lane is compared on equal terms.
    `facts` is what a method may ask of the model beyond its shape; methods that need none do without.
    `lengths[layer][row]` counts the tokens of a sequence that are stored (without pending prompt tokens
    and without padding); `seen_tokens` counts the columns of the batch, padding included, as
    transformers does.
    """

    name = ""

    def __init__(
        self,
        shape: ModelShape,
        config: MethodConfig,
        *,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
        budget: MemoryBudget | None = None,
        facts: Facts | None = None,
    ) -> None:
        config.check(shape)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        TransformersCache.__init__(self, layers=[LayerHandle(self, layer) for layer in range(shape.num_layers)])
        OpenRows.__init__(self, batch_size)
        self.shape = shape
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.budget = budget or MemoryBudget()
        self._memory = CacheMemory(self.device, self.budget)
        self.allocate, self.discard = self._memory.allocate, self._memory.discard
        self.facts = facts
        self.probe: ErrorProbe | None = None
        self.lengths = [[0] * batch_size for _ in range(shape.num_layers)]
        self._seen = [0] * shape.num_layers
        self._waiting = self._no_prompt()
        self._is_in_prefill = self._is_on_device = False
        self._checkpoint_bytes = 0

    # ------------------------------------------------------------------ what a method implements

    @abstractmethod
    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens a sequence. Raises: OutOfMemory."""

    @abstractmethod
    def store(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep exact tokens behind those stored, packing what the method packs.

        Shapes: keys, values `[HK, T, D]`. `lengths` still counts the tokens before them.
        """

    @abstractmethod
    def rebuild(self, layer: int, row: int, start: int, stop: int) -> Tile:
        """Tokens start..stop-1 as attention sees them. Shapes: `[HK, stop - start, D]`."""

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Live bytes by part of everything stored."""

    @abstractmethod
    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor the cache holds, for `reserved_bytes`."""

    @abstractmethod
    def save(self) -> Any:
        """What `restore` needs to return to this moment, beside the lengths: tensors in tuples or lists."""

    @abstractmethod
    def restore(self, saved: Any, lengths: list[int]) -> None:
        """Forget what came after `saved`; each row then has `lengths[row]` tokens in every layer."""

    @abstractmethod
    def release(self) -> None:
        """Drop every tensor. The cache is then empty and can be used again."""

    def step(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        """Append one token to each row and attend to everything. Shapes: `[B, HQ|HK, D]` → `[B, HQ, D]`.

        This one rebuilds tile by tile: right for every method, fast for none.
        """
        output = torch.empty_like(query)
        for row in range(self.num_rows):
            newest = Tile(keys[row].unsqueeze(1), values[row].unsqueeze(1))
            output[row] = self._attend_past(layer, row, query[row].unsqueeze(1), [newest], scaling=scaling).squeeze(1)
            self.store(layer, row, newest.keys, newest.values)
            self.lengths[layer][row] += 1
        return output

    def step_key(self) -> Hashable | None:
        """Names the tensors that a prepared step would use now; None where the next step cannot be prepared.

        Steps are prepared as `step_tasks` on a CPU, and as a graph of `step_on_device` on a GPU.
        """
        return None

    def step_tasks(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, output: torch.Tensor, *,
        scaling: float,
    ) -> list[Any]:  # fmt: skip
        """`step` as tasks of a native program (`kernels/native/program.py`), from and to these fp32 tensors."""
        raise NotImplementedError(f"{self.name} gives a step_key() and has no step_tasks()")

    def step_on_device(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float
    ) -> torch.Tensor:
        """`step` by what lies on the device alone, whose lengths already count the new token.

        It reads and changes nothing of the host, so that a graph of it may be run again and again.
        """
        raise NotImplementedError(f"{self.name} gives a step_key() on a GPU and has no step_on_device()")

    def view(self, layer: int, head: int, row: int = 0) -> CacheView:
        """One head as attention sees it, as numpy arrays."""
        tile = self.rebuild(layer, row, 0, self.lengths[layer][row])
        return CacheView(tile.keys[head].float().cpu().numpy(), tile.values[head].float().cpu().numpy())

    def coded_vectors(self, layer: int, side: int, row: int = 0) -> CodedVectors | None:
        """The coded keys (side 0) or values of a layer as sums of atoms; None for a method without sparse codes."""
        return None

    @cached_property
    def steps_on_device(self) -> bool:
        """Whether a prepared step is a graph of `step_on_device`: where Triton kernels run."""
        return dispatch.runs_triton("append_pack", self.device)

    @property
    def device_lengths(self) -> torch.Tensor:
        """Tokens of each sequence by layer, as kernels read them. Shapes: int32 `[L, B]`."""
        raise NotImplementedError(f"{self.name} keeps no lengths on the device")

    @property
    def shared_bytes(self) -> int:
        """Bytes that all caches of the model read and none owns, such as learned dictionaries."""
        return 0

    @property
    def attention_path(self) -> str:
        """What computes a step's attention, in words for the screen."""
        return "rebuilt tile by tile (no kernel yet)"

    # ------------------------------------------------------------------ the life of a sequence

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append new tokens to `layer` and attend causally to everything up to each of them.

        Shapes: query `[B, HQ, T, D]`, keys and values `[B, HK, T, D]`, mask bool `[B, seen + T]` or None
        (False is padding; padded tokens are never stored); output `[B, HQ, T, D]`, zero where padded.
        Raises: ValueError if the batch is not the cache's.
        """
        if query.shape[0] != self.num_rows:
            raise ValueError(f"the cache holds {self.num_rows} sequences; got a batch of {query.shape[0]}")
        num_tokens = query.shape[2]
        if self._is_on_device:
            output = self.step_on_device(layer, query[:, :, 0], keys[:, :, 0], values[:, :, 0], scaling=scaling)
            return output.unsqueeze(2)
        self._seen[layer] += num_tokens
        if num_tokens == 1 and not self._is_in_prefill:
            self._end_prefill(layer)
            self.reserve(max(self.lengths[layer]) + 1)
            output = self.step(layer, query[:, :, 0], keys[:, :, 0], values[:, :, 0], scaling=scaling)
            return output.unsqueeze(2)
        valid = None if mask is None else mask[:, -num_tokens:]
        if valid is not None and bool(valid.all()):
            valid = None
        return self._attend_prompt(layer, query, Tile(keys, values), valid, scaling=scaling)

    def begin_step(self) -> Hashable | None:
        """One token of each sequence comes next, in every layer: by `step`, or prepared if this gives a key.

        What was prepared for a key, tasks or a graph of `step_on_device`, may be run again as long as the key
        stays the same; `end_tasks` follows it.
        """
        key = self.next_step_key()
        self._seen = [seen + 1 for seen in self._seen]
        return key

    def next_step_key(self) -> Hashable | None:
        """What `begin_step` would give now, without beginning a step."""
        self.rest_idle_rows()
        self.end_prefill()
        self.reserve(max(self.lengths[0]) + 1)
        return self.step_key()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within it a token of each sequence is counted on the device, and `attend` is `step_on_device`."""
        self.device_lengths.add_(1)
        self._is_on_device = True
        try:
            yield
        finally:
            self._is_on_device = False

    def end_tasks(self) -> None:
        """A prepared step has run: bring up to date what the host knows."""
        for lengths in self.lengths:
            lengths[:] = [length + 1 for length in lengths]
        self.rest_idle_rows()

    def observe(self) -> None:
        """Hand the probe what the last step packed, if a method has put that off to after the clock."""

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add prompt tokens that come from no forward pass; `end_prefill` packs them. Shapes: `[B, HK, T, D]`."""
        if keys.shape[0] != self.num_rows:
            raise ValueError(f"the cache holds {self.num_rows} sequences; got a batch of {keys.shape[0]}")
        self._seen[layer] += keys.shape[2]
        self._waiting.add_batch(layer, keys, values)

    @property
    def is_in_prefill(self) -> bool:
        return self._is_in_prefill

    @contextmanager
    def prefill(self) -> Iterator[None]:
        """Within it every chunk counts as prompt, even one of a single token; at its end all is packed.

        If it is left by an error or a stop, the chunks so far are forgotten.
        """
        self._is_in_prefill = True
        seen = list(self._seen)
        try:
            yield
        except BaseException:
            self._waiting, self._seen = self._no_prompt(), seen
            raise
        else:
            self.end_prefill()
        finally:
            self._is_in_prefill = False

    def end_prefill(self) -> None:
        """Hand the exact prompt tokens of every layer to the method. Without any, nothing happens."""
        if self._waiting.waits():
            for layer in range(self.shape.num_layers):
                self._end_prefill(layer)

    def checkpoint(self) -> Checkpoint:
        """This moment, to come back to with `rollback`. Raises: EngineError in the middle of a prompt."""
        if self._waiting.waits():
            raise EngineError("a checkpoint cannot be taken in the middle of a prompt; call end_prefill() first")
        saved = self.save()
        num_bytes = storage_bytes(tensors_in(saved))
        self._checkpoint_bytes += num_bytes
        probe = None if self.probe is None else self.probe.save(self)
        return Checkpoint(list(self.lengths[0]), self._seen[0], saved, num_bytes, probe)

    def rollback(self, checkpoint: Checkpoint) -> None:
        """Return to `checkpoint`; it stays valid and may be used again."""
        self._waiting = self._no_prompt()
        self.restore(checkpoint.saved, checkpoint.lengths)
        self.lengths = [list(checkpoint.lengths) for _ in range(self.shape.num_layers)]
        self._seen = [checkpoint.seen_tokens] * self.shape.num_layers
        if self.probe is not None and checkpoint.probe is not None:
            self.probe.restore(checkpoint.probe)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Say that `checkpoint` is dropped, so that its bytes are no longer counted."""
        self._checkpoint_bytes -= checkpoint.num_bytes

    def free(self) -> None:
        """Drop everything and give the budget back. Safe to call twice."""
        self.release()
        self.close()
        self.lengths = [[0] * self.num_rows for _ in range(self.shape.num_layers)]
        self._seen = [0] * self.shape.num_layers
        self._waiting = self._no_prompt()
        self._checkpoint_bytes = 0
        self.probe = None
        self._memory.give_back()

    # ------------------------------------------------------------------ looking at it

    def seen_tokens(self, layer: int) -> int:
        """Columns of the batch so far, padding included."""
        return self._seen[layer]

    @property
    def num_tokens(self) -> int:
        """Tokens stored or waiting in the first layer, over all sequences."""
        return sum(self.lengths[0]) + sum(self._waiting.lengths(0))

    def footprint(self) -> Footprint:
        """Bytes by part from the real tensors. Prompt tokens that are still exact count as window."""
        parts = self.parts()
        waiting = list(self._waiting.tensors())
        if waiting:
            exact = sum(tensor.numel() for tensor in waiting)
            parts["window"] = parts.get("window", 0) + exact * self.dtype.itemsize
        held = [*self.tensors(), *waiting]
        probe_bytes = 0 if self.probe is None else self.probe.nbytes
        return Footprint(
            self.num_tokens, parts, storage_bytes(held), self._checkpoint_bytes, probe_bytes, self.shared_bytes
        )

    def watch(self, layer: int = 0) -> ErrorProbe:
        """Measure errors at every flush from now on, and keep exact copies of `layer`. One sequence only."""
        self.probe = ErrorProbe(self.shape, layer, device=self.device)
        return self.probe

    # ------------------------------------------------------------------ inside

    def _no_prompt(self) -> WaitingPrompt:
        return WaitingPrompt(self.shape.num_layers, self.num_rows)

    def _attend_prompt(
        self, layer: int, query: torch.Tensor, fresh: Tile, valid: torch.Tensor | None, *, scaling: float
    ) -> torch.Tensor:
        is_first = not any(self.lengths[layer]) and not self._waiting.waits(layer)
        if valid is None and is_first:
            self._waiting.add_batch(layer, fresh.keys, fresh.values)
            return scaled_dot_product_attention(
                query, fresh.keys, fresh.values, is_causal=query.shape[2] > 1, scale=scaling,
                enable_gqa=self.shape.num_query_heads != self.shape.num_kv_heads,
            )  # fmt: skip
        output = torch.zeros_like(query)
        for row in range(self.num_rows):
            kept = slice(None) if valid is None else valid[row].nonzero().squeeze(-1)
            tile = Tile(fresh.keys[row, :, kept], fresh.values[row, :, kept])
            if tile.keys.shape[1]:
                self._waiting.add(layer, row, tile)
                asked, exact = query[row, :, kept], self._waiting.of(layer, row)
                output[row, :, kept] = (
                    self._attend_past(layer, row, asked, exact, scaling=scaling)
                    if self.lengths[layer][row]
                    else attend_exact(asked, exact, scaling=scaling)
                )
        return output

    def _attend_past(
        self, layer: int, row: int, query: torch.Tensor, exact: list[Tile], *, scaling: float
    ) -> torch.Tensor:
        """`query` over everything stored and the `exact` tiles, the last of which are the queries' own."""
        length = self.lengths[layer][row]
        starts = range(0, length, TILE_TOKENS)
        stored = (self.rebuild(layer, row, start, min(start + TILE_TOKENS, length)) for start in starts)
        partials = (attend_tile(query, tile, scaling=scaling) for tile in chain(stored, exact[:-1]))
        newest = attend_tile(query, exact[-1], scaling=scaling, is_causal=True)
        return merge_all(chain(partials, [newest])).output.to(query.dtype)

    def _end_prefill(self, layer: int) -> None:
        if not self._waiting.waits(layer):
            return
        waiting = self._waiting.lengths(layer)
        self.reserve(max(length + more for length, more in zip(self.lengths[layer], waiting, strict=True)))
        for row, count in enumerate(waiting):
            if count:
                tile = self._waiting.take(layer, row)
                self.store(layer, row, tile.keys, tile.values)
                self.lengths[layer][row] += count
