"""Imports transformers without what it would pull in on the way and nothing here uses: half of its time.

Three things cost seconds. Packages that transformers imports because they happen to be installed; for the moment of
the import they are hidden. Marks for torch's compiler on functions that nobody here compiles
(`@torch.compiler.disable` and the like): merely touching `torch._dynamo` loads the whole compiler, so the marks
do nothing for that moment. Afterwards everything is as it was, and both may be imported as usual. And tensors shared
out over processes: transformers asks once whether torch has them, and is told no for good, as on a build without.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

UNUSED = ("accelerate", "hqq", "optimum", "peft", "scipy", "sklearn")

_NEEDED = (
    "transformers.cache_utils",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.models.auto",
    "transformers.models.llama.modeling_llama",
)

_MASKS = "torch._dynamo._trace_wrapped_higher_order_op"


def load() -> None:
    """Import torch and the parts of transformers that every start needs. Safe to call again."""
    import torch

    # Where a version of transformers needs more of what is hidden, it is imported as usual, only later.
    with suppress(ImportError, AttributeError), _hidden(UNUSED), _without_marks(torch):
        _alone(torch)
        for name in _NEEDED:
            importlib.import_module(name)
        _touch_layers(torch)


def _alone(torch) -> None:
    """transformers keeps the answer to its question for as long as the process lives."""
    from transformers.utils import is_torch_distributed_available

    ask, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    try:
        is_torch_distributed_available()
    finally:
        torch.distributed.is_available = ask


def _touch_layers(torch) -> None:
    """Make a network without memory, as from_pretrained does: each function asks for the compiler once, at first."""
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    with torch.device("meta"):
        LlamaForCausalLM(LlamaConfig(**dict.fromkeys(sizes, 2), bos_token_id=None, eos_token_id=None))


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Packages that are not imported yet look as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def _without_marks(torch) -> Iterator[None]:
    """Decorators that tell torch's compiler about a function return it unchanged."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    marks, masks = _Marks("torch._dynamo"), ModuleType(_MASKS)
    masks.TransformGetItemToIndex = _transform_get_item_to_index
    sys.modules |= {"torch._dynamo": marks, _MASKS: masks}
    torch._dynamo = marks
    try:
        yield
    finally:
        del sys.modules["torch._dynamo"], sys.modules[_MASKS], torch._dynamo


class _Marks(ModuleType):
    """Stands for `torch._dynamo`: every decorator in it does nothing."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _mark


def _transform_get_item_to_index():
    """What `transformers.masking_utils` takes from the compiler for masks by vmap: loaded when it is called for."""
    return importlib.import_module(_MASKS).TransformGetItemToIndex()


def _mark(function=None, *arguments, **options):
    return _mark if function is None else function
