"""A run that is exported, imported and played again is the same run."""

import gzip
import json

import fakes
import numpy as np
import pytest

from kvlens.ui.payload import Scene, build
from kvlens.ui.recording import Recorder, RecordingFault, from_bytes, to_bytes, to_csv


@pytest.fixture
def recording():
    recorder, log = Recorder(), fakes.empty_log()
    for _ in fakes.play(log, 150):
        recorder.see(log)
    return recorder.finish(
        log, prompts=["before", "<b>now</b>"], earlier_answers={"a": ["x"], "b": ["y"]}, settings={},
        projection=[(32768, {"fp16": 100, "a": 100, "b": 20})], date="2026-11-21",
    )  # fmt: skip


def figures(log):
    payload = json.loads(build(log, Scene()))
    return [lane["figures"] for lane in payload["lanes"]], payload["difference"], payload["context"]


def test_export_and_import_give_the_same_run(recording):
    again = from_bytes(to_bytes(recording))
    assert figures(again.log) == figures(recording.log)
    assert [lane.text for lane in again.log.lanes] == [lane.text for lane in recording.log.lanes]
    assert again.prompts == recording.prompts
    assert again.projection == [(32768, {"fp16": 100, "a": 100, "b": 20})]
    now, then = again.log.lanes[1].errors, recording.log.lanes[1].errors
    np.testing.assert_allclose(now.by_head, then.by_head, rtol=1e-3)
    np.testing.assert_allclose(now.exact, then.exact, rtol=0.01, atol=1e-4)
    np.testing.assert_array_equal(np.isnan(now.by_token), np.isnan(then.by_token))


def test_replay_gives_back_each_moment(recording):
    live = fakes.empty_log()
    for number, _ in enumerate(fakes.play(live, 40), start=1):
        if number == 40:
            break
    then = recording.at(40)
    assert [lane.text for lane in then.lanes] == [lane.text for lane in live.lanes]
    assert [lane.memory for lane in then.lanes] == [lane.memory for lane in live.lanes]
    assert all(lane.finish is None for lane in then.lanes)


def test_replay_shows_a_token_as_exact_until_it_was_packed(recording):
    final = recording.log.lanes[1].errors.by_token[0, 0, 0]
    early = recording.at(2).lanes[1].errors.by_token[0, 0, 0]
    packed_early, packed_finally = np.isfinite(early).sum(), np.isfinite(final).sum()
    assert 0 < packed_early < packed_finally
    assert recording.at(recording.num_steps).lanes[1].errors is recording.log.lanes[1].errors


def test_csv_has_a_row_for_each_step_with_its_bytes(recording):
    rows = to_csv(recording).splitlines()
    assert len(rows) == 3 + sum(len(lane.steps) for lane in recording.log.lanes)
    last = rows[-1].split(",")
    assert last[-2] == str(sum(recording.log.lanes[1].memory[-1].parts.values()))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not gzip",
        b"\x1f\x8b broken",
        gzip.compress(b"[]"),
        gzip.compress(b'{"format": "other"}'),
        gzip.compress(b'{"format": "kvlens-run-1"}'),
        gzip.compress(b'{"format": "kvlens-run-1", "run": {"run_id": 1}, "lanes": 3, "machine": {}}'),
    ],
)
def test_other_files_are_refused_with_a_reason(data):
    with pytest.raises(RecordingFault):
        from_bytes(data)


def test_a_bomb_is_refused():
    with pytest.raises(RecordingFault, match="larger"):
        from_bytes(gzip.compress(b" " * (33 * 2**20)))
