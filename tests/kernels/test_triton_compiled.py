"""The Triton kernels compiled for GPUs that need not be here: they compile, spill nothing and stay lean.

The first run compiles (some 4 s a kernel); Triton keeps the results in its cache.
"""

import os

import pytest
import torch

from benchmarks.instructions import SHIPPED, Shape, compile_attend, empty_inputs, inspect
from kvlens.kernels.packed_attend import triton as packed_attend
from kvlens.kernels.packed_attend.tiling import tiling_of
from kvlens.kernels.quantize_pack import triton as quantize_pack

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# Instructions for each stored value that leave an H200 at its memory bandwidth (see benchmarks/instructions.py)
BUDGET = {2: 2.3, 4: 3.9}


# On the H100 and H200 every shape in one of its dtypes; on the A100 and on RTX Blackwell two
TO_COMPILE = [
    *((90, shape) for i, shape in enumerate(SHIPPED) if (i // 2 + i) % 2 == 0),
    *((arch, Shape(2)) for arch in (80, 120)),
    *((arch, Shape(4, num_kv_heads=8, dtype=torch.bfloat16)) for arch in (80, 120)),
]


@pytest.mark.parametrize(("arch", "shape"), TO_COMPILE, ids=str)
def test_attention_spills_nothing_and_keeps_its_budget(arch, shape):
    compiled = compile_attend(shape, arch)
    assert compiled.stack_bytes == 0
    assert compiled.registers <= 255
    assert not any(name.startswith(("LDL", "STL")) for name in compiled.loop)
    assert any(name.startswith("HMMA") for name in compiled.loop), "the products must be on the tensor cores"
    if shape.head_dim == 128:  # half the channels share the same overhead at 64
        assert compiled.per_value <= BUDGET[shape.bits]


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, head_dim=64, page_tokens=32),
        Shape(4, head_dim=96, num_query_heads=9, num_kv_heads=1, group_size=96, page_tokens=96),
        Shape(2, head_dim=256, num_query_heads=4, num_kv_heads=1, dtype=torch.bfloat16),
        Shape(8, head_dim=64, dtype=torch.float32, num_sinks=0),
        Shape(1, head_dim=64, page_tokens=256),
    ],
    ids=str,
)
def test_attention_compiles_for_every_layout(shape):
    _, launches = packed_attend.prepare(*empty_inputs(shape), scaling=1.0, arch=90)
    for launch in launches:
        assert launch.compile(90).asm["cubin"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_quantizing_spills_nothing(bits, dtype):
    tokens = torch.empty(2, 8, 128, 128, dtype=dtype)
    for values in (tokens, tokens.transpose(-1, -2)):
        _, (launch,) = quantize_pack.prepare(values, bits=bits, group_size=32)
        assert inspect(launch.compile(90).asm["cubin"])["STACK"] == 0


def test_a_gpu_too_old_is_named():
    with pytest.raises(ValueError, match="compute capability 80 or newer; got 75"):
        packed_attend.prepare(*empty_inputs(Shape(2)), scaling=1.0, arch=75)


def test_tensors_on_the_cpu_are_named():
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        packed_attend.packed_attend(*empty_inputs(Shape(2)), scaling=1.0)


def test_the_cache_tells_tilings_apart():
    """Triton finds compiled kernels by what their constants print as."""
    one, other = (tiling_of(*empty_inputs(Shape(2, window=window))) for window in (128, 129))
    assert repr(one) != repr(other)
