"""The atoms panel's numbers against the codes they are made of."""

import gzip
import json

import fakes
import numpy as np
import pytest
from test_payload import unpack

from kvlens.ui.heat import View
from kvlens.ui.payload import Scene, build
from kvlens.ui.recording import Recorder, from_bytes, to_bytes


@pytest.fixture
def coded(log):
    log.lanes[1].atoms = fakes.make_atoms()
    log.lanes[1].shared_bytes = 1_600_000
    return log


def drawn(log, **view):
    return json.loads(build(log, Scene(view=View(**view))))


def lane_of(log, **view):
    (lane,) = drawn(log, **view)["atoms"]["lanes"]
    return lane


def side_of(log, kind):
    return getattr(log.lanes[1].atoms, kind)


def test_without_sparse_codes_there_is_no_panel(log):
    assert drawn(log)["atoms"] is None


def test_only_lanes_with_codes_are_in_it(coded):
    atoms = drawn(coded)["atoms"]
    assert [lane["id"] for lane in atoms["lanes"]] == ["b"]
    assert (atoms["probed_layer"], atoms["num_layers"], atoms["num_heads"]) == (3, fakes.NUM_LAYERS, fakes.NUM_HEADS)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_usage_counts_every_atom_of_the_head(coded, kind):
    side, usage = side_of(coded, kind), lane_of(coded, kind=kind, head=1)["usage"]
    counts = sorted((np.count_nonzero(side.indices[1] == atom) for atom in range(len(side.atoms))), reverse=True)
    used = [count for count in counts if count]
    assert unpack(usage["counts"]).tolist() == used
    assert usage["used"] == len(used)
    assert usage["num_atoms"] == 32
    assert usage["used_by_any"] == len(set(side.indices.ravel().tolist()))


def test_a_long_usage_curve_is_thinned_and_keeps_its_ends(coded):
    side = fakes.make_coded_side(900, 0, 2048, 1, seed=3)
    counts = np.sort(np.bincount(side.indices[0].ravel()))[::-1]
    coded.lanes[1].atoms = fakes.AtomSnapshot(0, np.zeros((2, 4), np.float32), side, side)
    usage = lane_of(coded)["usage"]
    ranks = unpack(usage["ranks"])
    assert len(ranks) <= 160
    assert (ranks[0], ranks[-1]) == (1, usage["used"])
    assert unpack(usage["counts"]).tolist() == counts[ranks - 1].tolist()


def test_energy_is_what_the_sums_bring_back_of_the_known_vectors(coded):
    for energy, kind in zip(lane_of(coded)["energy"], ("keys", "values"), strict=True):
        side = side_of(coded, kind)
        known = np.isfinite(side.exact[..., 0])
        total = np.square(side.exact[known]).sum()
        first = np.square((side.exact - side.start)[known]).sum()
        assert energy[0] == pytest.approx(1 - first / total, abs=1e-4)
        assert len(energy) == side.indices[0, 0].size + 1
        assert energy[-1] > 0.9


def test_coverage_is_by_layer(coded):
    np.testing.assert_allclose(lane_of(coded)["coverage"], coded.lanes[1].atoms.coverage, atol=1e-4)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_a_vector_is_built_atom_by_atom(coded, kind):
    side, vector = side_of(coded, kind), lane_of(coded, kind=kind, head=1, token=9)["vector"]
    place = 9 - side.first_token
    np.testing.assert_allclose(unpack(vector["exact"]), side.exact[1, place], rtol=1e-6)
    sums = unpack(vector["sums"])
    np.testing.assert_allclose(sums[0], side.start[1, 0], rtol=1e-6)
    missing = np.linalg.norm(side.exact[1, place] - sums, axis=1) / np.linalg.norm(side.exact[1, place])
    np.testing.assert_allclose(missing, side.remaining[1, place], rtol=1e-3)
    np.testing.assert_allclose(vector["remaining"], side.remaining[1, place], atol=1e-4)
    assert vector["indices"] == side.indices[1, place].ravel().tolist()
    width = side.atoms.shape[1]
    change = sums[1] - sums[0]
    assert np.abs(change[:width]).max() > 0
    assert (change[width:] == 0).all()


@pytest.mark.parametrize(("asked", "shown"), [(None, 15), (0, 4), (4, 4), (100, 15)])
def test_a_token_that_is_not_coded_gives_the_nearest(coded, asked, shown):
    vector = lane_of(coded, token=asked)["vector"]
    assert (vector["token"], vector["asked"], vector["first"], vector["last"]) == (shown, asked, 4, 15)


def test_an_exact_vector_that_was_not_kept_is_said_to_be_missing(coded):
    vector = lane_of(coded, token=6)["vector"]
    assert vector["exact"] is None
    assert vector["remaining"] is None
    assert np.isfinite(unpack(vector["sums"])).all()


def test_nothing_coded_yet_is_an_empty_lane(coded):
    coded.lanes[1].atoms = fakes.make_atoms(num_tokens=0)
    lane = lane_of(coded)
    assert (lane["num_coded"], lane["vector"], lane["energy"]) == (0, None, [None, None])


def test_dictionaries_stand_beside_the_cache(coded):
    figures = drawn(coded)["lanes"][1]["figures"]
    assert figures["shared_bytes"] == 1_600_000
    coded.lanes[1].shared_bytes = 0
    without = drawn(coded)["lanes"][1]["figures"]
    assert {**figures, "shared_bytes": 0} == without


def test_a_prompt_whose_atoms_cost_more_than_codes_save_is_told_why(coded):
    sample = coded.lanes[1].memory[-1]
    assert "atoms taken from the prompt" not in drawn(coded)["sentence"]
    sample.parts["dictionary"] = 10**9
    assert "1.00 GB of atoms taken from the prompt" in drawn(coded)["sentence"]


def recorded(num_steps=150):
    recorder, log = Recorder(), fakes.empty_log()
    for _ in fakes.play(log, num_steps):
        packed = 0 if log.lanes[1].errors is None else int(np.isfinite(log.lanes[1].errors.by_token[0, 0, 0]).sum())
        log.lanes[1].atoms = fakes.make_atoms(packed, first_token=0)
        recorder.see(log)
    return recorder.finish(log, prompts=["now"], earlier_answers={}, settings={}, projection=[], date="")


def test_export_and_import_give_the_same_atoms():
    recording = recorded()
    now, then = (one.log.lanes[1].atoms for one in (from_bytes(to_bytes(recording)), recording))
    assert now.probed_layer == then.probed_layer
    np.testing.assert_allclose(now.coverage, then.coverage, rtol=1e-3)
    for mine, other in ((now.keys, then.keys), (now.values, then.values)):
        assert mine.first_token == other.first_token
        np.testing.assert_array_equal(mine.indices, other.indices)
        np.testing.assert_array_equal(mine.coefficients, other.coefficients)
        np.testing.assert_allclose(mine.exact, other.exact, rtol=0.01, atol=1e-4)
        np.testing.assert_allclose(mine.remaining, other.remaining, rtol=1e-3, atol=1e-4)
        used = np.unique(other.indices)
        np.testing.assert_allclose(mine.atoms[used], other.atoms[used], rtol=0.01, atol=1e-4)


def test_replay_shows_only_what_was_coded_by_then():
    recording = recorded()
    final, early = (recording.at(step).lanes[1].atoms for step in (recording.num_steps, 2))
    packed = np.isfinite(recording.at(2).lanes[1].errors.by_token[0, 0, 0]).sum()
    assert 0 < packed < final.keys.indices.shape[1]
    assert early.keys.indices.shape[1] == early.values.remaining.shape[1] == packed
    np.testing.assert_array_equal(early.keys.indices, final.keys.indices[:, :packed])
    assert drawn(recording.at(2))["atoms"]["lanes"][0]["num_coded"] == packed


def test_a_run_from_before_there_were_atoms_still_loads():
    content = json.loads(gzip.decompress(to_bytes(recorded())))
    for lane in content["lanes"]:
        del lane["atoms"], lane["shared_bytes"]
    for history in content["history"].values():
        del history["coverage"]
    old = from_bytes(gzip.compress(json.dumps(content).encode()))
    assert [lane.atoms for lane in old.at(20).lanes] == [None, None]
    assert drawn(old.log)["atoms"] is None
    assert drawn(old.log)["lanes"][1]["figures"]["shared_bytes"] == 0
