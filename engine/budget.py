"""A bound on the bytes that all caches of a process may reserve together, and the tensors of one of them."""

import threading

import torch

from kvlens.engine.errors import OutOfMemory


class MemoryBudget:
    """Counts reserved cache bytes; caches take before they allocate and give back when freed.

    `limit_bytes` None counts without a bound. What is taken is taken from the budget `within` as well, if there
    is one. Safe from several threads.
    """

    def __init__(self, limit_bytes: int | None = None, *, within: "MemoryBudget | None" = None) -> None:
        self.limit_bytes = limit_bytes
        self._within = within
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def take(self, num_bytes: int) -> None:
        """Raises: OutOfMemory if the budget has no room for `num_bytes` more."""
        with self._lock:
            if self.limit_bytes is not None and self._used_bytes + num_bytes > self.limit_bytes:
                raise OutOfMemory(
                    f"The KV budget is {self.limit_bytes / 2**20:.0f} MiB, of which "
                    f"{self._used_bytes / 2**20:.0f} are taken; this cache asks for "
                    f"{num_bytes / 2**20:.0f} more. Clear a chat, ask for fewer tokens or compress more."
                )
            if self._within is not None:
                self._within.take(num_bytes)
            self._used_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        with self._lock:
            self._used_bytes -= num_bytes
        if self._within is not None:
            self._within.give(num_bytes)


class CacheMemory:
    """The tensors of one cache, each taken from a budget before it exists.

    `num_allocations` grows with every tensor: as long as it stays the same, so do their addresses.
    """

    def __init__(self, device: torch.device, budget: MemoryBudget) -> None:
        self.num_allocations = 0
        self._device = device
        self._budget = budget
        self._taken_bytes = 0

    def allocate(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Raises: OutOfMemory where the budget or the device has no room for it."""
        num_bytes = dtype.itemsize * torch.Size(size).numel()
        self._budget.take(num_bytes)
        try:
            tensor = torch.empty(size, dtype=dtype, device=self._device)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            self._budget.give(num_bytes)
            raise OutOfMemory(
                f"The device has no room for {num_bytes / 2**20:.0f} MiB more of KV cache. "
                "Shorten the context, lower the new tokens or compress more."
            ) from error
        self._taken_bytes += num_bytes
        self.num_allocations += 1
        return tensor

    def discard(self, tensor: torch.Tensor | None) -> None:
        """Give back to the budget what `tensor` took."""
        if tensor is not None:
            self._budget.give(tensor.nbytes)
            self._taken_bytes -= tensor.nbytes

    def give_back(self) -> None:
        """Give everything back."""
        self._budget.give(self._taken_bytes)
        self._taken_bytes = 0
