"""The attention of training on AMX tiles against its fp32 reference, and that a compiled training step takes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import profile

from tools.embedded_model import attention
from tools.embedded_model.train import ModelShape, build_model, weighted_loss

BFLOAT16_STEP = 2**-8
needs_tiles = pytest.mark.skipif(not attention.has_tiles(), reason="this processor has no AMX tiles")


@pytest.fixture
def poisoned():
    """Memory that is allocated without a value holds NaN, so that a place that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(batch: int, query_heads: int, key_heads: int, tokens: int, *, spread: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys and values that want gradients, in bfloat16."""
    shapes = ((batch, heads, tokens, attention.DIM) for heads in (query_heads, key_heads, key_heads))
    generator = torch.Generator().manual_seed(7)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(tensor * factor).bfloat16() for tensor, factor in zip(made, (spread, 1.0, 1.0), strict=True)]


def assert_as_reference(tensors: list[torch.Tensor], *, tolerance: float = 2 * BFLOAT16_STEP) -> None:
    """Outputs and all gradients against those of the reference, by the norm of what differs."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    wanted = [tensor.float().requires_grad_() for tensor in tensors]
    outputs, reference = attention.attend(*own)[0], attention.attend_reference(*wanted)
    gradient = torch.randn(reference.shape, generator=torch.Generator().manual_seed(8)).bfloat16()
    outputs.backward(gradient)
    reference.backward(gradient.float())
    pairs = [(outputs, reference), *((a.grad, b.grad) for a, b in zip(own, wanted, strict=True))]
    for got, expected in pairs:
        # Where all of a gradient cancels, what is left is the rounding of its terms.
        size = max(expected.norm().item(), BFLOAT16_STEP * expected.numel() ** 0.5)
        assert (got.float() - expected).norm().item() <= tolerance * size


@needs_tiles
@pytest.mark.parametrize("sizes", [(1, 1, 1, 64), (2, 4, 2, 192), (3, 6, 2, 128), (1, 4, 2, 1024)])
def test_outputs_and_gradients_are_the_reference_s(poisoned, sizes):
    assert_as_reference(drawn(*sizes))


@needs_tiles
def test_scores_far_apart_and_far_from_zero(poisoned):
    assert_as_reference(drawn(1, 2, 1, 256, spread=40.0), tolerance=8 * BFLOAT16_STEP)


@needs_tiles
def test_equal_keys_give_the_mean_of_the_values_so_far(poisoned):
    queries, keys, values = drawn(1, 2, 1, 128)
    outputs, log_sums = attention.attend(queries, keys[:, :, :1].expand_as(keys).contiguous(), values)
    counts = torch.arange(1, 129)
    means = values[0, 0].float().cumsum(0) / counts[:, None]
    assert torch.allclose(outputs[0, :, 0].float(), means, atol=2 * BFLOAT16_STEP)
    score = queries[0, 0].float() @ keys[0, 0, 0].float() * attention.DIM**-0.5 / torch.log(torch.tensor(2.0))
    assert torch.allclose(log_sums[0, 0], score + counts.log2(), atol=1e-3)


@needs_tiles
@given(
    batch=st.integers(1, 3), key_heads=st.integers(1, 3), group=st.integers(1, 3), blocks=st.integers(1, 4),
    spread=st.sampled_from((0.0, 0.1, 1.0, 4.0)),
)  # fmt: skip
def test_any_shape_is_as_the_reference(batch, key_heads, group, blocks, spread):
    tensors = drawn(batch, group * key_heads, key_heads, attention.BLOCK * blocks, spread=spread)
    assert_as_reference(tensors, tolerance=4 * BFLOAT16_STEP)


@needs_tiles
def test_a_traced_training_step_takes_it_and_its_loss_and_gradients_are_torch_s():
    """Traced, transformers would make a mask that no step needs, and the model would take torch's attention."""
    torch.manual_seed(3)
    shape = ModelShape(vocab_size=300, hidden_size=128, num_layers=2, mlp_size=128)
    token_ids, weights = torch.randint(0, 300, (2, 129)), torch.rand(2, 129)
    step = torch.compile(weighted_loss, backend="eager")
    losses, gradients, ran = [], [], []
    for with_tiles in (False, True):
        torch.manual_seed(4)
        model = build_model(shape)
        if with_tiles:
            attention.use_tiles(model)
        with profile() as profiler, torch.autocast("cpu", torch.bfloat16):
            loss, _ = step(model, token_ids, weights)
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        ran.append({event.key for event in profiler.key_averages()})
    assert "aten::scaled_dot_product_attention" in ran[0]
    assert {"kvlens_training::attend", "kvlens_training::attend_gradients"} <= ran[1]
    assert "aten::scaled_dot_product_attention" not in ran[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (gradients[1] - gradients[0]).norm() <= 0.02 * gradients[0].norm()


@needs_tiles
def test_a_row_of_another_length_or_with_padding_takes_torch_s_attention():
    model = build_model(ModelShape(vocab_size=300, hidden_size=128, num_layers=1, mlp_size=128)).eval()
    token_ids = torch.randint(0, 300, (2, 100))
    padding = torch.ones_like(token_ids)
    padding[1, :30] = 0
    with torch.no_grad():
        wanted = [model(token_ids, attention_mask=mask).logits[:, 40:] for mask in (None, padding)]
        attention.use_tiles(model)
        with torch.autocast("cpu", torch.bfloat16):
            got = [model(token_ids, attention_mask=mask).logits[:, 40:] for mask in (None, padding)]
    for own, expected in zip(got, wanted, strict=True):
        assert (own.float() - expected).norm() <= 0.02 * expected.norm()


@needs_tiles
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k, v), "queries must be contiguous bfloat16"),
        (lambda q, k, v: (q, k.transpose(1, 2), v), "keys must be contiguous bfloat16"),
        (lambda q, k, v: (q[:, :, :100].contiguous(), k, v), "B and T must be the same"),
        (lambda q, k, v: [t[:, :, :100].contiguous() for t in (q, k, v)], "T a multiple of 64"),
        (lambda q, k, v: (q[:, :1].contiguous(), k, v), "HQ one of HK"),
    ],
)
def test_tensors_of_another_kind_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        attention.attend(*change(*drawn(1, 4, 2, 128)))


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no-such-compiler .* failed: .*install g\+\+ or train with --no-tiles"):
        attention.library.__wrapped__()
