"""The short way of a decode step: the network's own answers, for every family and every method."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvlens.engine import bridge
from kvlens.engine.errors import ModelError
from kvlens.engine.generate import forward, forward_batch, prefill
from kvlens.engine.lean import LeanStep
from kvlens.engine.model import load_model
from kvlens.engine.registry import available, method
from kvlens.engine.shape import ModelShape
from tests import tiny

NUM_STEPS = 40


LENGTHS = (30, 171, 1, 64, 129)
"""A ragged batch: some sequences have packed something, some have not; four are multiplied at once."""

PRESETS = [
    pytest.param(entry.name, config, id=preset)
    for entry in available().values()
    if entry.name in ("dense", "kivi", "csr")
    for preset, config in entry.presets.items()
]


def caches(network, name: str, config, count: int, **options):
    shape = ModelShape.of(network.config)
    return [method(name).cache(shape, config, dtype=torch.float32, **options) for _ in range(count)]


def served(family: str, **changes):
    network = tiny.network(family, **changes)
    for layer in network.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            if linear.bias is not None:
                torch.nn.init.normal_(linear.bias)
    bridge.install()
    network.set_attn_implementation(bridge.NAME)
    return network


def ragged_prompts() -> list[list[int]]:
    return [torch.randint(4, 100, (length,)).tolist() for length in LENGTHS]


def fill(network, cache, prompts: list[list[int]]) -> None:
    """All prompts at once, padded on the left."""
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with cache.prefill():
        network(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_ragged_batch_gets_the_logits_of_hugging_face_for_each_sequence(family):
    network = served(family)
    (ours,) = caches(network, "dense", available()["dense"].config(), 1, batch_size=len(LENGTHS))
    lean, prompts = LeanStep(network, torch.float32), ragged_prompts()
    with torch.inference_mode():
        fill(network, ours, prompts)
        got = torch.stack([lean.run(ours, [5 + step + row for row in range(len(LENGTHS))]) for step in range(6)])
        network.set_attn_implementation("eager")
        for row, prompt in enumerate(prompts):
            answer = [5 + step + row for step in range(6)]
            want = network(torch.tensor([prompt + answer])).logits[0, -6:]
            torch.testing.assert_close(got[:, row], want, atol=2e-4, rtol=2e-4)
    assert ours.lengths[0] == [length + 6 for length in LENGTHS]


@pytest.mark.parametrize(("name", "config"), PRESETS)
def test_a_ragged_batch_is_the_same_as_its_sequences_alone_and_as_the_networks_way(name, config, tiny_model):
    """Over so many steps that keys are packed in some sequences and not in others."""
    prompts = ragged_prompts()
    batches = [tiny_model.new_cache(name, config, batch_size=len(LENGTHS)) for _ in range(2)]
    alone = [tiny_model.new_cache(name, config) for _ in LENGTHS]
    slow = replace(tiny_model, short_step=None)
    with torch.inference_mode():
        for cache in batches:
            fill(tiny_model.network, cache, prompts)
        for cache, prompt in zip(alone, prompts, strict=True):
            fill(tiny_model.network, cache, [prompt])
    for step in range(NUM_STEPS):
        rows = [[5 + (7 * step + row) % 80] for row in range(len(LENGTHS))]
        got, want = (
            forward_batch(model, cache, rows).logits for model, cache in zip((tiny_model, slow), batches, strict=True)
        )
        each = torch.stack([forward(tiny_model, cache, row).logits for cache, row in zip(alone, rows, strict=True)])
        if step < 20:  # 16-bit rounding to a neighbour feeds on itself
            torch.testing.assert_close(got, each, atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert batches[0].lengths == batches[1].lengths
    assert batches[0].footprint().parts == batches[1].footprint().parts
    for row, cache in enumerate(alone):
        tiles = [past.rebuild(1, number, 0, 20) for past, number in ((batches[0], row), (cache, 0))]
        assert cache.lengths[1][0] == batches[0].lengths[1][row]
        torch.testing.assert_close(tiles[0].keys[:, :1], tiles[1].keys[:, :1], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("preset", ["fp16, exact", "KIVI-2 (paper)", "CSR compact, 2 bit", "CSR look-up, 2 bit"])
def test_these_methods_join_the_native_call(preset, tiny_model, monkeypatch):
    (name, config) = next(
        (entry.name, entry.presets[preset]) for entry in available().values() if preset in entry.presets
    )
    cache = tiny_model.new_cache(name, config)
    monkeypatch.setattr(type(cache), "step", None)  # whoever asks a layer fails
    *_, _ = prefill(tiny_model, cache, [token % 90 + 4 for token in range(150)])
    monkeypatch.setattr("kvlens.kernels.dense_attend.is_fastest_in_a_program", lambda problem: True)
    assert forward(tiny_model, cache, [7]).logits.isfinite().all()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_gets_the_logits_of_its_network(family):
    network = served(family)
    ours, theirs = caches(network, "dense", available()["dense"].config(), 2)
    lean = LeanStep(network, torch.float32)
    prompt = torch.randint(4, 100, (1, 30))
    with torch.inference_mode():
        for cache in (ours, theirs):
            network(prompt, past_key_values=cache)
        for token in range(4, 4 + NUM_STEPS):
            want = network(torch.tensor([[token]]), past_key_values=theirs).logits[0, -1]
            torch.testing.assert_close(lean.run(ours, [token])[0], want, atol=1e-4, rtol=1e-4)
    assert ours.lengths == theirs.lengths
    assert ours.seen_tokens(0) == theirs.seen_tokens(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_read_in_the_bits_they_are_stored_in_only_if_nothing_is_lost(dtype):
    network = served("llama")
    exact = LeanStep(network, dtype)
    assert exact.extra_bytes == 0  # random fp32 weights do not come back from 16 bits
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype).float()
    short = LeanStep(network, dtype)
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 2)
    assert short.extra_bytes == 2 * matrices
    ours, theirs = caches(network, "dense", available()["dense"].config(), 2)
    with torch.inference_mode():
        want = LeanStep(network, torch.float32).run(theirs, [7])
        torch.testing.assert_close(short.run(ours, [7]), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "config"), PRESETS)
def test_every_cache_is_the_same_after_both_ways(name, config, tiny_model, monkeypatch):
    """Bytes, lengths and what is stored; a probe sees the same blocks."""
    prompt = [token % 90 + 4 for token in range(150)]
    found = []
    for lean in (tiny_model.short_step, None):
        monkeypatch.setattr(tiny_model, "short_step", lean)
        cache = tiny_model.new_cache(name, config)
        probe = cache.watch(1)
        *_, _ = prefill(tiny_model, cache, prompt)
        logits = [forward(tiny_model, cache, [5 + step % 80]).logits for step in range(NUM_STEPS + 130)]
        found.append((torch.stack(logits), cache, probe.snapshot(cache)))
    (ours, our_cache, our_errors), (theirs, their_cache, their_errors) = found
    assert our_cache.lengths == their_cache.lengths
    assert our_cache.footprint().parts == their_cache.footprint().parts
    torch.testing.assert_close(ours[:20], theirs[:20], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        torch.from_numpy(our_errors.by_head), torch.from_numpy(their_errors.by_head), atol=5e-3, rtol=5e-2,
        equal_nan=True,
    )  # fmt: skip
    assert (our_errors.by_token != our_errors.by_token).sum() == (their_errors.by_token != their_errors.by_token).sum()


def test_a_cache_that_moves_its_tensors_is_followed(tiny_model):
    """No room is reserved ahead: buffers grow in the middle of the answer."""
    config = available()["dense"].config()
    cache, wide = (tiny_model.new_cache("dense", config) for _ in range(2))
    wide.reserve(1000)
    for past in (cache, wide):
        *_, _ = prefill(tiny_model, past, [5] * 250)
    for step in range(300):
        got, want = (forward(tiny_model, past, [5 + step % 80]).logits for past in (cache, wide))
        assert torch.equal(got, want)


def test_a_network_that_is_not_known_is_declined_with_the_reason():
    with pytest.raises(ModelError, match="gpt2"):
        LeanStep(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)), None)
    with pytest.raises(ModelError, match="gelu"):
        LeanStep(served("llama", hidden_act="gelu"), None)


def test_a_model_without_a_short_way_says_so_and_answers(tmp_path):
    model = load_model(tiny.save(tmp_path, hidden_act="gelu"), device="cpu")
    assert model.short_step is None
    assert any("gelu" in notice for notice in model.notices)
    cache = model.new_cache("dense", available()["dense"].config())
    *_, result = prefill(model, cache, [5, 6, 7])
    assert forward(model, cache, [8]).logits.shape == result.logits.shape
