"""Quantize-and-pack against its definition: every code must agree, not nearly every one."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cases import QuantizeCase, build_values, quantize_cases
from hypothesis import HealthCheck, given, settings

from kvlens.kernels import quantize_pack as operation
from kvlens.kernels.quantize_pack import Packed, reference

BOUNDED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(got: Packed, expected: Packed) -> None:
    for part in ("codes", "scale", "minimum"):
        ours, theirs = getattr(got, part), getattr(expected, part)
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        different = int((ours != theirs).sum())
        assert different == 0, f"{different} of {ours.numel()} {part} differ"


@pytest.mark.parametrize("case", quantize_cases(), ids=lambda case: case.name)
def test_equals_the_reference(case, implementation):
    values = build_values(case)
    got = implementation("quantize_pack")(values, bits=case.bits, group_size=case.group_size)
    assert_same(got, reference.quantize_pack(values, bits=case.bits, group_size=case.group_size))


@given(data=st.data())
@BOUNDED
def test_equals_the_reference_on_any_shape(implementation, data):
    bits = data.draw(st.sampled_from(operation.BITS))
    group_size = data.draw(st.sampled_from([4, 16, 24, 32]))
    num_groups = data.draw(st.integers(1, 8).filter(lambda n: n * group_size * bits % 16 == 0))
    case = QuantizeCase(
        name="drawn",
        shape=(*data.draw(st.lists(st.integers(0, 4), max_size=3)), num_groups * group_size),
        bits=bits,
        group_size=group_size,
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        spread=data.draw(st.sampled_from(["normal", "equal", "outliers", "tiny", "far"])),
        strides=data.draw(st.sampled_from(["contiguous", "sliced"])),
    )
    values = build_values(case, seed=data.draw(st.integers(0, 2**20)))
    got = implementation("quantize_pack")(values, bits=bits, group_size=group_size)
    assert_same(got, reference.quantize_pack(values, bits=bits, group_size=group_size))


@pytest.mark.parametrize("bits", operation.BITS)
def test_error_is_at_most_half_a_step(bits, implementation):
    values = torch.randn(7, 3, 128)
    packed = implementation("quantize_pack")(values, bits=bits, group_size=32)
    error = (reference.dequantize(packed, bits=bits, group_size=32) - values).abs()
    step = packed.scale.float().repeat_interleave(32, dim=-1)
    rounding = 2**-10 * values.abs().max()  # of the scale and the minimum to fp16
    assert bool((error <= 0.5 * step + rounding * 2**bits / 2).all())


def test_planar_layout_by_hand(implementation):
    """Eight 2-bit codes a word: value i of sixteen lies in word i % 2, slot i // 2."""
    values = torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    packed = implementation("quantize_pack")(values, bits=2, group_size=16)
    words = [sum(int(values[2 * slot + word]) << 2 * slot for slot in range(8)) for word in (0, 1)]
    assert [int(word) & 0xFFFF for word in packed.codes] == words
    assert packed.scale.tolist() == [1.0]
    assert packed.minimum.tolist() == [0.0]


def test_bytes_are_three_bits_a_value(implementation):
    packed = implementation("quantize_pack")(torch.randn(4, 128), bits=2, group_size=32)
    assert packed.nbytes * 8 == 4 * 128 * 3


def test_concurrent_calls_do_not_mix(implementation):
    quantize_pack = implementation("quantize_pack")
    inputs = [torch.randn(64, 32, 128, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [reference.quantize_pack(values, bits=2, group_size=32) for values in inputs]
    failures = []

    def work(index):
        try:
            for _ in range(10):
                assert_same(quantize_pack(inputs[index], bits=2, group_size=32), expected[index])
        except AssertionError as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize(
    ("length", "bits", "group_size", "message"),
    [(128, 3, 32, "bits must be one of"), (100, 2, 32, "group_size must divide"), (4, 2, 4, "whole 16-bit words")],
)
def test_bad_layouts_are_named(length, bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        operation.quantize_pack(torch.randn(length), bits=bits, group_size=group_size)


def test_a_second_process_compiles_nothing(tmp_path):
    program = (
        "import torch\n"
        "from kvlens.kernels.native import jit\n"
        "from kvlens.kernels.quantize_pack.cpu import quantize_pack\n"
        "quantize_pack(torch.randn(4, 64), bits=2, group_size=32)\n"
        "print(all(kernel.from_disk for kernel in jit.compiled()), len(jit.compiled()))\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": root}
    answers = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [answer.stdout.strip() for answer in answers] == ["False 2", "True 2"]
