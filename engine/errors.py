"""Faults that a person can do something about. `str(error)` is a sentence fit for the page."""


class EngineError(ValueError):
    """A rule that was broken, the value got, and what to do."""


class ModelError(EngineError):
    """A model that cannot be found, loaded or served."""


class ContextFull(EngineError):
    """A prompt that does not fit the context."""


class OutOfMemory(EngineError):
    """A cache that does not fit the budget or the device."""
