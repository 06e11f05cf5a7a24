"""The real page with the embedded model in this process, and a Chromium that looks at it.

The server runs in a thread, so that a test can hold what the page shows against the cache itself.
"""

import os
import shutil
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
READY = "#kv-send"
RUN_TIMEOUT_MS = 60_000
SLOWER = float(os.environ.get("SLOW_BROWSER", "1"))
"""How many times slower the page's processor is: finds races that a quick machine hides."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "browser" in item.path.parts:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="no Chromium on this machine"))


@dataclass
class Site:
    """The running page. `sessions` are the server's own."""

    address: str
    sessions: object
    hub: object


@pytest.fixture(scope="session")
def site():
    import torch
    import uvicorn

    from kvlens.engine.model import EMBEDDED
    from kvlens.ui.models import ModelHub, ModelRequest
    from kvlens.ui.server import create_app

    if not (EMBEDDED / "config.json").is_file():
        pytest.skip("the embedded model is not built yet")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torch is loaded by now and its waiting threads spin; with a browser beside it one thread is faster than two.
    torch.set_num_threads(1)
    hub = ModelHub(ModelRequest(device="cpu", max_context=2048), offered=["offered/nowhere"])
    app = create_app(hub, host="127.0.0.1", port=port)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    hub.start()
    version, deadline = -1, time.monotonic() + 120
    while hub.model is None and time.monotonic() < deadline:
        version = hub.wait_change(version, 1.0)
    assert hub.model is not None, hub.problem
    yield Site(f"http://127.0.0.1:{port}/", app.state.sessions, hub)
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield opened
        opened.close()


@dataclass
class Visitor:
    """One open page and what it did that it should not have."""

    page: object
    site: Site
    faults: list[str] = field(default_factory=list)

    def open(self, query: str = "") -> None:
        self.page.goto(self.site.address + query)
        self.page.wait_for_selector(READY)
        self.page.wait_for_function("window.KVLens && KVLens.feed.latest && window.Plotly")

    def send(self, prompt: str) -> None:
        self.page.fill("#kv-prompt textarea", prompt)
        self.page.press("#kv-prompt textarea", "Enter")
        self.wait("KVLens.feed.latest.state !== 'recorded' && document.body.dataset.kvState !== 'done'")

    def finish(self) -> dict:
        self.wait("document.body.dataset.kvState === 'done'")
        return self.payload()

    def ask(self, prompt: str) -> dict:
        before = self.page.evaluate("KVLens.feed.latest.run_id")
        self.page.fill("#kv-prompt textarea", prompt)
        self.page.press("#kv-prompt textarea", "Enter")
        self.wait("before => KVLens.feed.latest.run_id !== before && document.body.dataset.kvState === 'done'", before)
        return self.payload()

    def wait(self, condition: str, argument=None) -> None:
        self.page.wait_for_function(condition, arg=argument, timeout=RUN_TIMEOUT_MS)

    def payload(self) -> dict:
        return self.page.evaluate("KVLens.feed.latest")

    def chat(self, lane: str) -> str:
        return self.page.locator(f"#kv-chat-{lane}").inner_text()

    def answer(self, lane: str) -> str:
        return self.page.locator(f'#kv-chat-{lane} [data-testid="bot"] .md').last.evaluate("node => node.textContent")

    def prompt(self, lane: str) -> str:
        return self.page.locator(f'#kv-chat-{lane} [data-testid="user"] .md').last.evaluate("node => node.textContent")

    def session(self):
        """The server's session of this page: the one whose run it shows."""
        run_id = self.payload()["run_id"]
        found = [one for one in self.site.sessions.all() if one.recording and one.recording.log.run_id == run_id]
        assert len(found) == 1
        return found[0]


@pytest.fixture
def visit(browser, site):
    """Opens pages; at the end none of them may have complained or called another host."""
    visitors, contexts = [], []

    def make(**options) -> Visitor:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        visitor = Visitor(context.new_page(), site)
        visitors.append(visitor)
        page, faults, own = visitor.page, visitor.faults, site.address
        if SLOWER > 1:
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": SLOWER})
        page.on("console", lambda said: faults.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.on(
            "request", lambda asked: None if asked.url.startswith((own, "data:", "blob:")) else faults.append(asked.url)
        )
        return visitor

    yield make
    for context in contexts:
        context.close()
    assert [fault for visitor in visitors for fault in visitor.faults] == []


@pytest.fixture
def visitor(visit) -> Visitor:
    return visit()


@pytest.fixture
def endless(site, monkeypatch):
    """The model never ends an answer by itself: only the length or a person does."""
    monkeypatch.setattr(site.hub.model, "end_tokens", frozenset())
