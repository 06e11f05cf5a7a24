"""Method configurations: frozen dataclasses whose fields carry what the page needs to draw a control."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from kvlens.engine.dictionaries.store import DictionaryKind
from kvlens.engine.shape import ModelShape


def setting(
    default: Any,
    *,
    label: str,
    help: str,
    unit: str = "",
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    step: float | None = None,
) -> Any:
    """A dataclass field with the text and the range of its control.

    Either `choices`, or `minimum` and `maximum` (both included), or neither for a switch.
    """
    metadata = {"label": label, "help": help, "unit": unit}
    if choices is not None:
        metadata["choices"] = tuple(choices)
    if minimum is not None:
        metadata |= {"minimum": minimum, "maximum": maximum, "step": step or 1}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MethodConfig:
    """Base of all method configurations: checks each field against its own metadata.

    Raises: ValueError naming the field, the rule and the value got.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, rule = getattr(self, entry.name), entry.metadata
            if "choices" in rule and value not in rule["choices"]:
                choices = ", ".join(map(str, rule["choices"]))
                raise ValueError(f"{entry.name} must be one of {choices}; got {value!r}")
            if isinstance(entry.default, int) and not isinstance(value, int):
                raise ValueError(f"{entry.name} must be a whole number; got {value!r}")
            if "minimum" in rule and not rule["minimum"] <= value <= rule["maximum"]:
                raise ValueError(
                    f"{entry.name} must lie between {rule['minimum']} and {rule['maximum']}; got {value!r}"
                )

    @property
    def kind(self) -> DictionaryKind | None:
        """The learned dictionaries that a cache of these settings reads; None if it reads none."""
        return None

    def check(self, shape: ModelShape) -> None:
        """Raises: ValueError where these settings do not fit the heads of `shape`."""

    def estimate(self, shape: ModelShape, num_tokens: int) -> dict[str, int]:
        """Live bytes by part of one sequence of `num_tokens` tokens, by formula.

        The footprint of a real cache equals it to the byte.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """The settings in a few words, such as `2 bit · G 32 · R 128`; empty if there is nothing to say."""
        return ""
