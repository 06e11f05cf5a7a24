"""How graphs share memory, by torch's rules for it: a stand-in for `torch.cuda` keeps them where there is no GPU.

The rules are those of torch 2.11 (`CUDACachingAllocator::create_or_incref_pool`, `CUDAGraph::capture_end`,
`torch.cuda.graph`): a pool whose graphs are all gone takes no other; a capture that fails neither closes its pool nor
leaves its stream.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from itertools import count

import pytest
import torch

from kvlens.engine.graph import CudaCapture


class Cuda:
    """What `CudaCapture` uses of `torch.cuda`. `graphs_of` counts the live graphs of each pool."""

    def __init__(self) -> None:
        self.graphs_of: Counter[int] = Counter()
        self.open_pools: set[int] = set()
        self.current = "the caller's stream"
        self.modes: set[str] = set()
        self._handles = count()
        cuda = self

        class CUDAGraph:
            pool: int | None = None
            num_replays = 0

            def replay(self) -> None:
                self.num_replays += 1

            def __del__(self) -> None:
                if self.pool is not None:
                    cuda.graphs_of[self.pool] -= 1

        self.CUDAGraph = CUDAGraph

    def graph_pool_handle(self) -> int:
        return next(self._handles)

    def current_stream(self, device) -> str:
        return self.current

    @contextmanager
    def stream(self, stream: str):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, pool: int, capture_error_mode: str):
        assert pool not in self.graphs_of or self.graphs_of[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        assert pool not in self.open_pools, "already recording to mempool_id"
        self.open_pools.add(pool)
        self.modes.add(capture_error_mode)
        before, self.current = self.current, "the capture's stream"
        yield
        self.open_pools.remove(pool)
        self.graphs_of[pool] += 1
        graph.pool, self.current = pool, before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    for name in ("CUDAGraph", "graph", "graph_pool_handle", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return cuda


def refused() -> torch.Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_graphs_share_memory_for_as_long_as_one_lives(cuda):
    capture = CudaCapture(torch.device("cuda"))
    kept = [capture(lambda: torch.zeros(1)) for _ in range(2)]
    assert sorted(cuda.graphs_of.values()) == [2]
    kept.pop()
    kept.append(capture(lambda: torch.zeros(1)))
    assert sorted(cuda.graphs_of.values()) == [2]
    kept.clear()
    replay, _ = capture(lambda: torch.ones(1))
    assert sorted(cuda.graphs_of.values()) == [0, 1]
    replay()
    assert replay.__self__.num_replays == 1


def test_a_capture_that_fails_leaves_the_stream_and_the_next_one_alone(cuda):
    capture = CudaCapture(torch.device("cuda"))
    kept = [capture(lambda: torch.zeros(1))]
    with pytest.raises(RuntimeError, match="not permitted"):
        capture(refused)
    assert cuda.current == "the caller's stream"
    kept.append(capture(lambda: torch.zeros(1)))
    assert sorted(cuda.graphs_of.values()) == [1, 1]


def test_other_threads_may_use_the_gpu_meanwhile(cuda):
    CudaCapture(torch.device("cuda"))(lambda: torch.zeros(1))
    assert cuda.modes == {"thread_local"}
