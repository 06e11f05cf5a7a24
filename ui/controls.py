"""Method configurations as the page's controls: config fields to plain data, and the page's answer back.

A lane's value is a JSON string `{"method": ..., "config": {...}}`. The page draws its controls from
`describe_methods()`; no method is known by name here, but for the two that an untouched page starts with.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import EngineError
from kvlens.engine.estimate import estimate
from kvlens.engine.registry import Method, available
from kvlens.engine.shape import ModelShape
from kvlens.ui import text

LANES = ("a", "b")
DEFAULT_METHODS = {"a": "dense", "b": "kivi"}
PROJECTION_TOKENS = (32 * 1024, 128 * 1024)


@dataclass(frozen=True)
class LaneChoice:
    """What a person chose for a lane."""

    method: str
    config: MethodConfig

    def to_json(self) -> str:
        return json.dumps({"method": self.method, "config": asdict(self.config)})


def describe_field(entry) -> dict[str, Any]:
    """One config field as the page draws it. Kinds: choices, number, switch."""
    rule = entry.metadata
    described = {
        "name": entry.name,
        "label": rule.get("label", entry.name),
        "unit": rule.get("unit", ""),
        "help": rule.get("help", ""),
    }
    if "choices" in rule:
        return described | {"kind": "choices", "choices": list(rule["choices"])}
    if "minimum" in rule:
        limits = {name: rule[name] for name in ("minimum", "maximum", "step")}
        return described | {"kind": "number", **limits}
    return described | {"kind": "switch"}


def default_config(method: Method) -> MethodConfig:
    """The first preset is where the page starts."""
    return next(iter(method.presets.values()), None) or method.config()


def presets_of(method_name: str) -> dict[str, MethodConfig]:
    """The named settings of a method; none for a method that there is not."""
    method = available().get(method_name)
    return {} if method is None else method.presets


def describe_methods() -> list[dict[str, Any]]:
    """All methods with their fields and presets, as the page draws them."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "summary": method.summary,
            "source": method.source,
            "is_simulated": method.is_simulated,
            "default": asdict(default_config(method)),
            "presets": {name: asdict(config) for name, config in method.presets.items()},
            "fields": [describe_field(entry) for entry in fields(method.config)],
        }
        for method in available().values()
    ]


def _typed(entry, value: Any) -> Any:
    """`value` as the type of the field's default: JSON and addresses have fewer types than Python."""
    default = entry.default if entry.default is not MISSING else None
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = json.loads(value.lower())
        except ValueError:
            raise EngineError(f"{entry.name} must be a {type(default).__name__}; got {value!r}") from None
    if isinstance(default, bool):
        return bool(value)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    return value


def make_choice(method_name: str, settings: Mapping[str, Any] | None = None) -> LaneChoice:
    """A lane's choice from loose settings; what is not given keeps its default.

    Raises: ValueError with a sentence for an unknown method or setting, or one out of its range.
    """
    methods = available()
    if method_name not in methods:
        raise EngineError(f"method must be one of {', '.join(methods)}; got {method_name!r}")
    method = methods[method_name]
    known = {entry.name: entry for entry in fields(method.config)}
    unknown = [name for name in settings or {} if name not in known]
    if unknown:
        allowed = ", ".join(known) or "none"
        raise EngineError(f"{method.title} has no setting {unknown[0]!r}; it has: {allowed}")
    values = asdict(default_config(method))
    values |= {name: _typed(known[name], value) for name, value in (settings or {}).items()}
    try:
        return LaneChoice(method_name, method.config(**values))
    except TypeError as error:
        raise EngineError(f"The settings of {method.title} do not fit: {error}") from error


def parse_choice(value: str) -> LaneChoice:
    """A lane's choice from what the page sent. Raises: ValueError with a sentence."""
    try:
        parsed = json.loads(value)
        method_name, settings = parsed["method"], dict(parsed.get("config", {}))
    except (ValueError, TypeError, KeyError) as error:
        raise EngineError("The settings of a lane did not arrive whole; reload the page.") from error
    return make_choice(method_name, settings)


def default_choice(lane_id: str) -> LaneChoice:
    """The method a lane starts with: exact on the left, KIVI on the right."""
    methods = list(available())
    wanted = DEFAULT_METHODS.get(lane_id, methods[-1])
    return make_choice(wanted if wanted in methods else methods[-1])


def remarks(value: str, shape: ModelShape | None) -> dict[str, str]:
    """What to say beside a lane's settings: them in a few words, what is wrong, what they would save."""
    try:
        choice = parse_choice(value)
        said = {"description": choice.config.describe()}
    except ValueError as error:
        return {"problem": str(error)}
    if shape is None:
        return said
    try:
        size = estimate(shape, choice.method, choice.config, num_tokens=PROJECTION_TOKENS[0]).live_bytes
    except ValueError as error:
        return said | {"problem": str(error)}
    tokens = PROJECTION_TOKENS[0]
    return said | {
        "estimate": text.lane_estimate(tokens, size, shape.fp16_bytes(tokens), shape.values_per_token * tokens)
    }


def project(shape: ModelShape, lanes: Mapping[str, LaneChoice]) -> list[tuple[int, dict[str, int]]]:
    """Bytes of each lane at long context by formula; a lane that does not fit the shape is left out."""
    rows = []
    for tokens in PROJECTION_TOKENS:
        sizes = {"fp16": shape.fp16_bytes(tokens)}
        for lane_id, choice in lanes.items():
            try:
                sizes[lane_id] = estimate(shape, choice.method, choice.config, num_tokens=tokens).live_bytes
            except ValueError:
                continue
        rows.append((tokens, sizes))
    return rows
