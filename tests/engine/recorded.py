"""A graph where there is no GPU: operations are recorded as they run, and run again on the same tensors.

Like a CUDA graph it repeats nothing but work on tensors: what the host decided is frozen, and a body that
asks a tensor for its content, or brings something from the host, cannot be recorded. Triton launches run in
Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kvlens.kernels.compiled import Launch

_FROM_THE_HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
_ASKS = ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")


class _Recorder(TorchDispatchMode):
    """Keeps every operation and launch of a body, and refuses what a capturing GPU stream refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self._changed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_launching = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _FROM_THE_HOST:
            raise RuntimeError(f"{function} is not permitted when a stream is capturing")
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if function._schema.is_mutable:
            self._changed.append((given[0], given[0].clone()))
        results = function(*args, **kwargs)
        held = {_place(leaf) for leaf in given}
        fresh = [
            (index, leaf)
            for index, leaf in enumerate(tree_leaves(results))
            if isinstance(leaf, torch.Tensor) and _place(leaf) not in held
        ]

        def repeat() -> None:
            again = tree_leaves(function(*args, **kwargs))
            for index, leaf in fresh:
                leaf.copy_(again[index])

        self.operations.append(repeat)
        return results

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What is done within is kept. If it fails, tensors that operations have changed are as before."""
        with ExitStack() as stack:
            stack.push(self._undo_if_failed)
            stack.enter_context(mock.patch.object(Launch, "run", self._launch))
            for name in _ASKS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, self._refusing(name)))
            stack.enter_context(self)
            yield

    def _undo_if_failed(self, kind, error, trace) -> None:
        for tensor, content in reversed(self._changed if error else ()):
            tensor.copy_(content)

    @property
    def _launch(self) -> Callable[[Launch], None]:
        def launch(launched: Launch) -> None:
            self.operations.append(lambda: _RUN(launched))
            self._is_launching = True
            with _disable_current_modes():
                _RUN(launched)
            self._is_launching = False

        return launch

    def _refusing(self, name: str) -> Callable:
        ask = getattr(torch.Tensor, name)

        def refuse(tensor, *args, **kwargs):
            if not self._is_launching:
                raise RuntimeError(f"Tensor.{name} is not permitted when a stream is capturing")
            return ask(tensor, *args, **kwargs)

        return refuse


class RecordedCapture:
    """Captures as `engine.graph.CudaCapture` does. A body runs while it is recorded: its first replay is that run.

    `num_replays` counts the others, `num_captures` the bodies.
    """

    def __init__(self) -> None:
        self.num_replays = self.num_captures = 0

    def __call__(self, body: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        recorder = _Recorder()
        with recorder.recording():
            result = body()
        self.num_captures += 1
        has_run = False

        def replay() -> None:
            nonlocal has_run
            if has_run:
                self.num_replays += 1
                for operation in recorder.operations:
                    operation()
            has_run = True

        return replay, result


_RUN = Launch.run


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
