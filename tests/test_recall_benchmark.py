"""Recall is compared question by question, and the exact cache against itself changes nothing."""

import pytest

from benchmarks.recall import Answers, answer_all, paired, questions_of, together
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.model import load_model

PROSE = "It was a fine morning on the hill. " * 400


@pytest.fixture(scope="module")
def model():
    return load_model(None, device="cpu")


def test_only_questions_that_change_count():
    exact = Answers([True] * 90 + [False] * 10, 16.0)
    packed = Answers([True] * 86 + [False] * 4 + [True] * 2 + [False] * 8, 2.5)
    row = paired("packed", 1000, packed, exact)
    assert (row.lost, row.gained, row.questions) == (4, 2, 100)
    assert row.points == pytest.approx(-2)
    # 6 of 100 questions change: 1.96 * sqrt((0.06 - 0.02^2) / 100).
    assert row.points_error == pytest.approx(4.784, abs=1e-3)
    assert (row.recall, row.exact_recall) == (0.88, 0.9)
    assert together([exact, packed]).is_right == exact.is_right + packed.is_right
    assert together([exact, packed]).bits_per_value == 9.25


def test_questions_are_answered_by_the_model_from_its_cache(model):
    questions = questions_of(model, PROSE, (200,), 10)
    assert len(questions[200]) == 10
    assert all(question.num_tokens <= 200 for question in questions[200])
    exact, again, packed = (
        answer_all(model, name, config, questions[200])
        for name, config in (("dense", DenseConfig()), ("dense", DenseConfig()),
                             ("kivi", KiviConfig(residual_length=32)))
    )  # fmt: skip
    assert exact == again
    assert any(exact.is_right)
    assert exact.bits_per_value > 16 > packed.bits_per_value > 2
