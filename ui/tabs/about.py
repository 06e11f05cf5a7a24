"""The About tab: what this is, the methods, how numbers are measured, what the built-in model can do."""

import gradio as gr

from kvlens.engine.estimate import bits_per_value, estimate
from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from kvlens.ui import text
from kvlens.ui.controls import default_config
from kvlens.ui.models import SUGGESTED

REFERENCE_SHAPE = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
REFERENCE_TOKENS = 32 * 1024


def methods_table() -> str:
    """A Markdown table of all methods, from what they say of themselves."""
    header, rule = " | ".join(text.METHODS_HEADERS), " | ".join("---" for _ in text.METHODS_HEADERS)
    lines = [f"| {header} |", f"| {rule} |"]
    for method in available().values():
        size = estimate(REFERENCE_SHAPE, method.name, default_config(method), num_tokens=REFERENCE_TOKENS)
        bits = f"{bits_per_value(size, REFERENCE_SHAPE):.2f}"
        lines.append(f"| {method.title} | {method.summary} | {bits} | {method.source} |")
    return "\n".join(lines)


def draw(address: str) -> None:
    with gr.Column(elem_id="kv-about"):
        for part in (
            text.ABOUT_INTRO,
            f"{text.ABOUT_METHODS}\n\n{methods_table()}",
            text.ABOUT_NUMBERS,
            text.ABOUT_LIMITS.format(names=", ".join(f"`{name}`" for name in SUGGESTED)),
            text.ABOUT_API.format(address=address),
        ):
            gr.Markdown(part)
