"""What an update of the Chat tab holds: both lanes' messages and the panels' payload. Pure.

Everything that a model or a person wrote is escaped here, once: `Chatbot` puts its text into the page
as HTML even with Markdown off.
"""

import html
from collections.abc import Mapping, Sequence

from kvlens.engine.trace import RunLog
from kvlens.ui.controls import LANES
from kvlens.ui.recording import Recording
from kvlens.ui.session import Turn

Messages = list[dict[str, str]]


def escape(written: str) -> str:
    """Text that shows as it was written and never acts as HTML."""
    return html.escape(written, quote=False)


def message(role: str, written: str) -> dict[str, str]:
    return {"role": role, "content": escape(written)}


def conversation(turns: Sequence[Turn], lane_id: str) -> Messages:
    messages: Messages = []
    for turn in turns:
        messages += [message("user", turn.prompt), message("assistant", turn.answers.get(lane_id, ""))]
    return messages


def running(turns: Sequence[Turn], prompt: str, answers: Mapping[str, str]) -> list[Messages]:
    """Each lane's messages while it answers `prompt`; a lane without a token yet shows the prompt alone."""
    shown = []
    for lane_id in LANES:
        messages = [*conversation(turns, lane_id), message("user", prompt)]
        if answers.get(lane_id):
            messages.append(message("assistant", answers[lane_id]))
        shown.append(messages)
    return shown


def answers_of(log: RunLog) -> dict[str, str]:
    return {lane.lane_id: lane.text for lane in log.lanes}


def recorded_turns(recording: Recording) -> list[Turn]:
    """The turns before the recorded one."""
    earlier = recording.earlier_answers
    return [
        Turn(prompt, {lane_id: answers[index] for lane_id, answers in earlier.items() if index < len(answers)})
        for index, prompt in enumerate(recording.prompts[:-1])
    ]


def recorded(recording: Recording, log: RunLog | None = None) -> list[Messages]:
    """Each lane's messages of a recording, as it ended or as it stood in `log`."""
    prompt = recording.prompts[-1] if recording.prompts else ""
    return running(recorded_turns(recording), prompt, answers_of(log or recording.log))
