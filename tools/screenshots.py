"""Takes the README's pictures from the running app: `python -m tools.screenshots`.

Starts the page with the embedded model in this process, drives it with Chromium, and writes
`assets/screenshots/*.png`: light, dark, a phone, the key-channel outliers, settings, the first paint,
the atoms of sparse codes and the throughput lab.
"""

import argparse
import shutil
import socket
import threading
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "screenshots"
PROMPT = "Tell me a story about a dragon."
DESKTOP = {"width": 1600, "height": 1000}
PHONE = {"width": 390, "height": 844}


def start(model: str | None, device: str) -> str:
    """The page in a thread; its address once the model is there."""
    import uvicorn

    from kvlens.ui.models import ModelHub, ModelRequest
    from kvlens.ui.server import create_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hub = ModelHub(ModelRequest(model, device))
    app = create_app(hub, host="127.0.0.1", port=port)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    hub.start()
    version = -1
    while hub.model is None:
        version = hub.wait_change(version, 1.0)
        if hub.problem:
            raise SystemExit(hub.problem)
    return f"http://127.0.0.1:{port}/"


def open_page(browser, address: str, *, size: dict, theme: str, query: str = ""):
    page = browser.new_page(viewport=size, device_scale_factor=2 if size is PHONE else 1.5)
    page.goto(f"{address}?__theme={theme}{query}")
    page.wait_for_function("window.KVLens && KVLens.feed.latest && window.Plotly && document.querySelector('#kv-send')")
    return page


def ask(page, prompt: str, *, wait_for: str = "document.body.dataset.kvState === 'done'") -> None:
    before = page.evaluate("KVLens.feed.latest.run_id")
    page.fill("#kv-prompt textarea", prompt)
    page.press("#kv-prompt textarea", "Enter")
    page.wait_for_function(f"before => KVLens.feed.latest.run_id !== before && {wait_for}", arg=before, timeout=300_000)


def shoot(page, name: str, folder: Path, **options) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(600)  # the last drawing settles
    page.screenshot(path=folder / f"{name}.png", **options)
    print(name, flush=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()

    from playwright.sync_api import sync_playwright

    options.folder.mkdir(parents=True, exist_ok=True)
    address = start(options.model, options.device)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    quick = "&b.residual_length=32"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        folder = options.folder

        page = open_page(browser, address, size=DESKTOP, theme="light")
        shoot(page, "first-paint", folder)

        page = open_page(browser, address, size=DESKTOP, theme="light", query=quick)
        ask(page, options.prompt)
        shoot(page, "chat-light", folder)

        page = open_page(browser, address, size=DESKTOP, theme="dark", query=quick)
        ask(page, options.prompt)
        page.click("text=channel × token")
        page.wait_for_function("KVLens.feed.latest.view.figure === 'channels'")
        shoot(page, "outliers-dark", folder)

        page = open_page(browser, address, size=DESKTOP, theme="dark", query=quick)
        running = "KVLens.feed.latest.state === 'running' && KVLens.feed.latest.lanes[1].figures.new_tokens > 48"
        ask(page, options.prompt, wait_for=running)
        shoot(page, "streaming-dark", folder)

        page = open_page(browser, address, size=DESKTOP, theme="light", query=quick)
        page.click("#kv-lane-b .kv-summary")
        page.wait_for_timeout(300)
        shoot(page, "settings", folder)

        page = open_page(browser, address, size=DESKTOP, theme="light", query="&method_b=csr&b.window=16&b.flush=8")
        ask(page, options.prompt)
        page.wait_for_selector(".kv-panel-atoms .main-svg")
        shoot(page, "atoms-light", folder, full_page=True)

        page = open_page(browser, address, size=DESKTOP, theme="dark")
        page.get_by_role("tab", name="Throughput").click()
        page.click(".kv-lab-go")
        page.wait_for_function("KVLens.lab.latest && KVLens.lab.latest.state === 'done'", timeout=300_000)
        shoot(page, "throughput-dark", folder, full_page=True)

        page = open_page(browser, address, size=PHONE, theme="light", query=quick)
        shoot(page, "phone", folder, full_page=True)
        browser.close()
    time.sleep(0.1)


if __name__ == "__main__":
    main()
