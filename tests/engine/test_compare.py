"""Lanes: turns, reuse, stops, and what is left behind."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from weakref import ref

import pytest
import torch

from kvlens.engine import compare
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.compare import Comparison, RunOptions
from kvlens.engine.errors import ContextFull, EngineError, OutOfMemory
from kvlens.engine.generate import generate, prefill
from kvlens.engine.lane import LaneSpec
from kvlens.engine.methods.dense import DenseCache, DenseConfig
from kvlens.engine.methods.kivi import KiviCache, KiviConfig
from kvlens.engine.trace import LaneLog, MachineMemory, RunLog, StepTrace

DENSE = LaneSpec("a", "dense", DenseConfig())
KIVI = LaneSpec("b", "kivi", KiviConfig(residual_length=32))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def last(runs) -> RunLog:
    *_, record = runs
    return record


def test_a_run_gives_each_lane_what_it_gives_alone(tiny_model):
    messages = [user("tell me about the sea " * 5)]
    options = RunOptions(max_new_tokens=40)
    both = last(Comparison(tiny_model).run(messages, [DENSE, KIVI], options))
    ids = tiny_model.encode(tiny_model.render_chat(messages))
    for lane, spec in zip(both.lanes, (DENSE, KIVI), strict=True):
        cache = tiny_model.new_cache(spec.method, spec.config)
        assert lane.token_ids == list(generate(tiny_model, cache, ids, max_new_tokens=40))
        assert lane.prompt_tokens == len(ids)
        assert lane.memory[-1].parts == cache.footprint().parts
        assert len(lane.memory) == len(lane.steps)
        assert all(step.step_ms > 0 for step in lane.steps)
        assert sum(probability for _, probability in lane.steps[0].alternatives) <= 1.0001
        assert lane.finish in ("end", "length")
    assert both.lanes[1].errors.by_token.shape[-1] == both.lanes[1].memory[-1].num_tokens


def test_a_second_turn_prefills_only_its_own_tokens(tiny_model):
    comparison = Comparison(tiny_model)
    first = last(comparison.run([user("hello there")], [DENSE, KIVI], RunOptions(max_new_tokens=50)))
    held = {lane.lane_id: comparison.lane(lane.lane_id).num_tokens for lane in first.lanes}
    messages = {
        lane.lane_id: [user("hello there"), {"role": "assistant", "content": lane.text}, user("and then?")]
        for lane in first.lanes
    }
    second = last(comparison.run(messages, [DENSE, KIVI], RunOptions(max_new_tokens=5)))
    for lane in second.lanes:
        assert lane.reused_tokens == held[lane.lane_id] > 40
        assert lane.prompt_tokens - lane.reused_tokens < 40


def test_no_lane_shows_its_last_answer_while_another_reads_the_next_prompt(tiny_model):
    comparison, stop = Comparison(tiny_model), threading.Event()
    last(comparison.run([user("hello there")], [DENSE, KIVI], RunOptions(max_new_tokens=3)))
    runs = comparison.run([user("and now something else")], [DENSE, KIVI], RunOptions(max_new_tokens=3), stop)
    waiting = next(runs).lanes[1]
    assert (waiting.steps, waiting.finish, waiting.prefill_ms) == ([], None, None)
    assert waiting.title.startswith("KIVI")
    assert waiting.prompt_tokens > 0
    stop.set()
    assert all(lane.text == "" and lane.finish == "stopped" for lane in last(runs).lanes)


def test_regenerating_prefills_nothing_and_gives_the_same_answer(tiny_model):
    comparison = Comparison(tiny_model)
    options = RunOptions(max_new_tokens=60, temperature=0.8, seed=5)
    first = last(comparison.run([user("x" * 90)], [DENSE, KIVI], options))
    again = last(comparison.run([user("x" * 90)], [DENSE, KIVI], options))
    assert [lane.token_ids for lane in again.lanes] == [lane.token_ids for lane in first.lanes]
    assert [lane.reused_tokens for lane in again.lanes] == [lane.prompt_tokens for lane in first.lanes]
    fresh = last(Comparison(tiny_model).run([user("x" * 90)], [DENSE, KIVI], options))
    assert [lane.token_ids for lane in fresh.lanes] == [lane.token_ids for lane in first.lanes]


def test_an_edited_prompt_goes_back_to_the_last_common_turn(tiny_model):
    comparison = Comparison(tiny_model)
    options = RunOptions(max_new_tokens=20)
    first = last(comparison.run([user("one")], [KIVI], options)).lanes[0]
    history = [user("one"), {"role": "assistant", "content": first.text}]
    last(comparison.run([*history, user("two " * 30)], [KIVI], options))
    edited = last(comparison.run([*history, user("three " * 30)], [KIVI], options)).lanes[0]
    assert edited.reused_tokens == first.prompt_tokens
    fresh = last(Comparison(tiny_model).run([user("one")], [KIVI], options)).lanes[0]
    assert fresh.token_ids == first.token_ids


def test_lanes_with_the_same_cache_never_part_even_when_sampling(tiny_model):
    twin = LaneSpec("b", "dense", DenseConfig())
    options = RunOptions(max_new_tokens=40, temperature=1.2, top_p=0.9, seed=9)
    run = last(Comparison(tiny_model).run([user("abc")], [DENSE, twin], options))
    assert run.lanes[0].token_ids == run.lanes[1].token_ids
    assert run.first_difference is None


def test_a_stop_ends_every_lane_and_keeps_the_caches(tiny_model):
    comparison, stop = Comparison(tiny_model), threading.Event()
    runs = comparison.run([user("go on")], [DENSE, KIVI], RunOptions(), stop)
    for _ in range(8):
        next(runs)
    stop.set()
    record = last(runs)
    assert [lane.finish for lane in record.lanes] == ["stopped", "stopped"]
    assert all(len(lane.steps) < 20 for lane in record.lanes)
    again = last(comparison.run([user("go on")], [DENSE, KIVI], RunOptions(max_new_tokens=3)))
    assert all(lane.reused_tokens == lane.prompt_tokens for lane in again.lanes)


def test_a_closed_run_in_the_middle_of_a_prompt_leaves_a_usable_lane(tiny_model, monkeypatch):
    monkeypatch.setattr("kvlens.engine.generate.PREFILL_CHUNK", 16)
    budget = MemoryBudget()
    comparison = Comparison(tiny_model, budget=budget)
    runs = comparison.run([user("y" * 300)], [KIVI], RunOptions(max_new_tokens=10))
    next(runs)
    runs.close()
    assert comparison.lane("b").cache.num_tokens == 0
    done = last(comparison.run([user("y" * 300)], [KIVI], RunOptions(max_new_tokens=10))).lanes[0]
    fresh = last(Comparison(tiny_model).run([user("y" * 300)], [KIVI], RunOptions(max_new_tokens=10))).lanes[0]
    assert done.token_ids == fresh.token_ids
    comparison.free()
    assert budget.used_bytes == 0


def test_changing_a_lane_frees_its_cache_and_leaves_the_other(tiny_model):
    budget = MemoryBudget()
    comparison = Comparison(tiny_model, budget=budget)
    options = RunOptions(max_new_tokens=5)
    last(comparison.run([user("z" * 200)], [DENSE, KIVI], options))
    other = LaneSpec("b", "kivi", KiviConfig(key_bits=4, value_bits=4))
    run = last(comparison.run([user("z" * 200)], [DENSE, other], options))
    assert run.lanes[0].reused_tokens == run.lanes[0].prompt_tokens
    assert run.lanes[1].reused_tokens == 0
    reserved = sum(comparison.lane(lane_id).cache.footprint().reserved_bytes for lane_id in "ab")
    assert budget.used_bytes == reserved


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], EngineError, "prompt is empty"),
        ([user("  \n")], EngineError, "prompt is empty"),
        ([user("w" * 2000)], ContextFull, "2,003 tokens and the context holds 1,024"),
    ],
)
def test_bad_prompts_are_sentences(tiny_model, messages, error, message):
    with pytest.raises(error, match=message):
        last(Comparison(tiny_model).run(messages, [DENSE]))


def test_a_context_that_fills_up_ends_the_answer_and_says_so(tiny_model):
    run = last(Comparison(tiny_model).run([user("w" * 990)], [DENSE], RunOptions(max_new_tokens=500)))
    lane = run.lanes[0]
    assert lane.finish in ("context", "end")
    assert lane.prompt_tokens + len(lane.steps) <= 1024


def test_a_budget_that_is_too_small_frees_everything(tiny_model):
    budget = MemoryBudget(100_000)
    comparison = Comparison(tiny_model, budget=budget)
    with pytest.raises(OutOfMemory, match="KV budget"):
        last(comparison.run([user("v" * 600)], [DENSE, KIVI]))
    assert budget.used_bytes == 0


def test_bad_options_are_sentences(tiny_model):
    with pytest.raises(EngineError, match="at least 1; got 0"):
        RunOptions(max_new_tokens=0)
    with pytest.raises(EngineError, match="between 0 and 1; got 7"):
        last(Comparison(tiny_model).run([user("x")], [DENSE], RunOptions(probed_layer=7)))
    with pytest.raises(EngineError, match="1 to 4 lanes with different names"):
        last(Comparison(tiny_model).run([user("x")], [DENSE, DENSE]))


def record_of(*answers: tuple[list[int], str | None]) -> RunLog:
    lanes = [
        LaneLog(str(index), "dense", "", steps=[StepTrace(token, "", 1.0, 0.0) for token in tokens], finish=finish)
        for index, (tokens, finish) in enumerate(answers)
    ]
    return RunLog("", "", "", 1, 1, 0, 100, lanes, MachineMemory(0))


def test_the_token_where_answers_part():
    assert record_of(([1, 2, 3], None), ([1, 2, 3], None)).first_difference is None
    assert record_of(([1, 2, 3], None), ([1, 5, 3], None)).first_difference == 1
    assert record_of(([1, 2], "end"), ([1, 2, 3], None)).first_difference == 2
    assert record_of(([1, 2], None), ([1, 2, 3], None)).first_difference is None


def test_a_device_that_runs_out_of_memory_frees_the_caches_and_the_next_run_works(tiny_model, monkeypatch):
    budget, calls = MemoryBudget(), []
    comparison = Comparison(tiny_model, budget=budget)
    run = tiny_model.short_step.run

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*arguments)

    monkeypatch.setattr(tiny_model.short_step, "run", failing)
    with pytest.raises(OutOfMemory, match="ran out of memory, and the caches of this chat were freed"):
        last(comparison.run([user("u" * 100)], [DENSE, KIVI]))
    assert budget.used_bytes == 0
    assert last(comparison.run([user("u" * 100)], [DENSE, KIVI], RunOptions(max_new_tokens=4))).lanes[0].finish


def test_a_lane_that_cannot_be_made_costs_the_others_nothing(tiny_model, monkeypatch):
    budget = MemoryBudget()
    comparison = Comparison(tiny_model, budget=budget)
    last(comparison.run([user("hello")], [DENSE, KIVI], RunOptions(max_new_tokens=3)))

    def failing(model, method_name, config):
        raise EngineError("no such dictionary")

    monkeypatch.setattr(compare, "warm_up", failing)
    with pytest.raises(EngineError, match="no such dictionary"):
        last(comparison.run([user("hello")], [DENSE, KIVI]))
    comparison.free()
    assert budget.used_bytes == 0


def test_a_dropped_cache_goes_at_once_without_a_collection_of_garbage(tiny_model):
    comparison = Comparison(tiny_model)
    last(comparison.run([user("hello")], [DENSE, KIVI], RunOptions(max_new_tokens=3)))
    caches = [ref(comparison.lane(lane_id).cache) for lane_id in "ab"]
    gc.collect()
    gc.disable()
    try:
        comparison.free()
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()


def test_an_answer_made_again_has_room_before_its_first_step(tiny_model):
    comparison = Comparison(tiny_model)
    last(comparison.run([user("hello")], [DENSE], RunOptions(max_new_tokens=3)))
    runs = comparison.run([user("hello")], [DENSE], RunOptions(max_new_tokens=900))
    next(runs)
    cache = comparison.lane("a").cache
    before = cache.footprint().reserved_bytes
    record = last(runs)
    assert cache.footprint().reserved_bytes == before
    assert len(record.lanes[0].memory) == len(record.lanes[0].steps)


def test_a_prompt_read_by_several_threads_leaves_no_thread_in_inference_mode(tiny_model):
    cache = tiny_model.new_cache("dense", DenseConfig())
    passes = prefill(tiny_model, cache, tiny_model.encode("u" * 1200))
    with ThreadPoolExecutor(1) as worker:
        worker.submit(next, passes).result()
        assert not worker.submit(torch.is_inference_mode_enabled).result()
        passes.close()
        assert not torch.is_inference_mode_enabled()


def test_no_memory_stays_behind_after_many_stopped_runs(tiny_model):
    budget = MemoryBudget()
    for _ in range(5):
        comparison = Comparison(tiny_model, budget=budget)
        runs = comparison.run([user("t" * 100)], [DENSE, KIVI])
        for _ in range(6):
            next(runs)
        runs.close()
        comparison.free()
    assert budget.used_bytes == 0
    caches = [each for each in gc.get_objects() if type(each) in (DenseCache, KiviCache) and each.budget is budget]
    assert not any(cache.footprint().reserved_bytes for cache in caches)
