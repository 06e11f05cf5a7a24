"""Find the fastest launch configurations of this GPU and save them, in one command of about five minutes.

    python -m benchmarks.tune                                  all operations, for the shapes that matter
    python -m benchmarks.tune --operation dense_attend         one (or several); what the file has of others stays
    python -m benchmarks.tune --dry-run                        lists the plan, then one tiny shape on a CPU

Every configuration that is other machine code is compiled first, in a process for each core, for a small twin of the
shape; one that spills many registers or needs more shared memory than there is goes no further. The others are raced
on a layer far larger than the caches, in CUDA graphs and in turns; then the fastest with different numbers of
programs. A configuration whose output differs from the default's is left out; one that gains less than a percent too.

Saved after each operation in `kernels/tuned/<device>.json`, which `kernels/tuning.py` reads, with the conditions.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.gpu import layers
from benchmarks.gpu.layers import Case
from benchmarks.gpu.session import Deadline, attempt, gpu_conditions, release
from benchmarks.gpu.timing import copies_beyond_cache, in_turns, timed
from benchmarks.machine_code import inspect
from kvlens.engine.measure import device_name
from kvlens.engine.methods.csr import CsrConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.shape import ModelShape
from kvlens.kernels import tuning
from kvlens.kernels.compiled import arch_of
from kvlens.kernels.dense_attend import triton as dense_triton
from kvlens.kernels.packed_attend import triton as packed_triton
from kvlens.kernels.sparse_attend import triton as sparse_triton
from kvlens.kernels.tuning import Configuration, Shape, Tuned

TOKENS = {32: 4096, 1: 32768, 8: 8192}
"""How long the sequences of a batch are."""

MOST_SPILLED = 192
"""Bytes of registers that may wait in memory while a loop runs, as they do for heads of 256 channels."""

LEAST_GAIN = 1.01
TOLERANCE = 4e-3
"""Largest difference from the default's output: configurations round p * scale in different places."""


@dataclass(frozen=True)
class Problem:
    """An attention of one layer that a configuration is sought for; `bits` are those of packed keys and values."""

    operation: str
    case: Case
    bits: int = 0

    @property
    def shape(self) -> Shape:
        shape = self.case.shape
        return Shape(shape.head_dim, shape.num_query_heads // shape.num_kv_heads, self.case.batch, self.bits)

    @property
    def twin(self) -> "Problem":
        """A small one that the same machine code is made for, in the dtype that is tuned."""
        return replace(self, case=replace(self.case, batch=1, tokens=512, dtype=torch.float16))

    def layers(self, copies: int, device: torch.device) -> list[layers.PackedLayer | layers.SparseLayer | tuple]:
        """What the operation takes, for each of so many layers."""
        if self.operation == "dense_attend":
            return [layer.inputs for layer in layers.dense_layers(self.case, copies, device)]
        build = {"packed_attend": layers.kivi_layers, "sparse_attend": layers.csr_layers}[self.operation]
        return build(self.case, self._config, copies, device)

    @property
    def layer_bytes(self) -> int:
        return self.case.stored_bytes(self._config) if self._config else self.case.dense_bytes

    @property
    def _config(self) -> KiviConfig | CsrConfig | None:
        if self.operation == "packed_attend":
            return KiviConfig(key_bits=self.bits, value_bits=self.bits)
        return CsrConfig() if self.operation == "sparse_attend" else None


@dataclass(frozen=True)
class Search:
    """How an operation is launched, and the values that each field of its configuration may take."""

    prepare: Callable
    code: dict[str, tuple[int, ...]]  # what decides the machine code
    programs: tuple[int, ...]

    def variants(self, default: Configuration) -> list[Configuration]:
        """The default, then every other machine code."""
        found = [
            replace(default, **dict(zip(self.code, values, strict=True))) for values in product(*self.code.values())
        ]
        return [default, *(each for each in found if each != default)]


SEARCHES = {
    "packed_attend": Search(packed_triton.prepare, {"num_stages": (1, 2, 3, 4)}, (2, 3, 4, 5, 6, 8, 10, 12)),
    "dense_attend": Search(
        dense_triton.prepare,
        {"num_stages": (2, 3, 4), "num_warps": (1, 2, 4), "tile_bytes": (4096, 8192, 16384)},
        (2, 3, 4, 6, 8, 12),
    ),
    "sparse_attend": Search(sparse_triton.prepare, {"tile_tokens": (32, 64, 128)}, (4, 8, 12, 16, 24, 32)),
}


@dataclass(frozen=True)
class Verdict:
    """What keeps a configuration from being raced, if anything does."""

    stack_bytes: int
    shared_bytes: int

    def objection(self, arch: int) -> str | None:
        if self.stack_bytes > MOST_SPILLED:
            return f"spills {self.stack_bytes} bytes"
        most = 1024 * tuning.shared_kibibytes(arch)
        return f"needs {self.shared_bytes} of {most} bytes of shared memory" if self.shared_bytes > most else None


@dataclass(frozen=True)
class Row:
    """The outcome for one shape, as it is printed."""

    operation: str
    head_dim: int
    bits: int
    heads_per_kv: int
    batch: int
    tokens: int
    default_ms: float
    ms: float
    gain: float
    configuration: str


def problems(operation: str) -> list[Problem]:
    """Those of an operation; should time run out, every head dim has been measured before more heads a group are."""
    return [
        Problem(operation, Case(operation, ModelShape(1, 32, 32 // heads_per_kv, head_dim), batch, TOKENS[batch]), bits)
        for heads_per_kv in (1, 4, 8)
        for head_dim in (128, 64, 96, 256)
        for bits in ((2, 4) if operation == "packed_attend" else (0,))
        for batch in TOKENS
    ]


def tiny(operation: str) -> list[Problem]:
    case = Case(operation, ModelShape(1, 4, 2, 64), 1, 300, torch.float32)
    return [Problem(operation, case, 4 if operation == "packed_attend" else 0)]


def verdict(problem: Problem, configuration: Configuration, arch: int) -> Verdict:
    """What compiling says of a problem and a configuration. Runs without a GPU, in a process of its own."""
    (layer,) = problem.layers(1, torch.device("cpu"))
    prepare = SEARCHES[problem.operation].prepare
    _, launches = prepare(*layer, scaling=problem.case.scaling, arch=arch, configuration=configuration)
    compiled = [launch.compile(arch) for launch in launches]
    spilled = max(inspect(kernel.asm["cubin"])["STACK"] for kernel in compiled)
    return Verdict(spilled, max(kernel.metadata.shared for kernel in compiled))


def verdicts(
    wanted: Sequence[Problem], arch: int, *, num_processes: int
) -> dict[tuple[Problem, Configuration], Verdict | Exception]:
    """Of all configurations of all problems, by their twins. What cannot be compiled has its exception instead."""
    twins = dict.fromkeys(problem.twin for problem in wanted)
    asked = [
        (twin, configuration)
        for twin in twins
        for configuration in SEARCHES[twin.operation].variants(tuning.default_of(twin.operation, twin.shape, arch))
    ]
    if num_processes == 1:
        return {key: _caught(*key, arch) for key in asked}
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(asked, pool.map(_caught, *zip(*asked, strict=True), [arch] * len(asked)), strict=True))


def _caught(problem: Problem, configuration: Configuration, arch: int) -> Verdict | Exception:
    try:
        return verdict(problem, configuration, arch)
    except Exception as error:  # told, and the configuration is left out
        return ValueError((str(error).strip() or type(error).__name__).splitlines()[0])


class Race:
    """The layers of one problem, and the configurations on them."""

    def __init__(self, problem: Problem, device: torch.device, seconds: float) -> None:
        self._problem, self._device, self._seconds = problem, device, seconds
        self._layers = problem.layers(copies_beyond_cache(problem.layer_bytes, device), device)
        self._expected: torch.Tensor | None = None

    def run(self, configurations: Sequence[Configuration]) -> dict[Configuration, float]:
        """Milliseconds of a layer; without those that fail or give another output than the first of the first run."""
        walks = {}
        for configuration in dict.fromkeys(configurations):
            with attempt(f"{configuration}"):
                steps = [self._step(layer, configuration) for layer in self._layers]
                output = steps[0]()
                self._expected = output.clone() if self._expected is None else self._expected
                torch.testing.assert_close(output, self._expected, atol=TOLERANCE, rtol=TOLERANCE)
                walks[configuration] = timed(steps, self._problem.layer_bytes, self._device)
        return in_turns(walks, self._seconds)

    def _step(self, layer: tuple, configuration: Configuration) -> Callable[[], torch.Tensor]:
        """The launches of a layer, prepared once; a CPU, which has no configurations, takes its own kernel."""
        scaling = self._problem.case.scaling
        if self._device.type == "cpu":
            return partial(_attend_on_cpu, self._problem.operation, layer, scaling)
        prepare = SEARCHES[self._problem.operation].prepare
        result, launches = prepare(*layer, scaling=scaling, configuration=configuration)

        def step() -> torch.Tensor:
            for launch in launches:
                launch.run()
            return result.output

        return step


def _attend_on_cpu(operation: str, layer: tuple, scaling: float) -> torch.Tensor:
    if operation == "dense_attend":
        return layers.paths.native(*layer, scaling=scaling, longest=layer[1].shape[2], is_ragged=False)
    attend = {"packed_attend": layers.packed_attend, "sparse_attend": layers.sparse_attend}[operation]
    return attend(*layer, scaling=scaling).output


def fastest(problem: Problem, fitting: Sequence[Configuration], device: torch.device, seconds: float) -> Tuned:
    """The best of the machine codes, then of the numbers of programs with it. The first is what others must beat."""
    race, base = Race(problem, device, seconds), fitting[0]
    first = race.run(fitting)
    best = min(first, key=first.__getitem__)
    found = race.run([base, best, *(replace(best, programs=each) for each in SEARCHES[problem.operation].programs)])
    best = min(found, key=found.__getitem__)
    if found[base] < LEAST_GAIN * found[best]:
        best = base
    return Tuned(problem.shape, best, problem.case.tokens, found[best], found[base])


def tune(
    wanted: Sequence[Problem], device: torch.device, deadline: Deadline, *, seconds: float, num_processes: int
) -> Iterator[Tuned]:
    """The fastest configuration of each problem, for as long as the time lasts."""
    arch = arch_of(device)
    told: set[tuple[Problem, Configuration]] = set()
    found = verdicts(wanted, arch, num_processes=num_processes)
    for problem in wanted:
        if not deadline.allows(f"{problem.shape}"):
            return
        fitting = []
        default = tuning.default_of(problem.operation, problem.shape, arch)
        for configuration in SEARCHES[problem.operation].variants(default):
            said = found[problem.twin, configuration]
            objection = said.objection(arch) if isinstance(said, Verdict) else f"{said}"
            if objection is None:
                fitting.append(configuration)
            elif (problem.twin, configuration) not in told:
                told.add((problem.twin, configuration))
                print(f"  {problem.twin.shape}: {configuration} {objection}")
        with attempt(f"{problem.shape}"):
            yield fastest(problem, fitting or [default], device, seconds)
        release(device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--operation", nargs="+", choices=SEARCHES, default=[*SEARCHES], help="tune these alone")
    parser.add_argument("--dry-run", action="store_true", help="the plan, and a tiny shape on a CPU")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS", help="for all (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="instead of kernels/tuned")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("Tuning needs an NVIDIA GPU, and torch sees none. `--dry-run` shows the plan and checks the program.")
        return 2
    device = torch.device("cpu" if given.dry_run else "cuda")
    until = Deadline(given.budget)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = given.out or (Path(nowhere) if given.dry_run else tuning.TUNED)
        for place, operation in enumerate(given.operation):
            describe(operation, arch_of(device))
            left = {each: len(problems(each)) for each in given.operation[place:]}
            share = Deadline(until.left * left[operation] / sum(left.values()))
            wanted = tiny(operation) if given.dry_run else problems(operation)
            settings = {"seconds": 0.0, "num_processes": 1} if given.dry_run else {
                "seconds": 0.05, "num_processes": cpu_count() or 1
            }  # fmt: skip
            best = list(tune(wanted, device, share, **settings))
            if best:
                report.show([row(operation, each) for each in best])
                name, conditions = device_name(device), gpu_conditions(device)
                print(
                    f"saved {tuning.save(name, arch_of(device), conditions, {operation: best}, folder)}\n", flush=True
                )
    return 0


def describe(operation: str, arch: int) -> None:
    """The plan of an operation: shapes, and what is tried on each."""
    wanted, search = problems(operation), SEARCHES[operation]
    print(f"== {operation}: {len(wanted)} shapes")
    for name, values in {
        "head_dim": {each.shape.head_dim for each in wanted},
        "bits": {each.shape.bits for each in wanted},
        "heads a key/value head": {each.shape.heads_per_kv for each in wanted},
        "batch": {each.shape.batch for each in wanted},
        **search.code,
        "programs a multiprocessor": search.programs,
    }.items():
        print(f"  {name}: {', '.join(map(str, sorted(values)))}")
    print(f"  default for {wanted[0].shape}: {tuning.default_of(operation, wanted[0].shape, arch)}", flush=True)


def row(operation: str, tuned: Tuned) -> Row:
    shape, changed = tuned.shape, ", ".join(f"{name} {each}" for name, each in asdict(tuned.configuration).items())
    return Row(
        operation, shape.head_dim, shape.bits, shape.heads_per_kv, shape.batch, tuned.tokens,
        tuned.default_milliseconds, tuned.milliseconds, tuned.default_milliseconds / tuned.milliseconds, changed,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
