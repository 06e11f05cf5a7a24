"""Several lanes on one prompt: the same model and noise, different caches, one step each in turn.

Lanes take turns on the device and each step is timed by itself, so that neither spoils the other's
tokens/s. Between the rounds, outside every clock, errors are measured and the record is handed out.
"""

import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import ContextFull, EngineError, OutOfMemory
from kvlens.engine.lane import Lane, LaneSpec
from kvlens.engine.measure import machine_memory
from kvlens.engine.model import LoadedModel
from kvlens.engine.sampling import Sampling
from kvlens.engine.trace import RunLog
from kvlens.engine.warm_up import warm_up
from kvlens.kernels import dispatch

Messages = Sequence[dict[str, str]]

MAX_LANES = 4

LOOK_SECONDS = 0.25
"""Errors are looked at this often at most, and for at most a fifth of the time."""


@dataclass(frozen=True)
class RunOptions:
    """How a run goes. Raises: EngineError for values out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    probed_layer: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EngineError(f"The most new tokens must be at least 1; got {self.max_new_tokens}")
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed)


class Comparison:
    """The lanes of one visitor. Caches live between turns until `free`; not safe from several threads at once."""

    def __init__(self, model: LoadedModel, *, budget: MemoryBudget | None = None) -> None:
        self.model = model
        self._budget = budget
        self._lanes: dict[str, Lane] = {}

    def run(
        self,
        messages: Messages | Mapping[str, Messages],
        lanes: Sequence[LaneSpec],
        options: RunOptions | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[RunLog]:
        """Answer the last message in every lane; yields the same growing record after every round.

        `messages` are one conversation, or one for each lane id: each lane goes on with its own answers.
        `stop` ends the run at the next step; closing the iterator does so too. Caches then stay as they
        are, for the next turn.
        Raises: EngineError (also as ContextFull, OutOfMemory) before or during the run; after an
        OutOfMemory the lanes hold no cache.
        """
        options, stop = options or RunOptions(), stop or threading.Event()
        texts = self._render(messages, lanes)
        try:
            self._prepare(lanes, options)
            yield from self._run(self._encode(texts), options, stop)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.free()
            raise OutOfMemory(
                "The device ran out of memory, and the caches of this chat were freed. "
                "Shorten the chat, ask for fewer new tokens or compress more."
            ) from error
        except OutOfMemory:
            self.free()
            raise

    def free(self) -> None:
        """Drop every cache. Safe to call twice."""
        for lane in self._lanes.values():
            lane.free()
        self._lanes = {}

    def lane(self, lane_id: str) -> Lane:
        """The lane called `lane_id`, for looking at its cache. Raises: KeyError if it has not run."""
        return self._lanes[lane_id]

    # ------------------------------------------------------------------ inside

    def _render(self, messages: Messages | Mapping[str, Messages], lanes: Sequence[LaneSpec]) -> dict[str, str]:
        """The conversation of each lane as text, checked."""
        ids = [spec.lane_id for spec in lanes]
        if not 1 <= len(ids) <= MAX_LANES or len(set(ids)) != len(ids):
            raise EngineError(f"A run takes 1 to {MAX_LANES} lanes with different names; got {ids}")
        texts = {}
        for lane_id in ids:
            own = messages[lane_id] if isinstance(messages, Mapping) else messages
            if not own or own[-1]["role"] != "user" or not own[-1]["content"].strip():
                raise EngineError("The prompt is empty. Write something to answer.")
            texts[lane_id] = self.model.render_chat(own)
        return texts

    def _encode(self, texts: dict[str, str]) -> dict[str, list[int]]:
        """The prompt of each lane as tokens that fit the context."""
        prompts = {lane_id: self._lanes[lane_id].encode(text) for lane_id, text in texts.items()}
        longest = max(map(len, prompts.values()))
        if longest >= self.model.max_context:
            raise ContextFull(
                f"The conversation has {longest:,} tokens and the context holds "
                f"{self.model.max_context:,}, answer included. Shorten the prompt or clear the chat."
            )
        return prompts

    def _prepare(self, specs: Sequence[LaneSpec], options: RunOptions) -> None:
        """Keep the lanes whose settings are unchanged, make the others anew."""
        if not 0 <= options.probed_layer < self.model.shape.num_layers:
            raise EngineError(
                f"The layer must lie between 0 and {self.model.shape.num_layers - 1}; got {options.probed_layer}"
            )
        wanted = {spec.lane_id: spec for spec in specs}
        for lane_id in list(self._lanes):
            if lane_id not in wanted or self._lanes[lane_id].spec != wanted[lane_id]:
                self._lanes.pop(lane_id).free()
        kept, self._lanes = self._lanes, {}
        try:
            for lane_id, spec in wanted.items():
                warm_up(self.model, spec.method, spec.config)
                self._lanes[lane_id] = kept.pop(lane_id, None) or Lane(
                    self.model, spec, probed_layer=options.probed_layer, budget=self._budget
                )
        finally:
            # Where one lane cannot be made, the others stay and are freed with the rest.
            self._lanes |= kept

    def _run(self, prompts: dict[str, list[int]], options: RunOptions, stop: threading.Event) -> Iterator[RunLog]:
        room = {lane_id: self.model.max_context - len(ids) for lane_id, ids in prompts.items()}
        limits = {lane_id: min(options.max_new_tokens, room[lane_id]) for lane_id in prompts}
        record, glance = None, _Glance()
        for lane_id, lane in self._lanes.items():
            lane.begin(len(prompts[lane_id]))
        for lane_id, lane in self._lanes.items():
            start = lane.start(prompts[lane_id], max_new_tokens=limits[lane_id], probed_layer=options.probed_layer)
            with closing(start):
                for _ in start:
                    record = self._record(record)
                    yield record
                    if stop.is_set():
                        break
            if stop.is_set():
                break
        record = self._record(record)
        sampling = options.sampling()
        while not stop.is_set() and (running := [lane for lane in self._lanes.values() if not lane.log.finish]):
            for lane in running:
                lane.advance(sampling)
                if not lane.log.finish and len(lane.log.steps) >= limits[lane.spec.lane_id]:
                    is_cut = limits[lane.spec.lane_id] < options.max_new_tokens
                    lane.log.finish = "context" if is_cut else "length"
                if stop.is_set():
                    break
            glance.maybe(self._look, record)
            yield record
        for lane in self._lanes.values():
            lane.log.finish = lane.log.finish or "stopped"
        self._look(record)
        yield record

    def _record(self, record: RunLog | None) -> RunLog:
        model = self.model
        if record is None:
            record = RunLog(
                run_id=uuid.uuid4().hex[:12],
                model=model.name,
                device=model.device_name,
                fp16_bytes_per_token=model.shape.fp16_bytes(1),
                values_per_token=model.shape.values_per_token,
                weight_bytes=model.weight_bytes,
                max_context=model.max_context,
                lanes=[],
                machine=machine_memory(model.device),
                notices=[*dispatch.notices(), *model.notices],
            )
        record.lanes = [lane.log for lane in self._lanes.values()]
        return record

    def _look(self, record: RunLog) -> None:
        for lane in self._lanes.values():
            lane.look()
        record.machine = machine_memory(self.model.device)


class _Glance:
    """Calls something now and then: never before LOOK_SECONDS, and for at most a fifth of the time."""

    def __init__(self) -> None:
        self._due = 0.0

    def maybe(self, look, *arguments) -> None:
        begin = time.perf_counter()
        if begin >= self._due:
            look(*arguments)
            end = time.perf_counter()
            self._due = end + max(LOOK_SECONDS, 4 * (end - begin))
