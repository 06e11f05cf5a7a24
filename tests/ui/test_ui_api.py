"""The API's plain functions, without a server."""

import gradio as gr
import pytest

from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from kvlens.ui import api, controls

LLAMA3_8B = {"num_layers": 32, "num_query_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def test_methods_lists_all():
    assert [entry["name"] for entry in api.methods()] == list(available())


@pytest.mark.parametrize("method", available(), ids=str)
def test_estimate_is_the_formula(method):
    found = api.estimate_bytes(method, LLAMA3_8B, 8192, batch_size=3)
    parts = controls.make_choice(method).config.estimate(ModelShape(**LLAMA3_8B), 8192)
    assert found["live_bytes"] == 3 * sum(parts.values())
    assert found["fp16_bytes"] == 3 * 8192 * 131072
    assert found["bits_per_value"] == pytest.approx(16 * found["live_bytes"] / found["fp16_bytes"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing", LLAMA3_8B, 10),
        ("kivi", {"num_layers": 1}, 10),
        ("kivi", {**LLAMA3_8B, "num_query_heads": 3}, 10),
        ("kivi", LLAMA3_8B, 0),
        ("kivi", LLAMA3_8B, 10, {"key_bits": 5}),
    ],
)
def test_bad_questions_get_a_sentence(arguments):
    with pytest.raises(gr.Error):
        api.estimate_bytes(*arguments)
