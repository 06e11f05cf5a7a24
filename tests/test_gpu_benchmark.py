"""`python -m benchmarks.gpu` without a GPU: every section runs, saves as it goes, and survives what others do."""

import csv
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import rivals
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, bars, layers, peers, session, steps
from benchmarks.gpu.headline import BASELINE, largest_batch
from benchmarks.gpu.plan import DENSE, DRY, KIVI_2, KIVI_2_SHORT, LANES, PACKED
from kvlens.engine.architectures import random_model
from kvlens.engine.bench import NetworkBench
from kvlens.engine.errors import OutOfMemory
from kvlens.engine.shape import ModelShape
from tools.readme_gpu import gpu

CPU = torch.device("cpu")
ENDLESS = session.Deadline(1e6)


def saved(folder, section):
    with (folder / f"gpu_{section}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def dry(folder, section):
    command.run_section(section, DRY, CPU, folder)
    rows = saved(folder, section)
    assert all(row["torch"] == torch.__version__ and row["triton"] and row["date"] for row in rows)
    return rows


@pytest.fixture(scope="module")
def tiny_network():
    return random_model(DRY.memory.architecture, CPU, torch.float32)


# ---------------------------------------------------------------------- the sections


def test_attention_measures_every_method_on_every_layer(tmp_path):
    rows = dry(tmp_path, "attention")
    for case in DRY.layers:
        found = {row["method"]: row for row in rows if row["model"] == case.model}
        assert {"sdpa math", "our dense kernel", *(candidate.label for candidate in PACKED)} <= set(found)
        best = min(float(row["ms"]) for name, row in found.items() if name.startswith(("sdpa", "our dense")))
        for row in found.values():
            assert float(row["times_best_dense"]) == pytest.approx(best / float(row["ms"]))
            assert float(row["share_of_limit"]) == pytest.approx(float(row["times_best_dense"]) / float(row["limit"]))
    assert any(row["method"] == "sdpa math folded" for row in rows if row["model"] == "tiny grouped")


def test_steps_measure_every_lane_and_rival(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "PACKAGES", {})
    rows = dry(tmp_path, "steps")
    names = [row["method"] for row in rows]
    assert names[: len(LANES)] == [lane.label for lane in LANES]
    assert {rivals.dynamic().name, rivals.static().name, "CSR compact, 2 bit"} <= set(names)
    dense = float(rows[0]["step_ms"])
    assert all(float(row["times_dense"]) == pytest.approx(dense / float(row["step_ms"])) for row in rows)
    assert rows[1]["kv_mb"] < rows[0]["kv_mb"]


def test_headline_fills_one_memory_with_every_side(tmp_path):
    rows = {row["method"]: row for row in dry(tmp_path, "headline")}
    assert list(rows) == [BASELINE, DENSE.label, KIVI_2_SHORT.label, KIVI_2.label]
    for row in rows.values():
        assert int(row["batch"]) >= 1
        assert float(row["peak_gb"]) <= float(row["budget_gb"])
        assert int(row["steps"]) == DRY.headline.output
    short, long = (rows[method.label] for method in (KIVI_2_SHORT, KIVI_2))
    assert int(short["batch"]) > int(long["batch"]) > int(rows[DENSE.label]["batch"])
    assert float(short["times_batch"]) == int(short["batch"]) / int(rows[BASELINE]["batch"])


def test_memory_says_what_is_stored_and_leaves_out_what_only_an_allocator_knows(tmp_path):
    rows = dry(tmp_path, "memory")
    assert [row["phase"] for row in rows] == ["decode"] * len(LANES) + ["prompt"] * len(LANES)
    for row in rows:
        assert 0 < float(row["stored_mib"]) <= float(row["reserved_mib"])
        assert row["scratch_mib"] == ""


def test_lanes_that_do_not_fit_together_go_one_after_the_other(tiny_network, monkeypatch):
    held = []
    monkeypatch.setattr(steps, "_has_room", lambda *_: False)
    monkeypatch.setattr(steps.FilledCell, "close", lambda cell: held.append(cell.cell.candidate.label))
    lanes = [steps.Lane(candidate, NetworkBench(tiny_network)) for candidate in LANES[:2]]
    finding = steps.in_turns(lanes, 1, 160, 1, ENDLESS)
    assert next(finding).method == LANES[0].label
    assert not held
    assert next(finding).method == LANES[1].label
    assert held == [LANES[0].label]


def test_a_lane_that_lacks_memory_beside_others_is_taken_again_without_them(tiny_network, monkeypatch):
    original, tried = steps._filled, []

    def filled(lane, batch, context):
        tried.append(lane.candidate.label)
        if len(tried) == 2:
            raise OutOfMemory("no room beside the first")
        return original(lane, batch, context)

    monkeypatch.setattr(steps, "_filled", filled)
    lanes = [steps.Lane(candidate, NetworkBench(tiny_network)) for candidate in LANES[:2]]
    found = [entry.method for entry in steps.in_turns(lanes, 1, 160, 1, ENDLESS)]
    assert found == [LANES[0].label, LANES[1].label]
    assert tried == [LANES[0].label, LANES[1].label, LANES[1].label]


def test_copies_of_a_layer_are_different_layers():
    case = layers.Case("tiny", ModelShape(1, 4, 2, 32), 2, 300, torch.float32)
    for build, candidate in ((layers.kivi_steps, PACKED[0]), (layers.csr_steps, PACKED[-1])):
        outputs = [step().output for step in build(case, candidate.config, 3, CPU)]
        assert len(outputs) == 3
        assert all(output.shape == (2, 4, 32) and output.isfinite().all() for output in outputs)
        assert not torch.allclose(outputs[0], outputs[1])


# ---------------------------------------------------------------------- the largest batch


@pytest.mark.parametrize(("first", "step"), [(100, 8), (3, 8), (900, 8), (412, 1), (5, 1)])
def test_the_largest_batch_is_one_that_was_seen_to_fit(first, step):
    seen = {}

    def peak_of(batch):
        taken = 1000 + 23 * batch + batch**2 // 500
        seen[batch] = taken if taken <= 10_000 else None
        return seen[batch]

    found = largest_batch(peak_of, first=first, fixed=1000, limit=10_000, step=step)
    assert seen[found] is not None
    assert all(peak is None for batch, peak in seen.items() if batch > found)
    assert found % step == 0
    assert 0.97 * 380 < found <= 384


def test_where_not_one_sequence_fits_the_largest_batch_is_none():
    assert largest_batch(lambda batch: None, first=64, fixed=0, limit=1, step=8) == 0


# ---------------------------------------------------------------------- what goes wrong


@dataclass(frozen=True)
class Figure:
    name: str
    value: float | None


def test_rows_are_on_disk_as_soon_as_they_are_found(tmp_path):
    results = session.Results("test", tmp_path, CPU)
    results.add([])
    results.add([Figure("first", 1.0)])
    assert [row["name"] for row in saved(tmp_path, "test")] == ["first"]
    results.add([Figure("second", None)])
    assert [(row["name"], row["value"]) for row in saved(tmp_path, "test")] == [("first", "1.0"), ("second", "")]


def test_a_method_that_fails_is_left_out_with_its_reason(tmp_path, capsys, monkeypatch):
    def broken(layer, backend):
        raise NotImplementedError("no such backend\nand much more")

    monkeypatch.setattr(attention, "sdpa_step", lambda backend, layer, **_: broken(layer, backend))
    plan = replace(DRY, layers=DRY.layers[:1])
    attention.run(plan, CPU, session.Results("attention", tmp_path, CPU), ENDLESS)
    assert {row["method"] for row in saved(tmp_path, "attention")} == {
        "our dense kernel", *(candidate.label for candidate in PACKED)
    }  # fmt: skip
    assert "sdpa flash is left out: no such backend\n" in capsys.readouterr().out


def test_what_comes_too_late_is_left_out(tmp_path, capsys):
    attention.run(DRY, CPU, session.Results("attention", tmp_path, CPU), session.Deadline(0))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("is left out: the 0 s of this section are over") == len(DRY.layers)


def test_a_section_that_breaks_or_hangs_takes_no_other_with_it(monkeypatch, capsys, tmp_path):
    ran = []

    def run(arguments, *, timeout, **_):
        ran.append(arguments[arguments.index("--only") + 1])
        if ran[-1] == "attention":
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, returncode=1 if ran[-1] == "steps" else 0)

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["--dry-run", "--out", f"{tmp_path}", "--seconds", "40"]) == 0
    assert ran == ["attention", "steps", "headline", "memory"]
    told = capsys.readouterr().out
    assert "attention was stopped after 70 s" in told
    assert "steps ended with 1" in told


def test_a_section_runs_in_a_process_of_its_own(tmp_path, capfd):
    assert command.main(["--dry-run", "--only", "memory", "--out", f"{tmp_path}"]) == 0
    assert saved(tmp_path, "memory")
    assert "not measured  scratch in decode" in capfd.readouterr().out


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


# ---------------------------------------------------------------------- bars


def test_bars_are_read_from_the_tables(tmp_path):
    where = {"model": "Llama-2-7B", "method": KIVI_2.label, "how": "graph", "device": "NVIDIA H200"}
    with (tmp_path / "gpu_steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*where, "batch", "context", "times_dense"])
        writer.writeheader()
        writer.writerow(where | {"batch": 32, "context": 4096, "times_dense": 2.5})
        writer.writerow(where | {"batch": 1, "context": 32768, "times_dense": 1.4})
        writer.writerow(where | {"batch": 1, "context": 500, "times_dense": 1.4, "how": "eager"})
    told = list(bars.verdicts(tmp_path, ["steps"]))
    assert [line.partition("  ")[0].strip() for line in told] == ["met", "MISSED", "not measured"]
    assert "2.5 (bar 2.25), NVIDIA H200" in told[0]


def test_the_readme_says_what_the_tables_say(tmp_path):
    assert "No GPU figure is claimed yet" in gpu(tmp_path)
    for section in ("attention", "headline"):
        dry(tmp_path, section)
    told = gpu(tmp_path)
    assert "No GPU figure" not in told
    assert all(f" {candidate.label} |" in told for candidate in PACKED)
    batch = saved(tmp_path, "headline")[2]["batch"]
    assert f"| {KIVI_2_SHORT.label} | {batch} | " in told


# ---------------------------------------------------------------------- peers

CHECKOUT = '''
import torch


def cuda_bmm_fA_qB_outer(group_size, fA, qB, scales, zeros, bits):
    """Shapes as in KIVI: fA [B, nh, 1, K], qB [B, nh_kv, K, N * bits / 32], scales and zeros [B, nh_kv, K, N / G]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    codes = ((qB.long() & 0xFFFFFFFF).unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes = codes.flatten(-2).unflatten(-1, (-1, group_size))
    values = (codes * scales.unsqueeze(-1) + zeros.unsqueeze(-1)).flatten(-2)
    return fA @ values.repeat_interleave(fA.shape[1] // qB.shape[1], dim=1)


def triton_quantize_and_pack_along_last_dim(data, group_size, bit):
    groups = data.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / (2**bit - 1)
    codes = ((groups - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().long().flatten(-2)
    words = (codes.unflatten(-1, (-1, 32 // bit)) << torch.arange(0, 32, bit)).sum(-1)
    return (words - (words >= 2**31).long() * 2**32).int(), scale, low
'''


@pytest.fixture
def own_modules(monkeypatch):
    """Modules and paths that a checkout brings are gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "quant"]:
        del sys.modules[name]


@pytest.mark.parametrize("bits", [2, 4])
def test_kivis_own_code_is_called_as_it_wants_to_be(tmp_path, own_modules, bits):
    (tmp_path / "quant").mkdir()
    for name in ("matmul", "new_pack"):
        (tmp_path / "quant" / f"{name}.py").write_text(CHECKOUT)
    case = layers.Case("tiny grouped", ModelShape(1, 4, 2, 32), 2, 300, torch.float32)
    (layer,) = layers.dense_layers(case, 1, CPU)
    (step,) = peers.load(f"kivi={tmp_path}")[bits // 4].steps(case, layer, 1)

    checkout: dict = {}
    exec(CHECKOUT, checkout)

    def rounded(rows):
        packed = checkout["triton_quantize_and_pack_along_last_dim"](rows.contiguous(), 32, bits)
        identity = torch.eye(rows.shape[2]).expand(*rows.shape[:2], -1, -1)
        return checkout["cuda_bmm_fA_qB_outer"](32, identity, *packed, bits)

    keys = torch.cat([rounded(layer.keys[:, :, :256].mT).mT, layer.keys[:, :, 256:]], dim=2)
    values = torch.cat([rounded(layer.values[:, :, :171]), layer.values[:, :, 171:]], dim=2)
    want = F.scaled_dot_product_attention(layer.query, keys, values, enable_gqa=True)
    torch.testing.assert_close(step(), want, atol=1e-5, rtol=1e-4)


def test_a_peer_that_is_not_built_is_left_out(tmp_path, capsys, own_modules):
    case = DRY.layers[0]
    found = {row.method for row in attention.measure(case, CPU, 1.0, 0.0, peers.load(f"kivi={tmp_path}"))}
    assert not any("KIVI's own" in name for name in found)
    assert "KIVI's own code, 2 bit, no graph is left out" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["bitblas=.", "kivi=/no/such/folder", "kivi"])
def test_a_peer_that_cannot_be_meant_is_refused(given):
    with pytest.raises(ValueError, match="kivi"):
        peers.load(given)
