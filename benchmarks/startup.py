"""How long a start takes, through the real HTTP API: to the page and to the first token of an answer.

    python -m benchmarks.startup [--starts 3]

Each start is a new process of `app.py`; the question is asked as soon as the page answers, as an eager visitor
would. `first` is the first start on a machine: it finds no compiled kernels on disk.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 180
QUESTION = {"data": ["Tell me a short story.", None, "", 8, 0.0, 1.0, 0]}


@dataclass(frozen=True)
class Row:
    """One start: "first", or its number. Units: seconds since the process was started."""

    start: str
    page_s: float
    first_token_s: float


def measure(name: str, **variables: str) -> Row:
    """A start with these variables in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, begin = f"http://127.0.0.1:{port}", time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"} | variables
    process = subprocess.Popen(
        [sys.executable, ROOT / "app.py", "--port", str(port)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        state = _waited(process, begin, lambda: _read(f"{address}/healthz"))
        page = time.perf_counter() - begin
        event = json.loads(_read(f"{address}/gradio_api/call/compare", QUESTION))["event_id"]
        first_token = _first_token(f"{address}/gradio_api/call/compare/{event}", begin)
        state = json.loads(_read(f"{address}/healthz"))
        if state["state"] != "ready":
            raise RuntimeError(f"an answer came from a model that is not ready: {state}")
        return Row(name, page, first_token)
    finally:
        process.terminate()
        process.wait()


def _first_token(address: str, begin: float) -> float:
    """Seconds until a lane has a text."""
    with urllib.request.urlopen(address, timeout=LIMIT_SECONDS) as lines:
        for line in lines:
            if line.startswith(b"data:"):
                (run,) = json.loads(line[5:])
                if any(lane["text"] for lane in run["lanes"].values()):
                    return time.perf_counter() - begin
    raise RuntimeError("the answer ended without a token")


def _waited(process: subprocess.Popen, begin: float, read: Callable[[], bytes]) -> bytes:
    while time.perf_counter() - begin < LIMIT_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"app.py ended with {process.returncode}")
        try:
            return read()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.02)
    raise RuntimeError(f"no page after {LIMIT_SECONDS} s")


def _read(address: str, data: dict | None = None) -> bytes:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LIMIT_SECONDS) as answer:
        return answer.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3)
    num_starts = parser.parse_args().starts
    with TemporaryDirectory() as empty:
        rows = [measure("first", NUMBA_CACHE_DIR=empty)]
    rows += [measure(str(number + 1)) for number in range(num_starts)]
    report.show(rows)
    report.save("startup", rows)


if __name__ == "__main__":
    main()
