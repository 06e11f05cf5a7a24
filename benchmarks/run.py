"""Every benchmark that this machine can run, one after the other, then the README's tables: `make bench`.

The kernel tests run first: no speed of a kernel that is wrong.
"""

import subprocess
import sys

import torch

CPU = ("packed_attend_cpu", "decode", "agreement", "replay")
GPU = ("gpu", "decode", "agreement")


def main() -> None:
    subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/kernels", "-m", "not gpu"], check=True)
    for name in GPU if torch.cuda.is_available() else CPU:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    subprocess.run([sys.executable, "-m", "tools.readme"], check=True)


if __name__ == "__main__":
    main()
