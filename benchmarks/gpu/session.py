"""What every section shares: rows saved as they are found, attempts that may fail, a limit on the time."""

import gc
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import report
from kvlens.engine.measure import conditions

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """Rows of one section: printed as they come, and saved each time, so that a run that is cut loses nothing."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.path = folder / f"gpu_{name}.csv"
        self._device = device
        self._saved: list[dict] = []

    def add(self, rows: Sequence[object]) -> None:
        """Dataclass rows, with the conditions of this moment: the clocks are those under load."""
        if rows:
            given = gpu_conditions(self._device)
            self._saved += [asdict(row) | given for row in rows]
            report.show(rows)
            report.write(self.path, self._saved)


@dataclass
class Deadline:
    """A section's share of the time; what it has not begun by then is left out."""

    seconds: float

    def __post_init__(self) -> None:
        self._until = time.perf_counter() + self.seconds

    @property
    def left(self) -> float:
        return max(0.0, self._until - time.perf_counter())

    def allows(self, what: str) -> bool:
        """Whether `what` may still begin; says so if not."""
        is_in_time = self.left > 0
        if not is_in_time:
            print(f"  {what} is left out: the {self.seconds:.0f} s of this section are over", flush=True)
        return is_in_time


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """A part whose failure is told in a line and ends nothing else: a rival may lack memory, a backend or a package."""
    try:
        yield
    except Exception as error:  # whatever a rival raises must not take the other figures with it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"  {what} is left out: {reason[:160]}", flush=True)


def release(device: torch.device) -> None:
    """Give back all memory of a GPU that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def gpu_conditions(device: torch.device) -> dict[str, str]:
    """What a figure depends on: versions, and on a GPU its driver, clocks and power at this moment."""
    found = conditions(device) | {"commit": _commit(), "triton": _triton_version()}
    if device.type != "cuda":
        return found
    found |= {"cuda": torch.version.cuda or "", "cudnn": f"{torch.backends.cudnn.version()}"}
    return found | _told_by_driver(device)


def _told_by_driver(device: torch.device) -> dict[str, str]:
    """By NVML; empty where it does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return {
            "driver": f"{pynvml.nvmlSystemGetDriverVersion()}",
            "sm_mhz": f"{pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)}",
            "memory_mhz": f"{pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)}",
            "power_w": f"{pynvml.nvmlDeviceGetPowerUsage(handle) / 1000:.0f}",
        }
    except pynvml.NVMLError as error:
        return {"driver": f"unknown ({error})", "sm_mhz": "", "memory_mhz": "", "power_w": ""}


def _commit() -> str:
    """The commit that is checked out; nothing outside a repository."""
    try:
        said = subprocess.run(("git", "rev-parse", "--short", "HEAD"), cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return said.stdout.strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__
