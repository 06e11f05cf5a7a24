"""How many bytes a method would take, by its formula: no model and no tensors needed."""

from kvlens.engine.config import MethodConfig
from kvlens.engine.errors import EngineError
from kvlens.engine.footprint import Footprint
from kvlens.engine.registry import method
from kvlens.engine.shape import ModelShape


def estimate(
    shape: ModelShape, method_name: str, config: MethodConfig, *, num_tokens: int, batch_size: int = 1
) -> Footprint:
    """Live bytes by part of `batch_size` sequences of `num_tokens` tokens each.

    Raises: EngineError for counts below 1 or settings that do not fit the shape or the method.
    """
    if num_tokens < 1 or batch_size < 1:
        raise EngineError(f"tokens and batch must be at least 1; got {num_tokens} and {batch_size}")
    expected = method(method_name).config
    if not isinstance(config, expected):
        raise EngineError(f"{method_name} takes a {expected.__name__}; got {type(config).__name__}")
    config.check(shape)
    parts = {part: batch_size * size for part, size in config.estimate(shape, num_tokens).items()}
    return Footprint(batch_size * num_tokens, parts)


def bits_per_value(footprint: Footprint, shape: ModelShape) -> float:
    """Real bits that one number of the cache takes, everything counted."""
    num_values = shape.values_per_token * footprint.num_tokens
    return 8 * footprint.live_bytes / num_values if num_values else 0.0


def most_tokens(shape: ModelShape, method_name: str, config: MethodConfig, *, limit_bytes: int) -> int:
    """How long a sequence may grow within `limit_bytes`, by the same formula; 0 if not one token fits.

    Limits: a method that forgets may never reach the limit; what is told ends at 2^40 tokens. The bytes of one that
    packs whole groups rise and fall by a window: one token more than the length told does not fit, and in the last few
    windows before it some lengths with a full window may not fit either.
    """

    def fits(num_tokens: int) -> bool:
        return estimate(shape, method_name, config, num_tokens=num_tokens).live_bytes <= limit_bytes

    if not fits(1):
        return 0
    held = 1
    while held < 2**39 and fits(2 * held):
        held *= 2
    step = held // 2
    while step:
        held, step = (held + step if fits(held + step) else held), step // 2
    return held
