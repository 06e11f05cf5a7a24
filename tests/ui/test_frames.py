"""Nothing that a model or a person wrote acts as HTML."""

import pytest

from kvlens.ui import frames
from kvlens.ui.session import Turn

NASTY = "<img src=x onerror=alert(1)> & <b>bold</b> </script>"


@pytest.mark.parametrize(
    "messages",
    [
        frames.conversation([Turn(NASTY, {"a": NASTY})], "a"),
        frames.running([], NASTY, {"a": NASTY})[0],
    ],
)
def test_texts_are_escaped(messages):
    assert len(messages) == 2
    for message in messages:
        assert "<" not in message["content"]
        assert message["content"] == "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;bold&lt;/b&gt; &lt;/script&gt;"


def test_a_lane_without_a_token_shows_the_prompt_alone():
    assert [len(messages) for messages in frames.running([], "hi", {"b": "yes"})] == [1, 2]
