"""Steps as graphs: what a replay computes. A recorder stands in for the GPU, Triton's interpreter for its kernels.

The interpreter must be chosen before kernels are defined, so this file runs itself in a process of its own.
"""

import os
import subprocess
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_steps_as_graphs_in_the_interpreter():
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "KERNELS": "triton"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]

else:
    import gc
    from unittest import mock

    import torch
    from recorded import RecordedCapture

    from kvlens.engine import bridge
    from kvlens.engine.facts import StandInFacts
    from kvlens.engine.graph import GraphStep
    from kvlens.engine.methods.csr import CsrConfig
    from kvlens.engine.methods.dense import DenseConfig
    from kvlens.engine.methods.kivi import KiviConfig
    from kvlens.engine.registry import method
    from kvlens.engine.shape import ModelShape
    from tests import tiny

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

    CONFIGS = {
        "dense": ("dense", DenseConfig()),
        "kivi": ("kivi", KiviConfig(residual_length=32)),
        "kivi with sinks, values in blocks": ("kivi", KiviConfig(residual_length=32, num_sinks=3, value_flush=8)),
        "csr before RoPE": ("csr", CsrConfig(num_atoms=256, num_sinks=2, window=16, flush=8)),
        "csr after RoPE": ("csr", CsrConfig(num_atoms=256, keys="after RoPE", is_centred=False, window=16, flush=8)),
    }
    LENGTHS = (30, 27)
    """Prompts of a ragged batch: windows fill at different steps."""

    CLOSE = {"atol": 2e-2, "rtol": 2e-2}
    """Keys and values are rounded to 16 bits, sometimes to a neighbour."""

    @pytest.fixture(scope="module")
    def network():
        bridge.install()
        network = tiny.network("llama", num_hidden_layers=1)
        network.set_attn_implementation(bridge.NAME)
        return network

    def filled(network, name: str, config, batch_size: int = len(LENGTHS)):
        """A cache with a ragged batch of prompts, the same at every call."""
        shape = ModelShape.of(network.config)
        cache = method(name).cache(shape, config, batch_size=batch_size, facts=StandInFacts(shape))
        cache.reserve(128)
        draw = torch.Generator().manual_seed(3)
        ids = torch.randint(4, 90, (batch_size, max(LENGTHS)), generator=draw)
        padding = torch.tensor(
            [[column >= max(LENGTHS) - length for column in range(max(LENGTHS))] for length in LENGTHS]
        )
        with torch.inference_mode():
            network(ids, past_key_values=cache, attention_mask=padding[:batch_size])
        cache.end_prefill()
        return cache

    def plain(network, cache, tokens: list[int]) -> torch.Tensor:
        """A step by the network alone, on the reference of every kernel. Shapes: `[B, V]`."""
        positions = torch.tensor(cache.lengths[0]).unsqueeze(1)
        with torch.inference_mode(), mock.patch.dict(os.environ, KERNELS="reference"):
            ids = torch.tensor(tokens).unsqueeze(1)
            return network(ids, past_key_values=cache, position_ids=positions).logits[:, -1]

    def stored(cache) -> list[torch.Tensor]:
        return [
            side
            for layer, lengths in enumerate(cache.lengths)
            for row, length in enumerate(lengths)
            for side in (cache.rebuild(layer, row, 0, length).keys, cache.rebuild(layer, row, 0, length).values)
        ]

    def refuse(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    @pytest.mark.parametrize("label", CONFIGS)
    def test_a_replayed_step_is_the_networks_own(network, label):
        replayed, by_itself, slow = (filled(network, *CONFIGS[label]) for _ in range(3))
        capture = RecordedCapture()
        graph, eager = GraphStep(network, capture), GraphStep(network, refuse)
        with torch.inference_mode():
            for index in range(12):
                tokens = [5 + index, 50 - index]
                got = graph.run(replayed, tokens)
                torch.testing.assert_close(got, eager.run(by_itself, tokens), atol=0, rtol=0)
                torch.testing.assert_close(got, plain(network, slow, tokens), **CLOSE)
                assert replayed.lengths == by_itself.lengths == slow.lengths
                assert replayed.parts() == by_itself.parts() == slow.parts()
        assert graph.reason(replayed) is None
        assert (capture.num_captures, capture.num_replays) == (1, 10)
        for mine, same, other in zip(stored(replayed), stored(by_itself), stored(slow), strict=True):
            torch.testing.assert_close(mine, same, atol=0, rtol=0)
            assert (mine - other).norm() <= 0.02 * other.norm()

    @pytest.mark.parametrize("label", ["dense", "kivi"])
    def test_a_cache_goes_back_and_on_between_replays(network, label):
        name, config = CONFIGS[label]
        ours, theirs = (filled(network, name, config) for _ in range(2))
        step = GraphStep(network, RecordedCapture())
        with torch.inference_mode():
            for _ in range(4):
                step.run(ours, [7, 8])
            moment = ours.checkpoint()
            for _ in range(3):
                step.run(ours, [60, 61])
            ours.rollback(moment)
            for _ in range(4):
                plain(network, theirs, [7, 8])
            # A step by the network, which reads what replays have left, then graphs again.
            torch.testing.assert_close(
                plain(network, ours, [5, 6]), plain(network, theirs, [5, 6]), atol=2e-3, rtol=2e-3
            )
            for _ in range(3):
                got, want = step.run(ours, [11, 12]), plain(network, theirs, [11, 12])
                torch.testing.assert_close(got, want, **CLOSE)

    def test_grown_tensors_are_captured_anew(network):
        cache = filled(network, *CONFIGS["kivi"])
        capture = RecordedCapture()
        step = GraphStep(network, capture)
        with torch.inference_mode():
            for _ in range(3):
                step.run(cache, [7, 8])
            cache.reserve(512)
            for _ in range(3):
                step.run(cache, [7, 8])
        assert capture.num_captures == 2

    def test_a_network_that_asks_the_device_takes_its_steps_by_itself(network, monkeypatch):
        ours, theirs = (filled(network, *CONFIGS["kivi"]) for _ in range(2))
        forward = network.forward

        def asking(ids, **options):
            ids.max().item()
            return forward(ids, **options)

        step = GraphStep(network, RecordedCapture())
        with torch.inference_mode():
            for _ in range(4):
                monkeypatch.setattr(network, "forward", asking)
                got = step.run(ours, [7, 8])
                monkeypatch.undo()
                torch.testing.assert_close(got, plain(network, theirs, [7, 8]), **CLOSE)
        assert "not permitted" in step.reason(ours)

    def test_a_graph_goes_with_its_cache(network):
        step = GraphStep(network, RecordedCapture())
        cache = filled(network, *CONFIGS["kivi"])
        with torch.inference_mode():
            for _ in range(3):
                step.run(cache, [7, 8])
        assert len(step._bound) == 1
        del cache
        gc.collect()
        assert len(step._bound) == 0
