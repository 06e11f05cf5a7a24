"""A decoder's step in native code gives what its definition gives."""

import ctypes

import numba
import pytest
import torch

from kvlens.kernels.decoder_step import DecoderWeights, LayerWeights, cpu, reference
from kvlens.kernels.native import jit
from kvlens.kernels.native.jit import depends_on
from kvlens.kernels.native.program import Program, Task
from kvlens.kernels.native.scalars import atomic_add, read_int64, write_int64

HIDDEN, INNER, DIM, QUERIES, KEYS, VOCABULARY = 64, 112, 32, 4, 2, 203


def weights(dtype: torch.dtype, *, has_biases: bool = False, has_head_norms: bool = False) -> DecoderWeights:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) / columns**0.5).to(dtype)

    def layer() -> LayerWeights:
        biases = [torch.randn(rows * DIM) if has_biases else None for rows in (QUERIES, KEYS, KEYS)]
        norms = [torch.rand(DIM) + 0.5 if has_head_norms else None for _ in range(2)]
        return LayerWeights(
            torch.rand(HIDDEN) + 0.5, matrix(QUERIES * DIM, HIDDEN), matrix(KEYS * DIM, HIDDEN),
            matrix(KEYS * DIM, HIDDEN), matrix(HIDDEN, QUERIES * DIM), torch.rand(HIDDEN) + 0.5,
            matrix(INNER, HIDDEN), matrix(INNER, HIDDEN), matrix(HIDDEN, INNER), *biases, *norms,
        )  # fmt: skip

    head = matrix(VOCABULARY, HIDDEN)
    return DecoderWeights(
        matrix(VOCABULARY, HIDDEN), (layer(), layer()), torch.rand(HIDDEN) + 0.5, head, DIM, epsilon=1e-5
    )


def attend(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Something of all three that differs from layer to layer."""
    return (layer + 1) * query * key.repeat_interleave(2, 1) + value.repeat_interleave(2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"has_biases": True}, {"has_head_norms": True}], ids=["llama", "qwen2", "qwen3"]
)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 16])
def test_a_step_equals_the_definition(dtype, options, num_rows, poisoned):
    model = weights(dtype, **options)
    decoder = cpu.Decoder(model, num_rows)
    for first in (0, VOCABULARY - num_rows, 17):
        tokens, angle = range(first, first + num_rows), torch.rand(num_rows, DIM // 2) * 6
        want = reference.Decoder(model).run(tokens, angle.cos(), angle.sin(), attend)
        got = decoder.run(tokens, angle.cos(), angle.sin(), attend)
        torch.testing.assert_close(got, want, atol=3e-5, rtol=3e-5)


def test_large_gates_neither_overflow_nor_vanish():
    model = weights(torch.float32)
    for layer in model.layers:
        layer.gate.mul_(500)
    angle = torch.rand(1, DIM // 2)
    want = reference.Decoder(model).run([3], angle.cos(), angle.sin(), attend)
    got = cpu.Decoder(model).run([3], angle.cos(), angle.sin(), attend)
    torch.testing.assert_close(got, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4)


def test_sizes_that_the_kernels_do_not_read_are_refused():
    model = weights(torch.float32)
    with pytest.raises(ValueError, match="multiple of 16"):
        cpu.Decoder(DecoderWeights(model.embedding[:, :60].clone(), model.layers, model.norm, model.head, DIM, 1e-5))


class Counters(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("total", "seen", "num_items"))


def counting_kernel(source):
    def count(arguments, item, thread):
        depends_on(source)
        atomic_add(arguments, item + 1)

    return count


def announcing_kernel(source):
    """Keeps what earlier tasks have summed up, and says how many items come next."""

    def announce(arguments, item, thread):
        depends_on(source)
        write_int64(arguments + 8, read_int64(arguments))
        write_int64(arguments + 16, 3)

    return announce


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_waiting_task_sees_all_that_was_before_it(num_threads):
    counters = Counters()
    count, announce = (jit.kernel(factory).address for factory in (counting_kernel, announcing_kernel))
    program = Program(
        [
            Task(count, counters, 100),
            Task(count, counters, 10, waits=False),
            Task(announce, counters),
            Task(count, counters, ctypes.c_int64.from_buffer(counters, Counters.num_items.offset)),
        ],
        num_threads,
    )
    for _ in range(200):
        counters.total = counters.seen = counters.num_items = 0
        program.run()
        assert (counters.seen, counters.total) == (5050 + 55, 5050 + 55 + 6)


def patient_kernel(source):
    """Waits, but not for ever, until somebody has counted; then keeps what was counted."""

    def wait(arguments, item, thread):
        depends_on(source)
        spins = 0
        while atomic_add(arguments, 0) == 0 and spins < 10**8:
            spins += 1
        write_int64(arguments + 8, atomic_add(arguments, 0))

    return wait


def test_a_task_aside_does_not_hold_up_the_next_one_but_the_one_after():
    counters = Counters()
    wait, count, announce = (jit.kernel(each).address for each in (patient_kernel, counting_kernel, announcing_kernel))
    aside = Task(wait, counters, is_aside=True)
    Program([aside, Task(count, counters)], 2).run()
    assert (counters.total, counters.seen) == (1, 1)
    counters.total = counters.seen = 0
    Program([aside, Task(count, counters), Task(announce, counters), Task(count, counters)], 2).run()
    assert (counters.total, counters.seen) == (2, 1)


def test_who_watches_hears_of_kernels_that_are_compiled_and_not_of_those_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    heard = []
    for _ in range(2):  # the second time stands for another process
        monkeypatch.setattr(jit, "_kernels", {})
        with jit.watched(heard.append):
            jit.kernel(counting_kernel)
            jit.kernel(announcing_kernel)
            jit.kernel(counting_kernel)
    jit.kernel(waiting_kernel)
    assert heard == [1, 2]


def waiting_kernel(source):
    def wait(arguments, item, thread):
        depends_on(source)

    return wait
