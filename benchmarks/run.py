"""Every benchmark that this machine can run, one after the other, then the README's tables: `make bench`."""

import subprocess
import sys

import torch

CPU = ("cpu", "agreement", "replay")
GPU = ("gpu", "decode", "agreement")


def main() -> None:
    for name in GPU if torch.cuda.is_available() else CPU:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    subprocess.run([sys.executable, "-m", "tools.readme"], check=True)


if __name__ == "__main__":
    main()
