"""The Throughput tab: choose methods, contexts and batches, and measure them. Draws and wires; decides nothing."""

from dataclasses import dataclass

import gradio as gr

from kvlens.ui.lab_handlers import LabHandlers
from kvlens.ui.tabs.chat import ENGINE_QUEUE, mounted


@dataclass
class LabElements:
    """What the events of the tab read and write."""

    panel: gr.HTML
    download: gr.HTML


def draw() -> LabElements:
    # The script names its custom events: gr.HTML only knows events that stand in its script.
    panel = mounted("kv-lab", "/* 'measure' 'stop' 'save' */ KVLens.lab", elem_id="kv-lab")
    download = mounted("kv-silent", "KVLens.download", elem_classes="kv-silent-block")
    return LabElements(panel, download)


def wire(elements: LabElements, tab: gr.Tab, handlers: LabHandlers) -> None:
    """Connect events. A lab runs in the queue of everything that computes, so it spoils nobody's clock."""
    quick = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    slow = {"api_visibility": "private", "show_progress": "hidden", "concurrency_id": ENGINE_QUEUE}
    tab.select(handlers.refresh, None, elements.panel, **quick)
    asked = elements.panel.measure(handlers.ask, None, elements.panel, **quick)
    asked.then(handlers.measure, None, elements.panel, concurrency_limit=1, **slow)
    elements.panel.stop(handlers.stop, None, elements.panel, **quick)
    elements.panel.save(handlers.save, None, [elements.download, elements.panel], **quick)
