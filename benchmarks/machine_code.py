"""What a Triton kernel has become: registers, spills, shared memory, and the instructions of its loops."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_LABEL = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class MachineCode:
    """Of one kernel: registers a thread, bytes spilled, bytes of shared memory, its instructions by name in their
    order, and its loops: places between the target of a backward branch and the branch."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    names: tuple[str, ...]
    loops: tuple[range, ...]

    @classmethod
    def of(cls, kernel: Any) -> "MachineCode":
        """That of a compiled kernel, as `Launch.compile` gives it."""
        usage = inspect(kernel.asm["cubin"])
        return cls(
            usage["REG"], usage["STACK"], kernel.metadata.shared, *_parse(_run("nvdisasm", "-c", kernel.asm["cubin"]))
        )

    @cached_property
    def main_loop(self) -> range:
        """The longest, or an empty one."""
        return max(self.loops, key=len, default=range(0))

    @property
    def loop(self) -> Counter:
        """The instructions of the longest loop by name."""
        return Counter(self.names[place] for place in self.main_loop)

    @property
    def num_instructions(self) -> int:
        """Of the whole program, each once."""
        return sum(name != "NOP" for name in self.names)

    def issued(self, trips: tuple[float, ...] = ()) -> float:
        """Instructions that a pass of the longest loop takes, where the loops within it run `trips` times each.

        They come in the order in which they begin; those for which there is no loop were unrolled, innermost first.
        Raises: ValueError for fewer trips than loops.
        """
        main = self.main_loop
        inner = [loop for loop in self.loops if loop != main and main.start <= loop.start and loop.stop <= main.stop]
        if len(inner) > len(trips):
            raise ValueError(f"trips must have one number for each loop within the longest, {len(inner)}; got {trips}")
        return sum(prod(times for loop, times in zip(inner, trips) if place in loop) for place in main)  # noqa: B905


def inspect(cubin: bytes) -> dict[str, int]:
    """`cuobjdump -res-usage` of a single kernel: REG, STACK, SHARED, LOCAL and others."""
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", _run("cuobjdump", "-res-usage", cubin))}


def _parse(code: str) -> tuple[tuple[str, ...], tuple[range, ...]]:
    """Names and loops of a disassembly."""
    names: list[str] = []
    labels: dict[str, int] = {}
    ends: dict[int, int] = {}  # of each loop, by where it begins
    for line in code.splitlines():
        if line.startswith(".L_x_"):
            labels[line.partition(":")[0]] = len(names)
        if instruction := _INSTRUCTION.match(line):
            names.append(instruction[1])
            target = _LABEL.search(instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[0] in labels and labels[target[0]] < len(names) - 1:  # not the trap behind the end
                ends[labels[target[0]]] = len(names)
    return tuple(names), tuple(range(start, ends[start]) for start in sorted(ends))


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
