"""Assembles the page: the header above, a tab each below. Adding a tab is adding a line to `build`."""

import json
from pathlib import Path

import gradio as gr

from kvlens.ui import api, text
from kvlens.ui.handlers import ChatHandlers
from kvlens.ui.lab_handlers import LabHandlers
from kvlens.ui.learn_handlers import LearnHandlers
from kvlens.ui.tabs import about, chat, lab

EXAMPLES = Path(__file__).resolve().parent.parent / "assets" / "examples.json"
HEADER_EVENTS = "/* 'recorded' 'export' 'upload' 'model' */ KVLens.header"


def read_examples(path: Path = EXAMPLES) -> list[dict[str, str]]:
    """Prompts that a person can start from; none if the file is not there."""
    if not path.is_file():
        return []
    entries = json.loads(path.read_text("utf-8"))
    return [entry for entry in entries if entry.get("label") and entry.get("prompt")]


def build(handlers: ChatHandlers, learners: LearnHandlers, labs: LabHandlers, *, address: str) -> gr.Blocks:
    """The whole page, wired."""
    with gr.Blocks(title=text.TITLE, analytics_enabled=False, fill_width=True) as demo:
        header = chat.mounted("kv-header", HEADER_EVENTS, handlers.header(), elem_id="kv-header")
        with gr.Tabs(elem_id="kv-tabs"):
            with gr.Tab(text.TAB_CHAT, id="chat", elem_id="kv-tab-chat"):
                elements = chat.draw(handlers, read_examples())
                chat.wire(elements, header, handlers, demo)
                chat.wire_learning(elements, learners)
            with gr.Tab(text.TAB_LAB, id="lab") as lab_tab:
                lab.wire(lab.draw(), lab_tab, labs)
            with gr.Tab(text.TAB_ABOUT, id="about"):
                about.draw(address)
        api.register(handlers.hub)
    demo.queue(max_size=48, api_open=False)
    return demo
