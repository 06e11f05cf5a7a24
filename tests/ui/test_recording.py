"""A run that is exported, imported and played again is the same run."""

import base64
import gzip
import json
import tracemalloc
from dataclasses import replace

import fakes
import numpy as np
import pytest

from kvlens.ui import library
from kvlens.ui.heat import View
from kvlens.ui.payload import Scene, build
from kvlens.ui.recording import MAX_FILE_BYTES, Recorder, RecordingFault, from_bytes, to_bytes, to_csv
from kvlens.ui.recording_check import MAX_ENTRIES, count_entries


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


# --- files that somebody made on purpose ----------------------------------------------------------------


@pytest.fixture(scope="module")
def content():
    """A small file as JSON holds it: a dense lane and one with errors, atoms and history."""
    recorder, log = Recorder(), fakes.empty_log(prompt_tokens=90)
    for _ in fakes.play(log, 10):
        log.lanes[1].atoms = fakes.make_atoms(8, first_token=0)
        recorder.see(log)
    whole = recorder.finish(
        log, prompts=["one", "two"], earlier_answers={"a": ["x"], "b": ["y"]}, settings={"lanes": {}},
        projection=[(32768, {"fp16": 100, "a": 100, "b": 20})], date="2026-11-21",
    )  # fmt: skip
    return gzip.decompress(to_bytes(whole)).decode()


def packed(array, dtype="f2"):
    array = np.asarray(array, dtype="<" + dtype)
    return {"dtype": dtype, "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def hollow(*shape, dtype="f2"):
    return {"dtype": dtype, "shape": list(shape), "data": ""}


def changed(content, path, value):
    """The file with one entry replaced; a path such as `lanes.1.errors.by_token`."""
    whole = json.loads(content)
    *parents, last = (int(name) if name.isdigit() else name for name in path.split("."))
    inner = whole
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return gzip.compress(json.dumps(whole).encode(), compresslevel=1)


def test_the_file_that_the_attacks_change_is_read(content):
    assert from_bytes(content.encode()).log.lanes[1].atoms is not None


CODES = (fakes.NUM_HEADS, 8, 3, 1)
HEADS = (2, fakes.NUM_LAYERS, fakes.NUM_HEADS)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("lanes.1.atoms.keys.indices", packed(np.full(CODES, 1_500_000_000), "i4"), "name one of its 32 atoms"),
        ("lanes.1.atoms.keys.indices", packed(np.full(CODES, 32), "i4"), "name one of its 32 atoms"),
        ("lanes.1.atoms.keys.indices", packed(np.full(CODES, -1), "i4"), "name one of its 32 atoms"),
        ("lanes.1.atoms.keys.indices", packed(np.zeros(CODES)), "array of i4"),
        ("lanes.1.atoms.keys.coefficients", packed(np.full(CODES, np.nan)), "finite"),
        ("lanes.1.atoms.keys.coefficients", packed(np.zeros((2, 7, 3, 1))), "as elsewhere"),
        ("lanes.1.atoms.keys.remaining", packed(np.zeros((2, 8, 2))), "as elsewhere"),
        ("lanes.1.atoms.keys.start", packed(np.zeros((2, 3, 64))), "as elsewhere"),
        ("lanes.1.atoms.keys.atoms", packed(np.zeros((32, 32))), "as elsewhere"),
        ("lanes.1.atoms.keys.atoms", hollow(0, 64), "from 1 to"),
        ("lanes.1.atoms.keys.first_token", -1, "first_token"),
        ("lanes.1.atoms.keys.first_token", 131_072, "first_token"),
        ("lanes.1.atoms.coverage", packed(np.zeros((2, 3))), "as elsewhere"),
        ("lanes.1.atoms.probed_layer", fakes.NUM_LAYERS, "probed_layer"),
        ("lanes.1.errors.by_token", hollow(2, 1, 0, 2_000_000_000), "from 1 to"),
        ("lanes.1.errors.by_token", hollow(2, 2_000_000_000, 2, 0), "from 1 to"),
        ("lanes.1.errors.by_token", hollow(2, 2, 2, 1_000_000), "as many bytes"),
        ("lanes.1.errors.by_token", packed(np.zeros((2, 1, 1, 131_073))), "0 to 131,072"),
        ("lanes.1.errors.by_token", packed(np.full((*HEADS, 99), np.inf)), "NaN where nothing is known"),
        ("lanes.1.errors.by_token", hollow(2, -1, 2, 0), "a dimension"),
        ("lanes.1.errors.by_token", hollow(2, "8", 2, 0), "a dimension"),
        ("lanes.1.errors.by_token", hollow(*[1] * 40), "at most 4"),
        ("lanes.1.errors.by_head", packed(np.zeros((2, 1, 1))), "as elsewhere"),
        ("lanes.1.errors.by_channel", packed(np.zeros((*HEADS, 1_025))), "from 1 to 1,024"),
        ("lanes.1.errors.exact", packed(np.zeros((2, 2, 4, 64))), "as elsewhere"),
        ("lanes.1.errors.exact", None, "both or not at all"),
        ("lanes.1.errors.probed_layer", 8, "probed_layer"),
        ("history.b.packed_at", packed(np.zeros((2, 5)), "i4"), "as elsewhere"),
        ("history.b.moments.0.1", packed(np.zeros((2, 1, 2))), "as elsewhere"),
        ("history.b.moments.0.0", -1, "step of a moment"),
        ("history.b.coverage.0.1", packed(np.zeros((2, 1))), "as elsewhere"),
        ("history.b.moments", [[0]], "damaged"),
        ("history.b.moments", [[0]] * 3_000, "at most 2,048"),
        ("history.b.coverage", [[0, packed(np.zeros((2, 8)))]] * 3_000, "at most 2,048"),
        ("history.c", {"packed_at": hollow(2, 0, dtype="i4"), "moments": []}, "of its lanes"),
        ("lanes", [], "must hold lanes"),
        ("lanes", [{"steps": [], "memory": []}] * 5, "at most 4"),
        ("lanes.1.lane_id", "a", "a name of its own"),
        ("lanes.1.lane_id", "", "must be a name"),
        ("lanes.1.method", "constructor", "must be a name"),
        ("lanes.1.method", 3, "must be a name"),
        ("lanes.1.title", ["KIVI"], "must be a text"),
        ("lanes.1.title", "x" * 2_000, "at most 1,024"),
        ("lanes.1.attention_path", None, "must be a text"),
        ("lanes.1.is_simulated", 1, "true or false"),
        ("lanes.1.reserved_bytes", "x", "whole number"),
        ("lanes.1.reserved_bytes", True, "whole number"),
        ("lanes.1.reserved_bytes", 1.5, "whole number"),
        ("lanes.1.reserved_bytes", -1, "whole number"),
        ("lanes.1.reserved_bytes", 10**400, "whole number"),
        ("lanes.1.reserved_bytes", float("nan"), "must be finite"),
        ("lanes.1.prefill_ms", float("inf"), "must be finite"),
        ("lanes.1.prefill_ms", "x", "prefill_ms"),
        ("lanes.1.prefill_ms", 1e-320, "prefill_ms"),
        ("lanes.1.reused_tokens", 91, "0 to 90"),
        ("lanes.1.finish", "<b>", "must be one of"),
        ("lanes.1.finish", ["end"], "must be one of"),
        ("lanes.1.settings", {str(number): 0 for number in range(2_000)}, "at most 1,024"),
        ("lanes.1.settings", {"a": [[0] * 2_000]}, "at most 1,024"),
        ("lanes.1.steps", [[0, "", 0, 0, []]] * 16_385, "at most 16,384"),
        ("lanes.1.steps", [[0, "", 0, 0, []]] * 16_380, "steps in all lanes"),
        ("lanes.1.steps.1", [0, "", 0, 0, []], "step_ms"),
        ("lanes.1.steps.1", [0, "", 10**400, 0, []], "step_ms"),
        ("lanes.1.steps.1", "abcde", "damaged"),
        ("lanes.1.steps.1", [-1, "", 1, 0, []], "token_id"),
        ("lanes.1.steps.1", [0, 5, 1, 0, []], "text of a step"),
        ("lanes.1.steps.1", [0, "\ud800", 1, 0, []], "whole Unicode"),
        ("lanes.1.steps.1", [0, "", 1, 1000, []], "log_prob"),
        ("lanes.1.steps.1", [0, "", 1, 0, [["", "x"]]], "probability"),
        ("lanes.1.steps.1", [0, "", 1, 0, [["", 0]] * 100], "at most 32"),
        ("lanes.1.memory.1", [0, {"codes": 1}], "tokens of a memory sample"),
        ("lanes.1.memory.1", [9, {"codes": "x"}], "codes of a memory sample"),
        ("lanes.1.memory.1", [9, {"codes": -1}], "codes of a memory sample"),
        ("lanes.1.memory.1", [9, {"__proto__": 1}], "must be a name"),
        ("lanes.1.memory.1", [9, {"x" * 65: 1}], "must be a name"),
        ("lanes.1.memory.1", [9, {f"p{number}": 1 for number in range(33)}], "at most 32"),
        ("lanes.1.memory.1", [9, 7], "must be a mapping"),
        ("run.run_id", 1, "run_id"),
        ("run.values_per_token", 0, "values_per_token"),
        ("run.max_context", "x", "max_context"),
        ("run.notices", "full", "must be a list"),
        ("run.notices", ["x" * 5_000], "a notice"),
        ("run.lanes", [], "damaged"),
        ("machine.process_bytes", None, "process_bytes"),
        ("machine.device_used_bytes", "x", "device_used_bytes"),
        ("about.prompts", "ab", "must be a list"),
        ("about.prompts", [7], "a prompt or an answer"),
        ("about.prompts", ["x" * 400_001], "a prompt or an answer"),
        ("about.prompts", ["x" * 400_000] * 21, "characters together"),
        ("about.earlier_answers", {"a": "x"}, "must be a list"),
        ("about.settings", [], "must be a mapping"),
        ("about.projection", [[1, {"fp16": "x"}]], "fp16 of the projection"),
        ("about.projection", [[1, {}]] * 99, "at most 16"),
        ("about.date", 5, "the date"),
    ],
)
def test_what_no_export_holds_is_refused_with_its_rule(content, path, value, rule):
    data = changed(content, path, value)
    with pytest.raises(RecordingFault, match=rule):
        from_bytes(data)


def test_a_number_that_reads_as_infinite_is_refused(content):
    weight = '"weight_bytes": 31000000'
    assert weight in content
    with pytest.raises(RecordingFault, match="weight_bytes"):
        from_bytes(content.replace(weight, '"weight_bytes": 1e999').encode())


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "kvlens-run-1", "lanes": [{"steps": [' + '[0,"",0,0,[]],' * 2_300_000 + "0]}]}",
        "[" + "[]," * 10_000_000 + "0]",
        '["' + '","' * 10_000_000 + '"]',
        '["\\""' + ',"\\""' * 5_000_000 + "]",
    ],
    ids=["steps", "lists", "texts", "texts of a quote"],
)
def test_many_small_values_are_refused_before_they_are_made(text):
    data = gzip.compress(text.encode(), compresslevel=1)
    del text
    tracemalloc.start()
    try:
        with pytest.raises(RecordingFault, match="at most 1,048,576"):
            from_bytes(data)
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_FILE_BYTES
    finally:
        tracemalloc.stop()


def test_entries_are_counted_outside_of_texts():
    values = ["a,[b", 'say "one, two"', "\\", '\\",', {"k,": [1, 2, {}]}, []]
    # Six in the outer list, three in the inner one; each list and mapping is counted where it opens too.
    assert count_entries(json.dumps(values).encode()) == 5 + 2 + 5
    assert count_entries(json.dumps("," * 100).encode()) == 0


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 5_000], ids=["lists", "mappings", "digits"])
def test_nesting_and_long_numbers_are_refused(text):
    with pytest.raises(RecordingFault):
        from_bytes(text.encode())


@pytest.mark.parametrize("error", [RecursionError, MemoryError, OverflowError])
def test_running_out_while_reading_is_a_fault_of_the_file(monkeypatch, error):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(json, "loads", run_out)
    with pytest.raises(RecordingFault, match="too deeply or too large"):
        from_bytes(b"{}")


@pytest.mark.parametrize("data", [None, 5, ["x"], "no base64!", "x" * (2 * MAX_FILE_BYTES)])
def test_an_upload_that_is_no_text_of_a_bounded_file_is_refused(data):
    with pytest.raises(RecordingFault):
        library.import_upload(data)


@pytest.mark.parametrize("path", sorted(library.RUNS_FOLDER.glob("*.json.gz")), ids=lambda path: path.name)
def test_a_recorded_lane_is_looked_at_from_its_own_first_step_on(path):
    recording = from_bytes(path.read_bytes())
    for lane in recording.log.lanes:
        history = recording.history.get(lane.lane_id)
        if history is not None and lane.method != "dense":
            assert history.moments[0][0] <= 1
            # What earlier turns packed is packed from the start.
            assert len(recording.prompts) == 1 or history.packed_at.min() <= 1


@pytest.mark.parametrize("path", sorted(library.RUNS_FOLDER.glob("*.json.gz")), ids=lambda path: path.name)
def test_the_runs_that_come_with_the_page_are_read_and_written_again(path):
    data = path.read_bytes()
    assert gzip.decompress(to_bytes(from_bytes(data))) == gzip.decompress(data)
    assert count_entries(gzip.decompress(data)) < MAX_ENTRIES / 16


def test_infinite_errors_are_written_as_the_largest_and_drawn(recording):
    errors = recording.log.lanes[1].errors
    errors.by_token[0, 0, 0, 0] = errors.by_head[0, 0, 0] = np.inf
    again = from_bytes(to_bytes(recording)).log
    assert again.lanes[1].errors.by_token[0, 0, 0, 0] == np.finfo(np.float16).max
    for log in (recording.log, again):
        for figure in ("tokens", "heads"):
            drawn = build(log, Scene(view=View(figure=figure)))
            json.loads(drawn, parse_constant=pytest.fail)


# --- runs that are too long for a file ------------------------------------------------------------------


def long_recording(num_tokens, heads=8, layers=1, head_dim=128, moments=0, atoms=False):
    """A lane of a real model's shape. Its arrays repeat one number and take no memory before they are written."""
    log = fakes.empty_log(("kivi",), prompt_tokens=num_tokens)
    for _ in fakes.play(log, 2):
        pass
    number = np.float32(0.25)
    of_heads, of_vectors = (2, layers, heads), (2, heads, num_tokens, head_dim)
    by_head, by_channel = (np.broadcast_to(number, shape) for shape in (of_heads, (*of_heads, head_dim)))
    by_token = np.broadcast_to(number, (*of_heads, num_tokens))
    vectors = np.broadcast_to(number, of_vectors)
    log.lanes[0].errors = fakes.ErrorSnapshot(by_token, by_head, by_channel, by_channel, 0, vectors, vectors)
    if atoms:
        codes = (heads, num_tokens, 2, 1)
        sums = np.broadcast_to(number, (*codes[:2], 3))
        start, dictionary = np.zeros((heads, 1, head_dim), np.float32), np.zeros((16, head_dim), np.float32)
        index = np.broadcast_to(np.int32(3), codes)
        side = fakes.CodedSide(0, index, np.broadcast_to(number, codes), vectors[0], start, sums, dictionary)
        log.lanes[0].atoms = fakes.AtomSnapshot(0, np.zeros((2, layers), np.float32), side, side)
    recorder = Recorder()
    recorder.see(log)
    history = recorder._history["a"]
    history.moments *= 1 + moments
    return recorder.finish(log, prompts=["now"], earlier_answers={}, settings={}, projection=[], date="")


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ({"num_tokens": 500, "atoms": True}, {"vectors", "atoms", "moments", "errors"}),
        ({"num_tokens": 5_000, "atoms": True}, {"atoms", "moments", "errors"}),
        ({"num_tokens": 12_000, "atoms": True}, {"moments", "errors"}),
        ({"num_tokens": 12_000, "layers": 16, "moments": 255}, {"errors"}),
        ({"num_tokens": 60_000, "layers": 32}, set()),
        ({"num_tokens": 140_000, "heads": 1, "head_dim": 2}, set()),
    ],
)
def test_a_run_that_is_too_large_is_exported_without_its_largest_arrays(shape, kept):
    recording = long_recording(**shape)
    data = to_bytes(recording)
    again = from_bytes(data)
    lane, history = again.log.lanes[0], again.history.get("a")
    found = {
        "vectors": lane.errors is not None and lane.errors.exact is not None and lane.errors.rebuilt is not None,
        "atoms": lane.atoms is not None,
        "moments": history is not None and bool(history.moments),
        "errors": lane.errors is not None,
    }
    assert {name for name, is_there in found.items() if is_there} == kept
    assert figures(again.log) == figures(recording.log)
    for log in (again.log, again.at(1)):
        for figure in ("tokens", "channels", "heads"):
            json.loads(build(log, Scene(view=View(figure=figure))))


def test_lanes_with_half_of_their_vectors_are_written_without(recording):
    lane = recording.log.lanes[1]
    lane.errors = replace(lane.errors, rebuilt=None)
    assert from_bytes(to_bytes(recording)).log.lanes[1].errors.exact is None
