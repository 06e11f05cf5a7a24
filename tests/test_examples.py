"""What the page offers to start from is what the built-in model can do, with the exact cache."""

import json
import re

import pytest

from kvlens.engine.generate import generate
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.model import load_model
from kvlens.ui.tabs.examples import FILE, read_examples

ENTRIES = json.loads(FILE.read_text("utf-8"))


@pytest.fixture(scope="module")
def model():
    return load_model(None, device="cpu")


def reply(model, messages: list[dict[str, str]]) -> str:
    cache = model.new_cache("dense", DenseConfig())
    prompt = model.encode(model.render_chat(messages))
    tokens = [token for token in generate(model, cache, prompt, max_new_tokens=40) if token not in model.end_tokens]
    cache.free()
    return model.decode(tokens)


def test_there_are_a_dozen_and_some_go_on():
    examples = read_examples()
    assert len({example.label for example in examples}) == len(examples) >= 12
    assert any(example.then and len(example.prompt) > 5000 for example in examples)


def test_no_file_means_no_chips(tmp_path):
    assert read_examples(tmp_path / "nothing.json") == []


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["label"] for entry in ENTRIES])
def test_the_model_answers_right(model, entry):
    messages = []
    for turn in (entry, *entry.get("then", ())):
        messages.append({"role": "user", "content": turn["prompt"]})
        said = reply(model, messages)
        assert re.search(rf"\b{turn.get('answer', '')}\b", said), said
        assert said.strip()
        messages.append({"role": "assistant", "content": said})
