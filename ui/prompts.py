"""What may be asked: checked before anything waits in the engine's queue."""

from kvlens.engine.errors import EngineError
from kvlens.ui import text

MAX_PROMPT_CHARACTERS = 400_000


def check_prompt(prompt: str, system_prompt: str = "") -> None:
    """Raises: EngineError for a prompt that is empty, or longer than can be read into any context served here."""
    if not prompt or not prompt.strip():
        raise EngineError(text.EMPTY_PROMPT)
    length = len(prompt) + len(system_prompt or "")
    if length > MAX_PROMPT_CHARACTERS:
        raise EngineError(text.prompt_too_long(length, MAX_PROMPT_CHARACTERS))
