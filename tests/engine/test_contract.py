"""What every method must do, whatever it stores: run over all of `available()`."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from kvlens.engine import bridge
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError, OutOfMemory
from kvlens.engine.facts import StandInFacts
from kvlens.engine.generate import generate
from kvlens.engine.registry import available, method
from kvlens.engine.shape import ModelShape
from tests import tiny

SHAPE = ModelShape(num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=32)

CONFIGS = [
    pytest.param(entry.name, config, id=f"{entry.name}:{preset}")
    for entry in available().values()
    for preset, config in entry.presets.items()
]

FACTS = StandInFacts(SHAPE)
"""Random dictionaries: what holds for a method holds for any."""

SCALING = SHAPE.head_dim**-0.5


def make(name, config, **options):
    return method(name).cache(SHAPE, config, facts=FACTS, **options)


def tokens(count: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values, with one large key channel as in a real model."""
    query = torch.randn(batch_size, SHAPE.num_query_heads, count, SHAPE.head_dim)
    keys = torch.randn(batch_size, SHAPE.num_kv_heads, count, SHAPE.head_dim)
    keys[..., 3] *= 8
    # Exact tokens are kept in 16 bits; what is appended is rounded, so that every path sees the same.
    return query, keys.half().float(), torch.randn_like(keys).half().float()


def dense_answer(cache, layer: int, query: torch.Tensor) -> torch.Tensor:
    """One softmax over everything that the cache rebuilds. Shapes: `[B, HQ, T, D]`."""
    answers = []
    for row, length in enumerate(cache.lengths[layer]):
        tile = cache.rebuild(layer, row, 0, length)
        answers.append(
            scaled_dot_product_attention(
                query[row], tile.keys.float(), tile.values.float(), enable_gqa=True, scale=SCALING
            )
        )
    return torch.stack(answers)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_prompt_attends_exactly_and_steps_see_what_the_cache_rebuilds(name, config, poisoned):
    cache = make(name, config)
    query, keys, values = tokens(300)
    for layer in range(SHAPE.num_layers):
        got = cache.attend(layer, query, keys, values, scaling=SCALING)
        exact = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True, scale=SCALING)
        torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-5)
    cache.end_prefill()
    for _ in range(150):
        query, keys, values = tokens(1)
        for layer in range(SHAPE.num_layers):
            before = cache.lengths[layer][0]
            past = cache.rebuild(layer, 0, 0, before)
            everything = [
                torch.cat([side.float(), new[0]], dim=1) for side, new in ((past.keys, keys), (past.values, values))
            ]
            want = scaled_dot_product_attention(query[0], *everything, enable_gqa=True, scale=SCALING)
            got = cache.attend(layer, query, keys, values, scaling=SCALING)
            torch.testing.assert_close(got[0], want, atol=2e-3, rtol=2e-3)
            assert cache.lengths[layer][0] == before + 1


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_live_bytes_equal_the_formula_at_every_length(name, config):
    cache = make(name, config)
    for count in (1, 30, 1, 100, 60, 1, 1, 130, 40, 1):
        query, keys, values = tokens(count)
        for layer in range(SHAPE.num_layers):
            cache.attend(layer, query, keys, values, scaling=SCALING)
        cache.end_prefill()
        footprint = cache.footprint()
        assert footprint.parts == config.estimate(SHAPE, cache.num_tokens)
        assert footprint.live_bytes <= footprint.reserved_bytes


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_several_new_tokens_attend_to_a_packed_past(name, config):
    cache = make(name, config)
    first, later = tokens(290), tokens(17)
    cache.attend(0, *first, scaling=SCALING)
    cache.end_prefill()
    past = cache.rebuild(0, 0, 0, 290)
    got = cache.attend(0, *later, scaling=SCALING)
    query, keys, values = later
    mask = torch.ones(17, 307, dtype=torch.bool).tril(290)
    want = scaled_dot_product_attention(
        query[0], torch.cat([past.keys.float(), keys[0]], dim=1),
        torch.cat([past.values.float(), values[0]], dim=1), attn_mask=mask, enable_gqa=True, scale=SCALING,
    )  # fmt: skip
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
    cache.end_prefill()
    assert cache.lengths[0] == [307]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_chunks_of_a_prompt_give_the_same_cache_as_the_whole(name, config):
    query, keys, values = tokens(301)
    whole, chunked = make(name, config), make(name, config)
    whole.attend(0, query, keys, values, scaling=SCALING)
    whole.end_prefill()
    with chunked.prefill():
        outputs = [
            chunked.attend(0, query[:, :, part], keys[:, :, part], values[:, :, part], scaling=SCALING)
            for part in (slice(0, 128), slice(128, 300), slice(300, 301))
        ]
    exact = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True, scale=SCALING)
    torch.testing.assert_close(torch.cat(outputs, dim=2), exact, atol=1e-5, rtol=1e-5)
    for side in ("keys", "values"):
        left, right = (getattr(cache.rebuild(0, 0, 0, 301), side) for cache in (whole, chunked))
        torch.testing.assert_close(left, right, atol=0, rtol=0)


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_ragged_batch_equals_its_rows_alone(name, config):
    counts = (1, 140, 299)
    query, keys, values = tokens(max(counts), batch_size=len(counts))
    mask = torch.arange(max(counts)) >= max(counts) - torch.tensor(counts).unsqueeze(-1)
    batch = make(name, config, batch_size=len(counts))
    batch.attend(0, query, keys, values, scaling=SCALING, mask=mask)
    alone = [make(name, config) for _ in counts]
    for row, (cache, count) in enumerate(zip(alone, counts, strict=True)):
        cache.attend(0, query[row : row + 1, :, -count:], keys[row : row + 1, :, -count:],
                     values[row : row + 1, :, -count:], scaling=SCALING)  # fmt: skip
    for _ in range(140):
        query, keys, values = tokens(1, batch_size=len(counts))
        together = batch.attend(0, query, keys, values, scaling=SCALING, mask=None)
        for row, cache in enumerate(alone):
            part = slice(row, row + 1)
            single = cache.attend(0, query[part], keys[part], values[part], scaling=SCALING)
            torch.testing.assert_close(together[part], single, atol=2e-3, rtol=2e-3)
    assert batch.lengths[0] == [count + 140 for count in counts]
    per_row = [cache.footprint().parts for cache in alone]
    summed = {part: sum(parts[part] for parts in per_row) for part in per_row[0]}
    assert {part: size for part, size in batch.footprint().parts.items() if part != "tables"} == {
        part: size for part, size in summed.items() if part != "tables"
    }


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_rollback_restores_every_token_exactly(name, config):
    cache = make(name, config)
    for count in (270, 1, 1, 1):
        for layer in range(SHAPE.num_layers):
            cache.attend(layer, *tokens(count), scaling=SCALING)
        cache.end_prefill()
    moment = cache.checkpoint()
    before = cache.rebuild(1, 0, 0, 273)
    footprint = cache.footprint()
    for _ in range(2):
        for count in [180, *[1] * 150]:
            for layer in range(SHAPE.num_layers):
                cache.attend(layer, *tokens(count), scaling=SCALING)
        cache.rollback(moment)
        after = cache.rebuild(1, 0, 0, 273)
        torch.testing.assert_close(after.keys, before.keys, atol=0, rtol=0)
        torch.testing.assert_close(after.values, before.values, atol=0, rtol=0)
        assert cache.footprint().parts == footprint.parts
        assert cache.lengths == [[273], [273]]


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_free_gives_every_byte_back_and_a_full_budget_refuses(name, config):
    budget = MemoryBudget(64 * 2**20)
    cache = make(name, config, budget=budget)
    cache.attend(0, *tokens(300), scaling=SCALING)
    cache.end_prefill()
    assert budget.used_bytes == cache.footprint().reserved_bytes > 0
    cache.free()
    cache.free()
    assert budget.used_bytes == 0
    assert cache.footprint().live_bytes == 0
    small = make(name, config, budget=MemoryBudget(1000))
    small.attend(0, *tokens(300), scaling=SCALING)
    with pytest.raises(OutOfMemory, match="KV budget"):
        small.end_prefill()


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_huggingface_generate_gives_the_tokens_of_our_own_loop(name, config, tiny_model):
    prompt = [token % 90 + 4 for token in range(200)]
    ours = list(generate(tiny_model, tiny_model.new_cache(name, config), prompt, max_new_tokens=60))
    ids = torch.tensor([prompt])
    theirs = tiny_model.network.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=tiny_model.new_cache(name, config),
        max_new_tokens=60, do_sample=False,
    )[0, len(prompt) :]  # fmt: skip
    assert ours == theirs.tolist()


@pytest.mark.parametrize(("name", "config"), CONFIGS)
def test_left_padded_batch_generates_what_each_prompt_does_alone(name, config, tiny_model):
    prompts = [[5, 6, 7, 8] * 40, [9, 10, 11]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    together = tiny_model.network.generate(
        ids, attention_mask=mask, past_key_values=tiny_model.new_cache(name, config, batch_size=2),
        max_new_tokens=20, do_sample=False, eos_token_id=[],
    )[:, longest:]  # fmt: skip
    for row, prompt in enumerate(prompts):
        single = torch.tensor([prompt])
        alone = tiny_model.network.generate(
            single, attention_mask=torch.ones_like(single), past_key_values=tiny_model.new_cache(name, config),
            max_new_tokens=20, do_sample=False, eos_token_id=[],
        )[0, len(prompt) :]  # fmt: skip
        assert together[row].tolist() == alone.tolist()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_exact_cache_gives_the_logits_of_the_models_own_cache(family):
    network = tiny.network(family)
    ids = torch.randint(4, 100, (2, 50))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    shape = ModelShape.of(network.config)
    dense = available()["dense"]
    cache = dense.cache(shape, dense.config(), batch_size=2, dtype=torch.float32)
    bridge.install()
    answers = []
    for implementation, past in (
        (bridge.NAME, cache),
        (bridge.NAME, DynamicCache()),
        ("eager", DynamicCache()),
    ):
        network.set_attn_implementation(implementation)
        answers.append(
            network.generate(ids, attention_mask=mask, past_key_values=past, max_new_tokens=12, do_sample=False,
                             output_logits=True, return_dict_in_generate=True)
        )  # fmt: skip
    ours, plain, eager = (torch.stack(answer.logits) for answer in answers)
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, eager, atol=1e-4, rtol=1e-4)
    assert answers[0].sequences.tolist() == answers[2].sequences.tolist()


def test_what_a_packed_cache_cannot_do_is_said():
    cache = make("dense", available()["dense"].config())
    for call in (
        lambda: cache.crop(1),
        lambda: cache.reorder_cache(None),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(EngineError):
            call()
    with pytest.raises(ValueError, match="holds 1 sequences; got a batch of 2"):
        cache.attend(0, *tokens(3, batch_size=2), scaling=SCALING)
