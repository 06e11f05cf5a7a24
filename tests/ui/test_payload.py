"""The payload holds the log's own numbers, thinned but never changed."""

import base64
import json
import math
from dataclasses import replace

import fakes
import numpy as np
import pytest

from kvlens.engine.budget import MemoryBudget
from kvlens.engine.trace import StepTrace
from kvlens.ui import heat
from kvlens.ui.heat import View
from kvlens.ui.payload import MAX_POINTS, Scene, build, lane_figures, lane_name, text_units


def unpack(packed):
    dtype = packed["d"] if packed["d"] == "u1" else "<" + packed["d"]
    return np.frombuffer(base64.b64decode(packed["b"]), dtype).reshape(packed["s"])


def payload_of(log, **scene):
    return json.loads(build(log, Scene(**scene)))


def test_figures_equal_the_footprint(log):
    payload = payload_of(log)
    for lane, drawn in zip(log.lanes, payload["lanes"], strict=True):
        sample = lane.memory[-1]
        live_bytes = sum(sample.parts.values())
        figures = drawn["figures"]
        assert figures["live_bytes"] == live_bytes
        assert sum(drawn["memory"]["last"].values()) == live_bytes
        assert figures["bits_per_value"] == pytest.approx(8 * live_bytes / (log.values_per_token * sample.num_tokens))
        assert figures["times_smaller"] == pytest.approx(figures["fp16_bytes"] / live_bytes)
    assert payload["lanes"][0]["figures"]["times_smaller"] == 1.0


def test_memory_curves_end_where_the_log_ends():
    log = fakes.finished_log(num_steps=400)
    drawn = payload_of(log)["lanes"][1]["memory"]
    tokens = unpack(drawn["tokens"])
    assert len(tokens) <= MAX_POINTS
    assert tokens[0] == log.lanes[1].memory[0].num_tokens
    assert tokens[-1] == log.lanes[1].memory[-1].num_tokens
    for part, packed in drawn["parts"].items():
        assert unpack(packed)[-1] == log.lanes[1].memory[-1].parts[part]


def test_speed_curve_is_tokens_over_time_of_its_block(log):
    drawn = payload_of(log)["lanes"][0]["speed"]
    speeds, ends = unpack(drawn["speed"]), unpack(drawn["tokens"])
    times = log.lanes[0].decode_ms[1:]
    block = int(ends[1] - ends[0])
    assert block == 2
    assert speeds[0] == pytest.approx(1000 * block / sum(times[:block]), rel=1e-5)
    assert speeds[-1] == pytest.approx(1000 * block / sum(times[-block:]), rel=1e-5)
    assert ends[-1] == len(log.lanes[0].steps)


def test_speed_is_compared_with_the_fp16_lane(log):
    dense, kivi = log.lanes
    assert lane_figures(log, dense)["is_reference"]
    assert lane_figures(log, kivi)["speed_ratio"] == pytest.approx(kivi.tokens_per_second / dense.tokens_per_second)


def test_parting_is_counted_as_the_browser_counts(log):
    dense, kivi = log.lanes
    index = log.first_difference
    for lane in (dense, kivi):
        lane.steps[0] = StepTrace(0, "🦩", 20.0, -0.1)
    start, end = payload_of(log)["lanes"][1]["parting"]
    before = "".join(step.text for step in kivi.steps[:index])
    assert start == len(before) + 1  # the flamingo is two UTF-16 units
    assert end - start == text_units(kivi.steps[index].text)


def test_nothing_measured_yet_is_none_not_zero():
    log = fakes.empty_log()
    figures = payload_of(log, state="reading")["lanes"][1]["figures"]
    assert figures["live_bytes"] is None
    assert figures["tokens_per_second"] is None
    assert figures["bits_per_value"] is None


def test_lanes_of_one_method_are_named_by_what_differs(log):
    assert lane_name(log, log.lanes[1]) == "KIVI"
    for lane, bits in zip(log.lanes, (2, 4), strict=True):
        lane.method, lane.title = "kivi", f"KIVI · {bits} bit · G 32"
    assert [lane_name(log, lane) for lane in log.lanes] == ["KIVI 2 bit", "KIVI 4 bit"]


@pytest.mark.parametrize("kind", heat.KINDS)
def test_layer_by_token_cells_are_the_errors_and_exact_cells_are_marked(log, kind):
    errors = log.lanes[1].errors
    payload = payload_of(log, view=View(kind=kind))["errors"]
    cells = unpack(payload["lanes"][0]["cells"])
    side = heat.KINDS.index(kind)
    wanted = np.sqrt(np.mean(errors.by_token[side] ** 2, axis=1))
    is_exact = np.isnan(wanted)
    assert (cells[is_exact] == heat.EXACT_CELL).all()
    shown = np.clip(wanted[~is_exact], 0, payload["top"])
    np.testing.assert_allclose(cells[~is_exact] / 254 * payload["top"], shown, atol=payload["top"] / 500)


def test_channel_magnitudes_show_the_outlier_channels(log):
    payload = payload_of(log, view=View(figure="channels", quantity="magnitude"))["errors"]
    cells = unpack(payload["lanes"][0]["cells"]).astype(float)
    means = cells.mean(axis=1)
    assert set(np.argsort(means)[-3:]) == {5, 23, 40}


def test_range_is_shared_by_keys_and_values(log):
    keys, values = (payload_of(log, view=View(kind=kind))["errors"]["top"] for kind in heat.KINDS)
    assert keys == values


@pytest.mark.parametrize(("value", "top"), [(0.03, 0.05), (0.2, 0.2), (0.21, 0.5), (7.0, 10.0), (0.0, 1.0)])
def test_ranges_move_in_steps(value, top):
    assert heat.nice_ceiling(value) == pytest.approx(top)


def test_pooling_ignores_exact_cells_and_keeps_outliers():
    grid = np.full((1, 1024), np.nan, np.float32)
    grid[0, :512] = 1.0
    grid[0, 100] = 9.0
    pooled, width = heat.pool_columns(grid, np.max)
    assert (width, pooled.shape) == (4, (1, 256))
    assert pooled[0, 25] == 9.0
    assert np.isnan(pooled[0, 128:]).all()


def test_dense_lane_has_no_error_picture(log):
    assert [lane["id"] for lane in payload_of(log)["errors"]["lanes"]] == ["b"]


def test_payload_without_a_run_carries_state_and_notice():
    payload = payload_of(None, state="done", notice="A sentence.")
    assert set(payload) == {"sequence", "state", "notices"}
    assert payload["notices"] == ["A sentence."]


def test_nearly_full_context_is_said_before_it_is_full(log):
    log.max_context = 220
    assert any("nearly full" in notice for notice in payload_of(log)["notices"])
    log.lanes[0].finish = "context"
    assert any("is full" in notice for notice in payload_of(log)["notices"])


@pytest.mark.parametrize("state", ["recorded", "replay"])
def test_a_recorded_run_tells_its_own_notices_and_not_how_full_it_was(log, state):
    log.max_context = 220
    log.notices.append("The kernel fell back.")
    assert payload_of(log, state=state)["notices"] == ["The kernel fell back."]
    log.lanes[0].finish = "context"
    assert payload_of(log, state=state, notice="A sentence.")["notices"] == ["A sentence.", "The kernel fell back."]


def test_a_cleared_conversation_uses_no_context_and_gives_its_cache_back(log):
    log.max_context = 220
    full = payload_of(log, is_cleared=True)
    assert full["context"] is None
    assert full["notices"] == []
    budget = MemoryBudget(1000)
    alone = payload_of(None, is_cleared=True, budget=budget)
    assert (alone["context"], alone["budget"]) == (None, {"used": 0, "limit": 1000})


def test_numbers_without_a_value_reach_the_browser_as_null(log):
    log.lanes[0].steps[0] = replace(log.lanes[0].steps[0], log_prob=math.nan)
    log.machine = replace(log.machine, process_bytes=math.inf)
    written = build(log, Scene())
    assert "NaN" not in written
    assert "Infinity" not in written
    payload = json.loads(written)
    assert payload["lanes"][0]["tokens"][0][1] is None
    assert payload["machine"]["process_bytes"] is None
    assert payload["lanes"][0]["tokens"][1][1] > 0


def test_payload_is_small_enough_to_stream():
    log = fakes.finished_log(num_steps=600)
    assert len(build(log, Scene(state="running", view=View(figure="channels")))) < 60_000
