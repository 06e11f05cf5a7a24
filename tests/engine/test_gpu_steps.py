"""Steps as CUDA graphs on a GPU, as the recorder's tests promise them (test_graph.py)."""

import pytest
import torch
from endless import CONFIGS, endless_model

from kvlens.engine.generate import forward_batch, prefill
from kvlens.engine.sequences import Sequences

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return endless_model(tmp_path_factory.mktemp("model"), device="cuda", dtype="float16")


def test_the_model_takes_its_steps_as_graphs(model):
    assert model.short_step is not None, model.notices


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_gives_the_networks_logits(model, name):
    ours, theirs = (model.new_cache(name, CONFIGS[name]) for _ in range(2))
    for cache in (ours, theirs):
        *_, _ = prefill(model, cache, list(range(5, 45)))
    step, model.short_step = model.short_step, None
    try:
        for index in range(60):
            want = forward_batch(model, theirs, [[5 + index % 60]]).logits
            with torch.inference_mode():
                got = step.run(ours, [5 + index % 60])
            torch.testing.assert_close(got, want, atol=5e-2, rtol=5e-2)
            assert ours.lengths == theirs.lengths
            assert ours.parts() == theirs.parts()
    finally:
        model.short_step = step
    assert step.reason(ours) is None


@pytest.mark.parametrize("name", ["dense", "kivi"])
def test_a_replay_waits_for_nothing_and_allocates_nothing(model, name):
    cache = model.new_cache(name, CONFIGS[name])
    *_, _ = prefill(model, cache, list(range(5, 45)))
    cache.reserve(256)
    with torch.inference_mode():
        for _ in range(3):
            model.short_step.run(cache, [7])
        bound = model.short_step._bound[cache]
        key = cache.next_step_key()
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                bound.graph.run(key)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_join_and_leave_a_graph(model, name):
    batch = Sequences(model, name, CONFIGS[name], max_sequences=6, max_tokens=160)
    prompts = [list(range(5 + index, 30 + 5 * index)) for index in range(5)]
    numbers = [batch.join(prompt, max_new_tokens=40) for prompt in prompts]
    for _ in range(10):
        batch.step()
    batch.leave(numbers[1])
    later = batch.join(prompts[1], max_new_tokens=40)
    for _ in range(10):
        batch.step()
    answers = batch.answers
    assert [len(answers[number].tokens) for number in (numbers[0], later)] == [21, 11]
    assert torch.isfinite(forward_batch(model, batch._cache, [[7]] * batch._cache.num_rows).logits).all()
    batch.free()
