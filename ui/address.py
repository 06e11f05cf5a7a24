"""The page's settings as an address, there and back.

`?method_a=dense&method_b=kivi&b.key_bits=4&temperature=0.7&prompt=...`: only what differs from the
defaults is written, so that an untouched page keeps a clean address.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from urllib.parse import urlencode

from kvlens.ui import text
from kvlens.ui.controls import LANES, LaneChoice, default_choice, make_choice

MAX_PROMPT_CHARACTERS = 1500
"""A longer prompt is not written into the address: browsers and proxies cut long ones."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn, the same in every lane."""

    system_prompt: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


LIMITS = {"max_new_tokens": (1, 4096), "temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "seed": (0, 2**31 - 1)}


@dataclass(frozen=True)
class Settings:
    """Everything that the address holds."""

    lanes: dict[str, LaneChoice] = field(default_factory=lambda: {lane: default_choice(lane) for lane in LANES})
    sampling: Sampling = field(default_factory=Sampling)
    prompt: str = ""


def make_sampling(values: Mapping[str, object]) -> Sampling:
    """Sampling settings from loose values, held inside their limits. Raises: ValueError if not a finite number."""
    made: dict[str, object] = {}
    for entry in fields(Sampling):
        if entry.name not in values or values[entry.name] is None:
            continue
        value = values[entry.name]
        if entry.name in LIMITS:
            low, high = LIMITS[entry.name]
            if not math.isfinite(number := float(value)):
                raise ValueError(f"{entry.name} must be a finite number; got {value!r}")
            value = min(high, max(low, type(entry.default)(number)))
        made[entry.name] = value if entry.name in LIMITS else str(value)
    return Sampling(**made)


def write(settings: Settings) -> str:
    """The query of an address that opens the page with these settings."""
    query: dict[str, object] = {}
    for lane_id, choice in settings.lanes.items():
        usual = default_choice(lane_id)
        base = usual if choice.method == usual.method else make_choice(choice.method)
        if choice.method != usual.method:
            query[f"method_{lane_id}"] = choice.method
        defaults = asdict(base.config)
        query |= {
            f"{lane_id}.{name}": str(value).lower() if isinstance(value, bool) else value
            for name, value in asdict(choice.config).items()
            if value != defaults[name]
        }
    usual_sampling = asdict(Sampling())
    query |= {name: value for name, value in asdict(settings.sampling).items() if value != usual_sampling[name]}
    if 0 < len(settings.prompt) <= MAX_PROMPT_CHARACTERS:
        query["prompt"] = settings.prompt
    return urlencode(query)


def read(query: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings of an address, and a sentence for each part that it asked for in vain."""
    lanes, faults = {}, []
    for lane_id in LANES:
        try:
            method_name = query.get(f"method_{lane_id}") or default_choice(lane_id).method
            prefix = f"{lane_id}."
            asked = {name.removeprefix(prefix): value for name, value in query.items() if name.startswith(prefix)}
            lanes[lane_id] = make_choice(method_name, asked)
        except ValueError as error:
            lanes[lane_id] = default_choice(lane_id)
            faults.append(text.ADDRESS_FAULT.format(reason=error))
    try:
        sampling = make_sampling(query)
    except ValueError as error:
        sampling = Sampling()
        faults.append(text.ADDRESS_FAULT.format(reason=error))
    return Settings(lanes, sampling, query.get("prompt", "")[:MAX_PROMPT_CHARACTERS]), faults
