"""Append-and-pack: its definition against whole histories, its rule by hand, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from any_append import check_any_append
from append_checks import AppendCase, append_cases, build_append, check_append

from kvlens.kernels.append_pack import FlushRule, append_pack
from kvlens.kernels.packed_attend import PackedPast

CASE = AppendCase("case", (40, 31), num_sinks=2)


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("KERNELS", "reference")


def step_of(*arguments):
    return lambda: append_pack(*arguments)


@pytest.mark.parametrize("case", append_cases(), ids=lambda case: case.name)
def test_the_reference_gives_what_the_history_gives(case):
    check_append(case, step_of)


def test_the_reference_on_any_layout():
    check_any_append(step_of, max_examples=60)


def test_the_rule_by_hand():
    """KIVI with 4 sinks, R = 32 and values flushed by 8."""
    rule = FlushRule(num_sinks=4, key_window=0, key_flush=32, value_window=32, value_flush=8)
    assert [rule.packed(0, n) for n in (0, 3, 35, 36, 67, 68, 100)] == [0, 0, 0, 32, 32, 64, 96]
    assert [rule.packed(1, n) for n in (0, 36, 43, 44, 51, 52, 100)] == [0, 0, 0, 8, 8, 16, 64]


@pytest.mark.parametrize("field", ["num_sinks", "key_window", "key_flush", "value_window", "value_flush"])
def test_a_rule_that_never_ends_is_refused(field):
    rule = FlushRule(0, 0, 32, 32, 1)
    with pytest.raises(ValueError, match=rf"{field} must be at least \d; got -1"):
        replace(rule, **{field: -1})
    if field.endswith("flush"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1; got 0"):
            replace(rule, **{field: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(2, 3, 64)}, r"keys must be \[2, 2, 64\]; got \[2, 3, 64\]"),
        ({"values": torch.zeros(2, 2, 1, 64)}, r"values must be \[2, 2, 64\]"),
        ({"rule": replace(CASE.rule, num_sinks=3)}, r"exact.sink_keys must be \[\*, \*, 3, \*\]"),
        ({"rule": replace(CASE.rule, key_flush=48)}, "key_flush must fill whole pages of 32 tokens; got 48"),
        ({"rule": replace(CASE.rule, key_window=1)}, "the ring of keys must hold a window and a flush, 33 tokens"),
        ({"rule": replace(CASE.rule, value_flush=8)}, "the ring of values must hold a window and a flush, 40 tokens"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = build_append(CASE)
    token = torch.zeros(2, 2, 64)
    arguments = {"keys": token, "values": token, "rule": CASE.rule, **change}
    with pytest.raises(ValueError, match=message):
        append_pack(exact=state.exact, past=state.past, **arguments)


@pytest.mark.parametrize("part", ["codes", "scale", "minimum"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_pages_of_another_shape_are_named(side, part):
    state, token = build_append(CASE), torch.zeros(2, 2, 64)
    pages = getattr(state.past, side)
    wrong = replace(pages, **{part: getattr(pages, part)[..., :-1]})
    past: PackedPast = replace(state.past, **{side: wrong})
    with pytest.raises(ValueError, match=rf"past.{side}.{part} must be"):
        append_pack(token, token, state.exact, CASE.rule, past)
