"""`python -m benchmarks.tune` without a GPU: what is compiled, what is raced, what is chosen and saved."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="launch configurations are Triton's")

from benchmarks import tune
from benchmarks.gpu.layers import Case
from benchmarks.gpu.session import Deadline
from benchmarks.tune import SEARCHES, Problem, Verdict
from kvlens.engine.shape import ModelShape
from kvlens.kernels import tuning
from kvlens.kernels.tuning import PackedConfiguration, SparseConfiguration

CPU = torch.device("cpu")
FITS = Verdict(0, 1024)
DEFAULTS = {operation: tuning.default_of(operation, tune.tiny(operation)[0].shape, 90) for operation in SEARCHES}


@pytest.fixture
def compiles(monkeypatch):
    """What compiling says of configurations; of those that are not in it, that they fit."""
    said = {}
    monkeypatch.setattr(tune, "_caught", lambda problem, configuration, arch: said.get(configuration, FITS))
    return said


class Clock(dict):
    """Milliseconds of configurations, 1 of those that it does not have; `raced` are those of every race."""

    def __init__(self) -> None:
        self.raced = []

    def __call__(self, walks, seconds):
        self.raced.append([*walks])
        return {configuration: self.get(configuration, 1.0) for configuration in walks}


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(tune, "in_turns", fake)
    return fake


def best_of(operation: str) -> tuning.Tuned:
    (best,) = tune.tune(tune.tiny(operation), CPU, Deadline(1e6), seconds=0.0, num_processes=1)
    return best


# ---------------------------------------------------------------------- the plan


@pytest.mark.parametrize("operation", SEARCHES)
def test_the_plan_has_every_shape_once(operation):
    shapes = [problem.shape for problem in tune.problems(operation)]
    assert len(shapes) == len({*shapes})
    assert {shape.head_dim for shape in shapes} == {64, 96, 128, 256}
    assert {shape.heads_per_kv for shape in shapes} == {1, 4, 8}
    assert {shape.batch for shape in shapes} == {1, 8, 32}
    assert {shape.bits for shape in shapes} == ({2, 4} if operation == "packed_attend" else {0})
    variants = SEARCHES[operation].variants(DEFAULTS[operation])
    assert variants[0] == DEFAULTS[operation]
    assert len(variants) == len({*variants})


@pytest.mark.parametrize("operation", ["packed_attend", "sparse_attend"])
def test_a_twin_has_the_same_machine_code(operation):
    """Triton compiles anew for other constants, and for strides that 16 divides or does not."""
    shape = ModelShape(1, 8, 1, 64)
    problem = Problem(operation, Case(operation, shape, 1, tune.TOKENS[1]), 2 if operation == "packed_attend" else 0)
    of_both = []
    for each in (problem, problem.twin):
        (layer,) = each.layers(1, CPU)
        launches = SEARCHES[operation].prepare(*layer, scaling=1.0, configuration=DEFAULTS[operation])[1][:-1]
        of_both.append(
            [
                (name, value if not isinstance(value, int) else value % 16 == 0)
                for launch in launches
                for name, value in launch.arguments.items()
                if not isinstance(value, torch.Tensor)
            ]
        )
    assert of_both[0] == of_both[1]


# ---------------------------------------------------------------------- what compiling says


@pytest.mark.parametrize("operation", SEARCHES)
def test_compiling_tells_spills_and_shared_memory(operation):
    (problem,) = tune.tiny(operation)
    said = tune.verdict(problem.twin, DEFAULTS[operation], 90)
    assert said.stack_bytes == 0
    assert said.shared_bytes > 0
    assert said.objection(90) is None


def test_what_does_not_fit_is_told_with_its_reason():
    assert Verdict(16, 0).objection(90) is None
    assert Verdict(256, 0).objection(90) == "spills 256 bytes"
    assert Verdict(0, 200 * 1024).objection(90) is None
    assert Verdict(0, 200 * 1024).objection(120) == f"needs {200 * 1024} of {99 * 1024} bytes of shared memory"


def test_what_spills_or_breaks_the_compiler_is_not_raced(compiles, clock, capsys):
    search = SEARCHES["packed_attend"].variants(DEFAULTS["packed_attend"])
    compiles[search[1]] = Verdict(256, 0)
    compiles[search[2]] = ValueError("no such instruction")
    best_of("packed_attend")
    raced = {configuration for walks in clock.raced for configuration in walks}
    assert search[0] in raced
    assert not {search[1], search[2]} & raced
    told = capsys.readouterr().out
    assert f"{search[1]} spills 256 bytes" in told
    assert f"{search[2]} no such instruction" in told


def test_a_compiler_that_fails_is_no_end(monkeypatch):
    def broken(problem, configuration, arch):
        raise RuntimeError("PassManager::run failed\nand much more")

    monkeypatch.setattr(tune, "verdict", broken)
    said = tune.verdicts(tune.tiny("sparse_attend"), 90, num_processes=1)
    assert {str(each) for each in said.values()} == {"PassManager::run failed"}


# ---------------------------------------------------------------------- the race


def test_the_fastest_code_is_raced_with_other_numbers_of_programs(compiles, clock):
    default = DEFAULTS["packed_attend"]
    code = replace(default, num_stages=4)
    clock[code] = 0.8
    clock[replace(code, programs=12)] = 0.5
    best = best_of("packed_attend")
    assert best.configuration == replace(code, programs=12)
    assert (best.milliseconds, best.default_milliseconds, best.tokens) == (0.5, 1.0, 300)
    first, second = clock.raced
    assert {each.programs for each in first} == {default.programs}
    assert {each.num_stages for each in second} == {default.num_stages, 4}


def test_a_gain_within_the_noise_keeps_the_default(compiles, clock):
    clock[SparseConfiguration(programs=8)] = 0.995
    best = best_of("sparse_attend")
    assert best.configuration == DEFAULTS["sparse_attend"]
    assert best.milliseconds == best.default_milliseconds == 1.0


@pytest.mark.parametrize("wrong", [torch.nan, 1.5])
def test_a_wrong_or_failing_configuration_is_left_out(compiles, clock, monkeypatch, capsys, wrong):
    original = tune.Race._step

    def step(race, layer, configuration):
        if configuration.num_stages == 1:
            raise RuntimeError("an illegal memory access")
        right = original(race, layer, configuration)
        return (lambda: right() * wrong) if configuration.num_stages == 4 else right

    monkeypatch.setattr(tune.Race, "_step", step)
    for stages in (1, 4):
        clock[replace(DEFAULTS["packed_attend"], num_stages=stages)] = 0.1
    assert best_of("packed_attend").configuration == DEFAULTS["packed_attend"]
    told = capsys.readouterr().out
    assert "an illegal memory access" in told
    assert "Tensor-likes are not close" in told


def test_what_comes_too_late_keeps_its_default(compiles, clock, capsys):
    assert not list(tune.tune(tune.tiny("packed_attend"), CPU, Deadline(0), seconds=0.0, num_processes=1))
    assert "left out: the 0 s" in capsys.readouterr().out


# ---------------------------------------------------------------------- the command


def test_a_dry_run_lists_the_plan_and_goes_the_whole_way(compiles, tmp_path, capsys):
    assert tune.main(["--dry-run", "--out", f"{tmp_path}"]) == 0
    (path,) = tmp_path.iterdir()
    arch, found = tuning.read(path)
    assert arch == 90
    assert [*found] == [*SEARCHES]
    for operation, (best,) in found.items():
        assert best.shape == tune.tiny(operation)[0].shape
        assert 0 < best.milliseconds <= best.default_milliseconds
    conditions = json.loads(path.read_text())["operations"]["packed_attend"]["conditions"]
    assert conditions["torch"] == torch.__version__
    assert conditions["triton"]
    assert conditions["date"]
    assert "packed_attend: 72 shapes" in capsys.readouterr().out


def test_one_operation_leaves_the_others_as_they_were(compiles, clock, tmp_path):
    tune.main(["--dry-run", "--out", f"{tmp_path}", "--operation", "packed_attend"])
    clock[replace(DEFAULTS["packed_attend"], programs=3)] = 0.5
    tune.main(["--dry-run", "--out", f"{tmp_path}", "--operation", "sparse_attend"])
    (path,) = tmp_path.iterdir()
    found = tuning.read(path)[1]
    assert found["packed_attend"][0].configuration == DEFAULTS["packed_attend"]
    tune.main(["--dry-run", "--out", f"{tmp_path}", "--operation", "packed_attend"])
    found = tuning.read(path)[1]
    assert isinstance(found["packed_attend"][0].configuration, PackedConfiguration)
    assert found["packed_attend"][0].configuration.programs == 3
    assert [*found] == ["packed_attend", "sparse_attend"]


def test_without_a_gpu_it_says_what_to_do(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out
