"""Sequences that join and leave: each answers as it would alone, and memory comes back."""

import random

import pytest
import torch
from endless import CONFIGS, endless_model

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError, OutOfMemory
from kvlens.engine.generate import generate
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.rows import bucket
from kvlens.engine.sequences import Sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return endless_model(tmp_path_factory.mktemp("model"), device="cpu")


def alone(model, name: str, prompt: list[int], count: int) -> list[int]:
    cache = model.new_cache(name, CONFIGS[name])
    return list(generate(model, cache, prompt, max_new_tokens=count))


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(4, 90) for _ in range(draw.randrange(5, 90))] for _ in range(count)]


@pytest.mark.parametrize("name", CONFIGS)
def test_everybody_answers_as_if_alone(model, name):
    """Ten sequences come and go at three places; who leaves early disturbs nobody."""
    waiting = [(prompt, 3 + 7 * index % 40) for index, prompt in enumerate(prompts(10))]
    want = {index: alone(model, name, prompt, count) for index, (prompt, count) in enumerate(waiting, 1)}
    budget = MemoryBudget()
    batch = Sequences(model, name, CONFIGS[name], max_sequences=3, max_tokens=160, budget=budget)
    reserved = batch.reserved_bytes
    got, most = {}, 0
    while waiting or batch.answers:
        while waiting and batch.has_room(len(waiting[0][0]) + waiting[0][1]):
            prompt, count = waiting.pop(0)
            batch.join(prompt, max_new_tokens=count)
        most = max(most, len(batch.answers))
        got |= {number: answer.tokens for number, answer in batch.step().items()}
    assert most == 3
    assert got == want
    assert batch.reserved_bytes == reserved
    batch.free()
    assert budget.used_bytes == 0


def test_bytes_hold_more_sequences_of_a_smaller_method(model):
    """What is allocated stays within the bytes; KIVI holds more in it than the exact cache."""
    limit, held = 4 * 2**20, {}
    for name in ("dense", "kivi"):
        batch = Sequences(model, name, CONFIGS[name], max_sequences=64, max_tokens=512, limit_bytes=limit)
        assert 0.5 * limit < batch.reserved_bytes <= limit
        while batch.has_room(512):
            batch.join([5, 6, 7], max_new_tokens=509)
        held[name] = len(batch.answers)
        with pytest.raises(OutOfMemory, match="no room for another sequence of 512 tokens"):
            batch.join([5, 6, 7], max_new_tokens=509)
        assert len(batch.answers) == held[name]
        batch.leave(next(iter(batch.answers)))
        assert batch.has_room(512)
        batch.free()
    assert held["kivi"] > 2.5 * held["dense"]


def test_short_sequences_share_the_pages(model):
    """Room is given by what a sequence may grow to, not by the longest that is allowed."""
    config = KiviConfig(residual_length=32)
    batch = Sequences(model, "kivi", config, max_sequences=64, max_tokens=2048, limit_bytes=2 * 2**20)
    long = short = 0
    while batch.has_room(2048):
        batch.join([5, 6], max_new_tokens=2046)
        long += 1
    for number in batch.answers:
        batch.leave(number)
    while batch.has_room(64):
        batch.join([5, 6], max_new_tokens=62)
        short += 1
    assert short > 2 * long


def test_what_cannot_be_is_refused(model):
    with pytest.raises(OutOfMemory, match="do not hold one sequence of 100,000 tokens"):
        Sequences(model, "dense", DenseConfig(), max_sequences=2, max_tokens=100_000, limit_bytes=2**20)
    batch = Sequences(model, "dense", DenseConfig(), max_sequences=2, max_tokens=100)
    with pytest.raises(EngineError, match="at most 100 tokens in all; got 3 and 98"):
        batch.join([1, 2, 3], max_new_tokens=98)
    cache = model.new_cache("dense", DenseConfig())
    list(generate(model, cache, [5, 6], max_new_tokens=2))
    with pytest.raises(EngineError, match="only an empty cache"):
        cache.open(max_tokens=10)


def test_a_step_has_as_few_rows_as_hold_everybody(model):
    batch = Sequences(model, "kivi", CONFIGS["kivi"], max_sequences=20, max_tokens=64)
    numbers = [batch.join([5, 6, 7], max_new_tokens=60) for _ in range(5)]
    assert batch._cache.num_rows == bucket(5) == 8
    for number in numbers[1:]:
        batch.leave(number)
    assert batch._cache.num_rows == 1
    batch.step()
    assert [len(answer.tokens) for answer in batch.answers.values()] == [2]
    assert torch.equal(batch._cache.device_lengths, torch.full((2, 1), 4, dtype=torch.int32))
