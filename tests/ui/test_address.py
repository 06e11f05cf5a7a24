"""Settings survive the way into the address and back."""

from urllib.parse import parse_qsl

import pytest

from kvlens.ui import address
from kvlens.ui.address import Sampling, Settings, make_sampling
from kvlens.ui.controls import make_choice


def round_trip(settings):
    found, faults = address.read(dict(parse_qsl(address.write(settings))))
    assert faults == []
    return found


def test_an_untouched_page_has_a_clean_address():
    assert address.write(Settings()) == ""


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(prompt="What is 2 & 2? <b>ü</b> 🦩\nsecond line"),
        Settings(sampling=Sampling("Be brief.", 12, 0.7, 0.9, 42)),
        Settings(lanes={"a": make_choice("kivi", {"key_bits": 4}), "b": make_choice("dense")}),
        Settings(lanes={"a": make_choice("dense"), "b": make_choice("kivi", {"group_size": 64, "num_sinks": 4})}),
    ],
)
def test_round_trip(settings):
    assert round_trip(settings) == settings


def test_a_long_prompt_stays_out_of_the_address():
    assert address.write(Settings(prompt="x" * 10_000)) == ""


@pytest.mark.parametrize(
    "query",
    [
        {"method_b": "nothing"},
        {"b.key_bits": "3"},
        {"b.colour": "red"},
        {"b.key_bits": "x"},
        {"temperature": "warm"},
        {"seed": "inf"},
        {"max_new_tokens": "1e999"},
        {"top_p": "nan"},
    ],
)
def test_what_is_not_there_becomes_the_default_and_a_sentence(query):
    settings, faults = address.read(query)
    assert settings == Settings()
    assert len(faults) == 1


def test_sampling_is_held_inside_its_limits():
    sampling = make_sampling({"max_new_tokens": 10**9, "temperature": -3, "top_p": 7})
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (4096, 0.0, 1.0)
