"""The small parts: merging segments, sampling, text, storage, estimates."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvlens.engine import segments
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError, OutOfMemory
from kvlens.engine.estimate import bits_per_value, estimate
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.registry import available, method
from kvlens.engine.sampling import Sampling, choose
from kvlens.engine.segments import Tile, attend_tile, merge_all
from kvlens.engine.shape import ModelShape
from kvlens.engine.storage import PagePool, Ring
from kvlens.engine.text import TextStream
from tests import tiny

LLAMA_8B = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=4), num_queries=st.integers(1, 5),
    group=st.sampled_from([1, 3]), size=st.sampled_from([0.1, 1.0, 50.0]),
)  # fmt: skip
def test_merged_segments_are_one_softmax(cuts, num_queries, group, size):
    generator = torch.Generator().manual_seed(sum(cuts))
    total = sum(cuts) + num_queries
    keys, values = (torch.randn(2, total, 8, generator=generator) for _ in range(2))
    query = size * torch.randn(2 * group, num_queries, 8, generator=generator)
    bounds = [0, *torch.tensor(cuts).cumsum(0).tolist()]
    partials = [
        attend_tile(query, Tile(keys[:, start:stop], values[:, start:stop]), scaling=0.3)
        for start, stop in pairwise(bounds)
    ]
    own = Tile(keys[:, bounds[-1] :], values[:, bounds[-1] :])
    partials.append(attend_tile(query, own, scaling=0.3, is_causal=True))
    mask = torch.ones(num_queries, total, dtype=torch.bool).tril(total - num_queries)
    want = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(merge_all(partials).output, want, atol=1e-5, rtol=1e-5)


def test_many_queries_are_split_without_a_difference(monkeypatch):
    query, keys = torch.randn(2, 37, 8), torch.randn(2, 50, 8)
    whole = attend_tile(query, Tile(keys, keys), scaling=1.0, is_causal=True)
    monkeypatch.setattr(segments, "SCORE_BYTES", 4 * 2 * 50 * 10)
    split = attend_tile(query, Tile(keys, keys), scaling=1.0, is_causal=True)
    torch.testing.assert_close(split.output, whole.output)
    torch.testing.assert_close(split.log_sum_exp, whole.log_sum_exp)


def test_sampling_follows_the_distribution_and_repeats_with_its_seed():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = [choose(logits, Sampling(temperature=1.0, seed=3), step) for step in range(4000)]
    frequency = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    torch.testing.assert_close(frequency, logits.softmax(dim=-1), atol=0.03, rtol=0)
    assert draws[:50] == [choose(logits, Sampling(temperature=1.0, seed=3), step) for step in range(50)]
    assert draws[:50] != [choose(logits, Sampling(temperature=1.0, seed=4), step) for step in range(50)]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = {choose(logits, Sampling(temperature=1.0, top_p=0.75), step) for step in range(300)}
    assert draws == {0, 1}
    assert {choose(logits, Sampling(temperature=1.0, top_p=0.01), step) for step in range(50)} == {0}
    assert choose(logits, Sampling(), 0) == 0


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.1}])
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(EngineError, match="got"):
        Sampling(**bad)


def test_text_never_shows_half_a_character():
    tokenizer = tiny.tokenizer()
    text = "naïve café 😀 done"
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_pool_keeps_pages_when_it_grows_and_reuses_what_is_given_back():
    budget = MemoryBudget(100_000)
    allocated = []

    def allocate(*size, dtype):
        tensor = torch.empty(size, dtype=dtype)
        budget.take(tensor.nbytes)
        allocated.append(tensor)
        return tensor

    pool = PagePool(
        {"codes": ((3, 4), torch.int16)}, allocate=allocate, discard=lambda tensor: budget.give(tensor.nbytes)
    )
    first = pool.take(2)
    pool.tensors["codes"][first] = torch.arange(24, dtype=torch.int16).view(2, 3, 4)
    pool.take(50)
    assert pool.tensors["codes"][first].flatten().tolist() == list(range(24))
    pool.give(first)
    assert pool.take(2) == first
    assert pool.num_used == 52
    assert budget.used_bytes == pool.tensors["codes"].nbytes
    with pytest.raises(OutOfMemory):
        pool.take(10_000)
    assert pool.num_used == 52


@pytest.mark.parametrize("start", [0, 5, 13])
def test_ring_reads_back_the_newest(start):
    ring = Ring(torch.full((1, 1, 8, 1), torch.nan))
    tokens = torch.arange(start, start + 20.0).view(1, 20, 1)
    ring.write(0, start, tokens[:, :3])
    ring.write(0, start + 3, tokens[:, 3:])
    assert ring.read(0, start + 12, start + 20).flatten().tolist() == tokens[0, 12:, 0].tolist()
    assert ring.read(0, start + 15, start + 17).flatten().tolist() == tokens[0, 15:17, 0].tolist()
    with pytest.raises(ValueError, match="ring of 8 tokens cannot give 9"):
        ring.read(0, 0, 9)


def test_estimate_needs_no_model_and_scales_with_the_batch():
    dense = estimate(LLAMA_8B, "dense", DenseConfig(), num_tokens=131_072)
    assert dense.parts["window"] == 16 * 2**30
    kivi = estimate(LLAMA_8B, "kivi", KiviConfig(), num_tokens=131_072, batch_size=2)
    assert 3.0 < bits_per_value(kivi, LLAMA_8B) < 3.05
    with pytest.raises(EngineError, match="at least 1; got 0"):
        estimate(LLAMA_8B, "kivi", KiviConfig(), num_tokens=0)
    with pytest.raises(EngineError, match="kivi takes a KiviConfig; got DenseConfig"):
        estimate(LLAMA_8B, "kivi", DenseConfig(), num_tokens=5)


def test_methods_are_listed_with_what_the_page_draws():
    assert next(iter(available())) == "dense"
    for entry in available().values():
        assert entry.title
        assert entry.summary
        assert entry.source
        assert all(isinstance(preset, entry.config) for preset in entry.presets.values())
        for field in entry.config.__dataclass_fields__.values():
            assert field.metadata["label"]
            assert field.metadata["help"]
    with pytest.raises(ValueError, match="method must be one of dense, csr, kivi"):
        method("magic")


def test_shapes_that_do_not_group_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        ModelShape(1, 3, 2, 8)
    with pytest.raises(ValueError, match="num_layers must be at least 1; got 0"):
        ModelShape(0, 2, 2, 8)
