"""The example chips below the prompt box: each fills it; some go on with questions about what was sent."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from kvlens.ui import text

FILE = Path(__file__).resolve().parents[2] / "assets" / "examples.json"
FILLED = {"api_visibility": "private", "queue": False}


@dataclass(frozen=True)
class Example:
    """A prompt to start from, and prompts that may follow it in the same chat."""

    label: str
    prompt: str
    then: tuple["Example", ...] = ()


def read_examples(path: Path = FILE) -> list[Example]:
    """What the file offers; nothing if it is not there."""
    return [_example(entry) for entry in json.loads(path.read_text("utf-8"))] if path.is_file() else []


def _example(entry: dict) -> Example:
    return Example(entry["label"], entry["prompt"], tuple(_example(one) for one in entry.get("then", ())))


def draw_chips(examples: Sequence[Example]) -> list[gr.Button]:
    """A chip for each."""
    return [
        gr.Button(example.label, size="sm", elem_classes="kv-chip-button", min_width=0, scale=0) for example in examples
    ]


def draw_follow_ups(examples: Sequence[Example]) -> list[list[gr.Button]]:
    """A row for each example that has any, hidden until its chip is clicked; see `KVLens.thenAsk`."""
    rows = []
    for index, example in enumerate(examples):
        if not example.then:
            rows.append([])
            continue
        with gr.Row(elem_id=f"kv-then-{index}", elem_classes="kv-then"):
            gr.HTML(f"<span>{text.THEN_ASK}</span>", elem_classes="kv-then-label")
            rows.append(draw_chips(example.then))
    return rows


def wire(
    examples: Sequence[Example], chips: Sequence[gr.Button], follow_ups: Sequence[Sequence[gr.Button]],
    prompt: gr.Textbox, clear: gr.Button,
) -> None:  # fmt: skip
    """Everything happens in the browser: a click fills the prompt box and shows what may follow."""
    for index, (example, button, row) in enumerate(zip(examples, chips, follow_ups, strict=True)):
        shown = f"kv-then-{index}" if row else ""
        button.click(None, None, prompt, js=_fills(example.prompt, f"KVLens.thenAsk({json.dumps(shown)}); "), **FILLED)
        for follow_up, chip in zip(example.then, row, strict=True):
            chip.click(None, None, prompt, js=_fills(follow_up.prompt), **FILLED)
    clear.click(None, None, None, js='() => KVLens.thenAsk("")', **FILLED)


def _fills(prompt: str, before: str = "") -> str:
    return f"() => {{ {before}return {json.dumps(prompt)}; }}"
