"""What a CPU does with compressed caches, in one command: tests first, then every table, printed and saved.

    python -m benchmarks.cpu

Rivals run in the same process and minute: torch's dense attention in every dtype and way, Hugging Face's exact and
quantized caches. Run it alone on the machine: another busy core shows in every figure.
"""

import subprocess
import sys

TESTS = ("tests/kernels", "tests/engine/test_contract.py")
PARTS = ("bandwidth", "packed_attend_cpu", "decode", "startup")


def main() -> None:
    subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS, "-m", "not gpu"], check=True)
    for name in PARTS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)


if __name__ == "__main__":
    main()
