"""What the server hands out around the page."""

import json

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvlens.engine.registry import available
from kvlens.ui import palette, server
from kvlens.ui.models import ModelHub, ModelRequest


@pytest.fixture
def client():
    app = FastAPI()
    app.add_middleware(server.PolicyHeaders)
    server.add_routes(app, ModelHub(ModelRequest()))
    return TestClient(app)


def test_health_answers_before_there_is_a_model(client):
    assert client.get("/healthz").json() == {"status": "ok", "model": None, "state": "no model"}


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_scripts_arrive_whole_and_may_be_kept(client, encoding):
    for file in server.static_files().values():
        answer = client.get("/" + file.url, headers={"Accept-Encoding": encoding})
        assert answer.content == file.content
        assert "immutable" in answer.headers["cache-control"]
        assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fapp.py", "style.css"])
def test_nothing_else_is_served(client, name):
    assert client.get(f"/kvlens/{name}").status_code == 404


def test_scripts_know_every_method_and_its_colours():
    script = server.script()
    for name in available():
        assert f'"name": {json.dumps(name)}' in script
        assert f"--kv-method-{name}:" in server.stylesheet()


def test_methods_without_a_colour_of_their_own_get_different_ones():
    shades = palette.method_shades(["dense", "kivi", "csr", "new-a", "new-b", "new-c"])
    assert len({shade.light for shade in shades.values()}) == 6
    assert shades["dense"] == palette.EXACT
