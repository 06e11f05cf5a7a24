"""Runs of the stand-in engine that the tests of the page look at."""

import fakes
import pytest


@pytest.fixture
def log():
    return fakes.finished_log(num_steps=60)
