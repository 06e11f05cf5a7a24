"""The public API, for `gradio_client`: /methods, /estimate, /compare. Everything else is private."""

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from kvlens.engine.errors import EngineError
from kvlens.engine.estimate import bits_per_value, estimate
from kvlens.engine.shape import ModelShape
from kvlens.engine.trace import RunLog
from kvlens.ui import controls, text
from kvlens.ui.address import make_sampling
from kvlens.ui.models import ModelHub
from kvlens.ui.payload import lane_figures
from kvlens.ui.prompts import check_prompt
from kvlens.ui.runner import Pace, lane_specs, options_for

UPDATE_SECONDS = 0.25
MODEL_WAIT_SECONDS = 600


def methods() -> list[dict[str, Any]]:
    """All methods with their settings, ranges and presets."""
    return controls.describe_methods()


def estimate_bytes(method: str, shape: dict, num_tokens: int, config: dict | None = None, batch_size: int = 1) -> dict:
    """KV bytes of a method on a model shape at a context length, by formula: no model is needed."""
    try:
        model_shape = ModelShape(**{name: int(value) for name, value in shape.items()})
        choice = controls.make_choice(method, config)
        found = estimate(
            model_shape, choice.method, choice.config, num_tokens=int(num_tokens), batch_size=int(batch_size)
        )
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    fp16_bytes = model_shape.fp16_bytes(found.num_tokens)
    return {
        "method": choice.method,
        "settings": choice.config.describe(),
        "num_tokens": int(num_tokens),
        "batch_size": int(batch_size),
        "parts": {part: size for part, size in found.parts.items() if size},
        "live_bytes": found.live_bytes,
        "fp16_bytes": fp16_bytes,
        "times_smaller": fp16_bytes / found.live_bytes,
        "bits_per_value": bits_per_value(found, model_shape),
    }


def describe_run(log: RunLog) -> dict[str, Any]:
    """A run as an API answer: plain numbers and texts."""
    lanes = {
        lane.lane_id: {
            "method": lane.method,
            "title": lane.title,
            "text": lane.text,
            "finish": lane.finish,
            "parts": dict(lane.memory[-1].parts) if lane.memory else {},
            **lane_figures(log, lane),
        }
        for lane in log.lanes
    }
    return {
        "run_id": log.run_id,
        "model": log.model,
        "device": log.device,
        "first_difference": log.first_difference,
        "lanes": lanes,
    }


def _lanes(lanes: dict | None):
    if not lanes:
        choices = {lane_id: controls.default_choice(lane_id) for lane_id in controls.LANES}
    else:
        choices = {
            str(lane_id): controls.make_choice(str(entry["method"]), entry.get("config"))
            for lane_id, entry in lanes.items()
        }
    return lane_specs(choices)


def compare_with(hub: ModelHub):
    """The `/compare` endpoint of the model in `hub`."""

    def compare(
        prompt: str,
        lanes: dict | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[dict]:
        """Answer one prompt in several lanes; streams the state of the run about four times a second.

        `lanes` maps a name to {"method": ..., "config": {...}}; without it, exact against the default method.
        """
        comparison = None
        try:
            model = _ready(hub)
            from kvlens.engine.compare import Comparison

            sampling = make_sampling(
                {"system_prompt": system_prompt, "max_new_tokens": max_new_tokens, "temperature": temperature,
                 "top_p": top_p, "seed": seed}
            )  # fmt: skip
            check_prompt(prompt, sampling.system_prompt)
            messages = [{"role": "system", "content": sampling.system_prompt}] if sampling.system_prompt else []
            messages.append({"role": "user", "content": prompt})
            comparison, pace, log = Comparison(model, budget=hub.budget), Pace(UPDATE_SECONDS), None
            for log in comparison.run(messages, _lanes(lanes), options_for(sampling, 0), threading.Event()):
                if pace.is_due():
                    yield describe_run(log)
            if log is not None:
                yield describe_run(log)
        except (EngineError, ValueError, KeyError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            if comparison is not None:
                comparison.free()

    return compare


def _ready(hub: ModelHub):
    version = hub.version
    while hub.model is None and hub.is_loading:
        version = hub.wait_change(version, MODEL_WAIT_SECONDS)
    if hub.model is None:
        raise EngineError(hub.problem or text.MODEL_FAILED.format(reason="unknown"))
    return hub.model


def register(hub: ModelHub) -> None:
    """Enter the endpoints into the present Blocks."""
    gr.api(methods, api_name="methods", queue=False)
    gr.api(estimate_bytes, api_name="estimate", queue=False)
    gr.api(compare_with(hub), api_name="compare", concurrency_id="engine", concurrency_limit=1)
