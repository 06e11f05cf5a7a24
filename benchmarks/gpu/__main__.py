"""What an NVIDIA GPU does with compressed caches, in one command: tests first, then every table, printed and saved.

    python -m benchmarks.gpu                        everything, at most ten minutes on an H200 after the tests
    python -m benchmarks.gpu --only steps           one section (or several), without the others
    python -m benchmarks.gpu --dry-run              tiny shapes on a CPU: checks this program, measures nothing

Sections: attention of one layer; whole decode steps of networks with random weights; the paper's headline in one
memory (`--budget`); peak memory. Each runs in a process of its own, so that one that fails takes no other with it;
what does not fit, is not installed or comes too late is left out with its reason. Tables are saved as
`gpu_<section>.csv` after every case. The last lines say which of the project's bars are met.
"""

import argparse
import gc
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from os import cpu_count
from pathlib import Path

import torch

from benchmarks.gpu import bars, peers
from benchmarks.gpu.plan import DRY, FULL, SECTIONS, Plan
from benchmarks.gpu.session import ROOT, Deadline, Results, attempt
from benchmarks.report import RESULTS

_GRACE_SECONDS = 60
"""A section stops by itself when its time is over; this much later it is stopped."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="measure these alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; saved nowhere without --out")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the GPU tests first")
    parser.add_argument("--out", type=Path, help="folder for the tables, instead of benchmarks/results")
    parser.add_argument("--budget", type=float, metavar="GB", help="memory of the headline's sides (80)")
    parser.add_argument("--seconds", type=float, help="time for all sections together, instead of the plan's")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="another's checkout: kivi=PATH"
    )
    parser.add_argument("--here", action="store_true", help="in this process: no tests first, no bars at the end")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("This benchmark needs an NVIDIA GPU, and torch sees none. `--dry-run` checks the program without one.")
        return 2
    plan = _plan(given)
    with tempfile.TemporaryDirectory() as nowhere:
        folder = given.out or (Path(nowhere) if given.dry_run else RESULTS)
        if given.here:
            gc.freeze()  # what is loaded stays: each of many collections would walk through all of it
            for section in given.only:
                run_section(section, plan, torch.device("cpu" if given.dry_run else "cuda"), folder, given.peer)
            return 0
        if not (given.dry_run or given.skip_tests) and not _tests_pass():
            print("The GPU tests failed; times of wrong kernels are not worth having (--skip-tests takes them anyway).")
            return 1
        print("\n".join(f"{section}: at most {plan.seconds[section]:.0f} s" for section in given.only), flush=True)
        for section in given.only:
            _run_apart(section, plan.seconds[section], folder, given)
        print("\n".join(bars.verdicts(folder, given.only)), flush=True)
    return 0


def run_section(section: str, plan: Plan, device: torch.device, folder: Path, given_peers: Sequence[str] = ()) -> None:
    """One section in this process. Its rows are saved as `gpu_<section>.csv` in `folder`."""
    print(f"== {section}", flush=True)
    module = importlib.import_module(f"benchmarks.gpu.{section}")
    options = {"peers": [peer for name in given_peers for peer in peers.load(name)]} if section == "attention" else {}
    with attempt(section):
        results = Results(section, folder, device)
        module.run(plan, device, results, Deadline(plan.seconds[section]), **options)


def _plan(given: argparse.Namespace) -> Plan:
    plan = DRY if given.dry_run else FULL
    if given.budget is not None:
        plan = replace(plan, headline=replace(plan.headline, budget_bytes=int(given.budget * 1e9)))
    if given.seconds is not None:
        share = given.seconds / sum(plan.seconds[section] for section in given.only)
        plan = replace(plan, seconds={section: share * seconds for section, seconds in plan.seconds.items()})
    return plan


def _run_apart(section: str, seconds: float, folder: Path, given: argparse.Namespace) -> None:
    """A section in a process of its own: nothing that breaks there, a lost device least of all, reaches the next."""
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--here", "--only", section,
        "--out", f"{folder.resolve()}", "--seconds", f"{seconds}",
        *(["--dry-run"] if given.dry_run else []),
        *(["--budget", f"{given.budget}"] if given.budget is not None else []),
        *(part for peer in given.peer for part in ("--peer", peer)),
    ]  # fmt: skip
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds + _GRACE_SECONDS).returncode
        if code:
            print(f"{section} ended with {code}; what it had found is saved", flush=True)
    except subprocess.TimeoutExpired:
        print(f"{section} was stopped after {seconds + _GRACE_SECONDS:.0f} s; what it had found is saved", flush=True)


def _tests_pass() -> bool:
    """The tests that need a GPU, whichever files they are in; on all cores where pytest-xdist is installed, since most
    of their time goes into compiling kernels."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    workers = ["-n", f"{cpu_count() or 1}"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *workers, *map(str, files)]
    return subprocess.run(command, cwd=ROOT).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
