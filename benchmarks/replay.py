"""What live panels cost the page: a recorded run replayed at 50 tokens/s a lane, panels live against off.

    python -m benchmarks.replay            # prints a table, saves benchmarks/results/replay.csv

Wanted: panels live lose under 5 % of the tokens/s, and the page stays above 30 frames/s. Server and
Chromium (software rendering) share this machine; nothing is computed by the model meanwhile.
"""

import argparse
import csv
import datetime
import os
import platform
import shutil
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "replay.csv"

# Counts frames and updates from the first to the last token of a replay.
MEASURE = """(name) => new Promise((resolve) => {
    const log = { frames: 0, worst: 0, start: null, end: null };
    let before = null;
    const drawn = KVLens.feed.drawn;
    const look = (now) => {
        if (document.body.dataset.kvState === 'replay') {
            log.start ??= now;
            log.frames += 1;
            if (before !== null) log.worst = Math.max(log.worst, now - before);
            before = now;
        } else if (log.start !== null) {
            log.end = now;
            log.updates = KVLens.feed.drawn - drawn;
            return resolve(log);
        }
        requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
    [...document.querySelectorAll('.kv-status button')].find((one) => one.textContent === name).click();
})"""


@dataclass
class Row:
    """One replay. Units: tokens/s of each lane, frames/s of the page, the longest frame in ms."""

    panels: str
    repeat: int
    tokens: int
    tokens_per_second: float
    frames_per_second: float
    longest_frame_ms: float
    updates_per_second: float


def serve() -> tuple[str, object]:
    """The page without a model, in a thread of this process."""
    import uvicorn

    from kvlens.ui.models import ModelHub, ModelRequest
    from kvlens.ui.server import create_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(ModelHub(ModelRequest(device="cpu")), host="127.0.0.1", port=port)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{port}/", server


def replay(browser, address: str, run: str, *, panels: str, rate: float, repeat: int) -> Row:
    """Opens the page anew and plays the recording once."""
    from kvlens.ui import text

    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    try:
        page.goto(f"{address}?replay_rate={rate}{'&panels_off=1' if panels == 'off' else ''}")
        page.wait_for_function("window.KVLens && KVLens.feed.latest && window.Plotly")
        page.click("text=" + text.CLIENT["header"]["recorded"])
        page.click(f".kv-menu-list >> text={run}")
        page.wait_for_function("document.querySelector('.kv-status-label').textContent.length > 0")
        page.wait_for_timeout(1500)
        log = page.evaluate(MEASURE, text.CLIENT["chat"]["replay"])
        tokens = page.evaluate("Math.max(...KVLens.feed.latest.lanes.map((lane) => lane.figures.new_tokens))")
    finally:
        page.close()
    seconds = (log["end"] - log["start"]) / 1000
    return Row(
        panels, repeat, tokens, tokens / seconds, log["frames"] / seconds, log["worst"], log["updates"] / seconds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default=None, help="label of a recorded run; the longest one by default")
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    from playwright.sync_api import sync_playwright

    from kvlens.ui.library import Library

    library = Library()
    labels = {entry["id"]: entry["label"] for entry in library.entries()}
    longest = max(labels, key=lambda name: library.get(name).num_steps)
    run = options.run or labels[longest]
    address, server = serve()
    rows = []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        for repeat in range(options.repeats):
            for panels in ("off", "live"):
                rows.append(replay(browser, address, run, panels=panels, rate=options.rate, repeat=repeat))
                print(rows[-1], flush=True)
        version = browser.version
        browser.close()
    server.should_exit = server.force_exit = True
    report(rows, options, run, version)


def report(rows: list[Row], options, run: str, version: str) -> None:
    def median(panels: str, name: str) -> float:
        return statistics.median(getattr(row, name) for row in rows if row.panels == panels)

    loss = 1 - median("live", "tokens_per_second") / median("off", "tokens_per_second")
    print(f"\npanels   tokens/s   frames/s   (median of {options.repeats}, rate {options.rate:g} a lane, run: {run})")
    for panels in ("off", "live"):
        print(f"{panels:6}   {median(panels, 'tokens_per_second'):8.1f}   {median(panels, 'frames_per_second'):8.1f}")
    print(f"loss with panels live: {100 * loss:.1f} % (wanted under 5), load average {os.getloadavg()[0]:.1f}")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    conditions = {
        "date": date, "chromium": version, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2), "rate": options.rate, "run": run,
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as target:
        writer = csv.DictWriter(target, [*asdict(rows[0]), *conditions])
        writer.writeheader()
        writer.writerows(asdict(row) | conditions for row in rows)
    print(f"saved {options.output.name}")


if __name__ == "__main__":
    main()
