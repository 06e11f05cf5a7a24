"""Recall is compared question by question, and the exact cache against itself changes nothing."""

import pytest

from benchmarks.recall import (
    EXACT,
    Answers,
    answer_from,
    ask_all,
    ask_in_processes,
    paired,
    questions_of,
    read_prompt,
    rows_of,
)
from kvlens.engine.generate import generate
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.model import load_model

PROSE = "It was a fine morning on the hill. " * 400


@pytest.fixture(scope="module")
def model():
    return load_model(None, device="cpu")


def test_only_questions_that_change_count():
    exact = Answers([True] * 90 + [False] * 10, [16.0] * 100)
    packed = Answers([True] * 86 + [False] * 4 + [True] * 2 + [False] * 8, [2.5] * 100)
    row = paired("packed", 1000, packed, exact)
    assert (row.lost, row.gained, row.questions, row.bits_per_value) == (4, 2, 100, 2.5)
    assert row.points == pytest.approx(-2)
    # 6 of 100 questions change: 1.96 * sqrt((0.06 - 0.02^2) / 100).
    assert row.points_error == pytest.approx(4.784, abs=1e-3)
    assert (row.recall, row.exact_recall) == (0.88, 0.9)


def test_a_row_a_length_and_one_of_all():
    half, whole = Answers([True, False], [16.0, 16.0]), Answers([True, True], [16.0, 16.0])
    found = {500: {EXACT: whole, "packed": half}, 1000: {EXACT: whole, "packed": whole}}
    rows = [(row.method, row.prompt_tokens, row.questions, row.recall, row.lost) for row in rows_of(found)]
    assert rows == [
        (EXACT, 500, 2, 1.0, 0), (EXACT, 1000, 2, 1.0, 0), (EXACT, None, 4, 1.0, 0),
        ("packed", 500, 2, 0.5, 1), ("packed", 1000, 2, 1.0, 0), ("packed", None, 4, 0.75, 1),
    ]  # fmt: skip


def test_a_prompt_read_once_is_answered_as_by_the_engine(model):
    messages = [
        {"role": "user", "content": f"Read this: My locker code is 4821. {PROSE[:600]} What is my locker code?"}
    ]
    tokens = model.encode(model.render_chat(messages))
    prompt = read_prompt(model, messages)
    for method, config in (("dense", DenseConfig()), ("kivi", KiviConfig(residual_length=32))):
        cache = model.new_cache(method, config)
        said = [token for token in generate(model, cache, tokens, max_new_tokens=28) if token not in model.end_tokens]
        assert answer_from(model, method, config, prompt)[0] == model.decode(said)


def test_questions_are_of_the_length_asked_for_and_answered(model):
    questions = questions_of(model, PROSE, (200,), 10)
    assert len(questions[200]) == 10
    assert all(question.num_tokens <= 200 for question in questions[200])
    presets = {EXACT: ("dense", DenseConfig()), "again": ("dense", DenseConfig()),
               "packed": ("kivi", KiviConfig(residual_length=32))}  # fmt: skip
    found = ask_all(model, presets, questions[200])
    assert found[EXACT] == found["again"]
    assert any(found[EXACT].is_right)
    assert min(found[EXACT].bits_per_value) >= 16 > max(found["packed"].bits_per_value) > 2


def test_processes_share_the_questions_and_lose_none(model):
    questions = questions_of(model, PROSE, (150,), 5)[150]
    presets = {EXACT: ("dense", DenseConfig()), "packed": ("kivi", KiviConfig(residual_length=32))}
    alone, shared = ask_all(model, presets, questions), ask_in_processes(None, presets, questions, 2)
    order = [0, 2, 4, 1, 3]
    for title in presets:
        assert shared[title].is_right == [alone[title].is_right[index] for index in order]
