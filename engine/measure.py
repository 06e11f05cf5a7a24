"""Clocks and memory: milliseconds of a step, bytes of the process and of the device."""

import datetime
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
import transformers

import kvlens
from kvlens.engine.trace import MachineMemory


@dataclass
class Stopwatch:
    """Milliseconds between entering and leaving `measure`, taken where the work happens."""

    milliseconds: float = 0.0

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Times a block: CUDA events on a GPU (the block is waited for), the wall clock elsewhere."""
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)
            start.record(stream)
            yield
            stop.record(stream)
            stop.synchronize()
            self.milliseconds = start.elapsed_time(stop)
        else:
            begin = time.perf_counter()
            yield
            self.milliseconds = 1000 * (time.perf_counter() - begin)


def machine_memory(device: torch.device) -> MachineMemory:
    """What the process and, on a GPU, the allocator and the whole device hold now."""
    process_bytes = psutil.Process().memory_info().rss
    if device.type != "cuda":
        return MachineMemory(process_bytes)
    used, total = _device_bytes(device)
    return MachineMemory(
        process_bytes,
        device_allocated_bytes=torch.cuda.memory_allocated(device),
        device_peak_bytes=torch.cuda.max_memory_allocated(device),
        device_used_bytes=used,
        device_total_bytes=total,
    )


def device_name(device: torch.device) -> str:
    """The device in words, such as `NVIDIA H200` or `Intel Xeon, 2 cores`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory: the GPU's L2, or the processor's own, 32 MiB where it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    told = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in (one.read_text().strip() for one in told)]
    return max(sizes, default=32 * 2**20)


def conditions(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a figure depends on besides the code: date, device, versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": device_name(torch.device(device)),
        "kvlens": kvlens.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _device_bytes(device: torch.device) -> tuple[int | None, int | None]:
    """Used and total bytes of the whole card by NVML, other processes included; None without a driver."""
    nvml = _nvml()
    if nvml is None:
        return None, None
    index = torch.cuda.current_device() if device.index is None else device.index
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return memory.used, memory.total


@cache
def _nvml():
    """The `pynvml` module (package nvidia-ml-py) once it is initialised; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


@cache
def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return " ".join(line.split(":", 1)[1].replace("(R)", "").replace("Processor", "").split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
