"""Assembles the page: the header above, a tab each below. Adding a tab is adding a line to `build`."""

import gradio as gr

from kvlens.ui import api, text
from kvlens.ui.handlers import ChatHandlers
from kvlens.ui.lab_handlers import LabHandlers
from kvlens.ui.learn_handlers import LearnHandlers
from kvlens.ui.tabs import about, chat, lab

HEADER_EVENTS = "/* 'recorded' 'export' 'upload' 'model' */ KVLens.header"


def build(handlers: ChatHandlers, learners: LearnHandlers, labs: LabHandlers, *, address: str) -> gr.Blocks:
    """The whole page, wired."""
    with gr.Blocks(title=text.TITLE, analytics_enabled=False, fill_width=True) as demo:
        header = chat.mounted("kv-header", HEADER_EVENTS, handlers.header(), elem_id="kv-header")
        with gr.Tabs(elem_id="kv-tabs"):
            with gr.Tab(text.TAB_CHAT, id="chat", elem_id="kv-tab-chat"):
                elements = chat.draw(handlers)
                chat.wire(elements, header, handlers, demo)
                chat.wire_learning(elements, learners)
            with gr.Tab(text.TAB_LAB, id="lab") as lab_tab:
                lab.wire(lab.draw(), lab_tab, labs)
            with gr.Tab(text.TAB_ABOUT, id="about"):
                about.draw(address)
        api.register(handlers.hub)
    demo.queue(max_size=48, api_open=False)
    return demo
