"""Controls come from the configs' field metadata alone, and what comes back is checked by them."""

import json
from dataclasses import asdict, dataclass, fields

import pytest

from kvlens.engine.config import MethodConfig, setting
from kvlens.engine.registry import available
from kvlens.engine.shape import ModelShape
from kvlens.ui import controls

SHAPE = ModelShape(num_layers=4, num_query_heads=4, num_kv_heads=2, head_dim=64)


@dataclass(frozen=True)
class InventedConfig(MethodConfig):
    rank: int = setting(8, label="Rank", unit="values", minimum=1, maximum=64, step=1, help="How many.")
    is_shared: bool = setting(False, label="Shared", help="Across layers.")
    style: str = setting("plain", label="Style", choices=("plain", "fancy"), help="How.")


def test_a_control_for_each_kind_of_field():
    described = {entry.name: controls.describe_field(entry) for entry in fields(InventedConfig)}
    assert described["rank"] == {
        "name": "rank", "label": "Rank", "unit": "values", "help": "How many.", "kind": "number",
        "minimum": 1, "maximum": 64, "step": 1,
    }  # fmt: skip
    assert described["is_shared"]["kind"] == "switch"
    assert described["style"]["choices"] == ["plain", "fancy"]


@pytest.mark.parametrize("method", available().values(), ids=lambda method: method.name)
def test_every_method_is_described_whole(method):
    described = next(entry for entry in controls.describe_methods() if entry["name"] == method.name)
    assert [entry["name"] for entry in described["fields"]] == [entry.name for entry in fields(method.config)]
    assert described["default"] == asdict(controls.default_config(method))
    assert all(entry["label"] and entry["help"] for entry in described["fields"])
    json.dumps(described)


@pytest.mark.parametrize("method", available(), ids=str)
def test_a_choice_survives_the_page(method):
    choice = controls.make_choice(method)
    assert controls.parse_choice(choice.to_json()) == choice


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("", "did not arrive"),
        ("{}", "did not arrive"),
        ('{"method": "nothing"}', "must be one of"),
        ('{"method": "kivi", "config": {"colour": 1}}', "no setting 'colour'"),
        ('{"method": "kivi", "config": {"key_bits": 3}}', "key_bits must be one of"),
        ('{"method": "kivi", "config": {"group_size": 64, "residual_length": 32}}', "multiple of group_size"),
    ],
)
def test_bad_settings_become_a_sentence(value, word):
    assert word in controls.remarks(value, SHAPE)["problem"]


def test_settings_that_do_not_fit_the_head_become_a_sentence():
    value = controls.make_choice("kivi", {"value_group_size": 128}).to_json()
    assert "head" in controls.remarks(value, SHAPE)["problem"]


def test_estimate_beside_the_settings_is_the_formula():
    choice = controls.make_choice("kivi", {"key_bits": 4, "value_bits": 4})
    sizes = dict(controls.project(SHAPE, {"b": choice}))[32768]
    assert sizes["b"] == sum(choice.config.estimate(SHAPE, 32768).values())
    assert sizes["fp16"] == SHAPE.fp16_bytes(32768)
    assert f"{sizes['fp16'] / sizes['b']:.1f}× smaller" in controls.remarks(choice.to_json(), SHAPE)["estimate"]
