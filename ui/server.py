"""The web server around the page: static files, a health route, who may call. No logic of the page."""

import gzip
import hashlib
import json
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gradio as gr
import plotly
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvlens.engine.footprint import PARTS
from kvlens.engine.registry import available
from kvlens.ui import controls, lab_text, layout, palette, text
from kvlens.ui.handlers import ChatHandlers
from kvlens.ui.lab_handlers import LabHandlers
from kvlens.ui.learn_handlers import LearnHandlers
from kvlens.ui.library import Library
from kvlens.ui.models import ModelHub
from kvlens.ui.session import SessionStore

ASSETS = Path(__file__).resolve().parent.parent / "assets"
STYLE_SHEETS = ("style.css", "atoms.css")
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_UPLOAD = "32mb"

# The page loads nothing from elsewhere, whatever text finds its way into it. Gradio compiles its templates.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, compressed once. `url` changes with its content."""

    name: str
    content: bytes
    media_type: str

    @property
    def url(self) -> str:
        return f"kvlens/{self.name}?v={hashlib.sha256(self.content).hexdigest()[:10]}"


def script() -> str:
    """All scripts of the page as one, behind the words, colours and methods that they draw with."""
    names = list(available())
    data = {
        "text": {"title": text.TITLE, "tagline": text.TAGLINE, **text.CLIENT, "lab": lab_text.CLIENT},
        "palette": palette.client_palette(names),
        "methods": controls.describe_methods(),
        "partOrder": list(PARTS),
    }
    parts = [f"window.KVLens = {json.dumps(data)};"]
    parts += [path.read_text("utf-8") for path in sorted((ASSETS / "js").glob("*.js"))]
    return "\n".join(f"(() => {{\n{part}\n}})();" for part in parts)


def stylesheet() -> str:
    sheets = [(ASSETS / name).read_text("utf-8") for name in STYLE_SHEETS]
    return "\n".join([palette.css_variables(list(available())), *sheets])


@cache
def static_files() -> dict[str, StaticFile]:
    files = (
        StaticFile("app.js", script().encode(), "text/javascript"),
        StaticFile("plotly.min.js", PLOTLY.read_bytes(), "text/javascript"),
    )
    return {file.name: file for file in files}


@cache
def compressed(name: str) -> bytes:
    return gzip.compress(static_files()[name].content, compresslevel=6)


def head() -> str:
    """Our script before the page draws, plotly beside it: the first figures do not wait for it."""
    files = static_files()
    return (
        f"<style>{(ASSETS / 'fonts.css').read_text('utf-8')}</style>"
        f'<script src="{files["app.js"].url}"></script>'
        f'<script async src="{files["plotly.min.js"].url}"></script>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
    )


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        font=["KVLens Sans", "system-ui", "sans-serif"],
        font_mono=["KVLens Mono", "ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_sm,
        spacing_size=gr.themes.sizes.spacing_sm,
    )


class PolicyHeaders:
    """Adds the content policy to every answer, without holding back a stream."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = CONTENT_POLICY
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def add_routes(app: FastAPI, hub: ModelHub) -> None:
    @app.get("/healthz")
    def healthz() -> dict:
        """Up as soon as the page answers; says how far the model is."""
        state = "ready" if hub.model is not None else "loading" if hub.is_loading else "no model"
        return {"status": "ok", "model": hub.model.name if hub.model else None, "state": state}

    @app.get("/kvlens/{name}")
    def static(name: str, request: Request) -> Response:
        files = static_files()
        if name not in files:
            return Response(status_code=404)
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(compressed(name), media_type=files[name].media_type, headers=headers)
        return Response(files[name].content, media_type=files[name].media_type, headers=headers)


def create_app(hub: ModelHub, *, host: str, port: int, runs: Library | None = None) -> FastAPI:
    """The whole site as an ASGI application."""
    mimetypes.add_type("text/javascript", ".js")
    app = FastAPI(title=text.TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOCAL_HOSTS:
        # A page elsewhere must not reach a local server under a name of its own (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS, "[::1]", "testserver"])
    app.add_middleware(PolicyHeaders)
    add_routes(app, hub)
    store = SessionStore()
    handlers = ChatHandlers(hub, store, runs or Library())
    shown_host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    demo = layout.build(
        handlers, LearnHandlers(hub, store), LabHandlers(hub, store), address=f"http://{shown_host}:{port}/"
    )
    app.state.sessions = store
    return gr.mount_gradio_app(
        app, demo, path="/", theme=theme(), css=stylesheet(), head=head(), footer_links=[], run_history=False,
        show_error=True, max_file_size=MAX_UPLOAD, enable_monitoring=False, ssr_mode=False, pwa=False,
        server_name=host, server_port=port,
    )  # fmt: skip


def serve(hub: ModelHub, *, host: str, port: int) -> None:
    """Run until interrupted. The model loads meanwhile."""
    hub.start()
    app = create_app(hub, host=host, port=port)
    print(text.SERVING.format(address=f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"), flush=True)
    uvicorn.run(app, host=host, port=port, log_level="warning")
