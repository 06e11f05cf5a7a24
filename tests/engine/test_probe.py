"""The microscope: errors against the lane's own exact tensors."""

import numpy as np
import pytest
import torch

from kvlens.engine.methods.kivi import KiviCache, KiviConfig
from kvlens.engine.shape import ModelShape

SHAPE = ModelShape(num_layers=2, num_query_heads=2, num_kv_heads=2, head_dim=32)


def run(cache: KiviCache, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append tokens to both layers; gives keys and values of layer 1 `[HK, T, D]`."""
    for layer in range(SHAPE.num_layers):
        query, keys, values = (torch.randn(1, 2, count, 32) for _ in range(3))
        keys[..., 5] *= 10
        keys, values = keys.half().float(), values.half().float()
        cache.attend(layer, query, keys, values, scaling=0.2)
    if count > 1:
        cache.end_prefill()
    return keys[0], values[0]


def test_errors_are_those_between_exact_and_rebuilt_tokens():
    cache = KiviCache(SHAPE, KiviConfig(residual_length=32))
    probe = cache.watch(layer=1)
    pieces = [run(cache, 150)] + [run(cache, 1) for _ in range(60)]
    exact = [torch.cat(side, dim=1) for side in zip(*pieces, strict=True)]
    snapshot = probe.snapshot(cache)
    tile = cache.rebuild(1, 0, 0, 210)
    for side, rebuilt in enumerate((tile.keys, tile.values)):
        packed = (192, 178)[side]
        difference, norm = (exact[side] - rebuilt)[:, :packed], exact[side][:, :packed]
        want = difference.norm(dim=-1) / norm.norm(dim=-1)
        np.testing.assert_allclose(snapshot.by_token[side, 1, :, :packed], want, rtol=2e-3)
        assert np.isnan(snapshot.by_token[side, 1, :, packed:]).all()
        want = difference.norm(dim=1) / norm.norm(dim=1)
        np.testing.assert_allclose(snapshot.by_channel[side, 1], want, rtol=1e-4)
        want = difference.flatten(1).norm(dim=-1) / norm.flatten(1).norm(dim=-1)
        np.testing.assert_allclose(snapshot.by_head[side, 1], want, rtol=1e-4)
        np.testing.assert_allclose(snapshot.peak_channel[side, 1], norm.abs().amax(dim=1), rtol=1e-6)
        np.testing.assert_allclose(snapshot.exact[side], exact[side], rtol=1e-3)
        np.testing.assert_allclose(snapshot.rebuilt[side], rebuilt, rtol=1e-6)
    assert snapshot.peak_channel[0, 1, :, 5].min() > 3 * np.median(snapshot.peak_channel[0, 1])


def test_only_the_layer_under_the_microscope_keeps_exact_copies():
    cache = KiviCache(SHAPE, KiviConfig(residual_length=32))
    probe = cache.watch(layer=0)
    run(cache, 500)
    probe.measure(cache)
    exact_layer = 2 * 32 * 2 * (480 + 468)
    statistics = probe.nbytes - exact_layer
    assert cache.footprint().probe_bytes == probe.nbytes
    assert 0 < statistics < exact_layer
    probe.look_at(1)
    probe.measure(cache)
    assert probe.nbytes == statistics
    snapshot = probe.snapshot(cache)
    assert np.isnan(snapshot.exact[0, :, :480]).all()
    assert not np.isnan(snapshot.exact[0, :, 480:]).any()
    with pytest.raises(ValueError, match="between 0 and 1; got 2"):
        probe.look_at(2)


def test_going_back_forgets_what_was_measured_since():
    cache = KiviCache(SHAPE, KiviConfig(residual_length=32))
    probe = cache.watch(layer=0)
    run(cache, 100)
    before = probe.snapshot(cache)
    moment = cache.checkpoint()
    run(cache, 200)
    probe.snapshot(cache)
    cache.rollback(moment)
    after = probe.snapshot(cache)
    for name in ("by_token", "by_head", "by_channel", "peak_channel", "exact", "rebuilt"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)


def test_going_back_with_the_microscope_on_another_layer_shows_nothing_of_the_old_one():
    cache = KiviCache(SHAPE, KiviConfig(residual_length=32))
    probe = cache.watch(layer=0)
    run(cache, 150)
    moment = cache.checkpoint()
    run(cache, 1)
    probe.look_at(1)
    cache.rollback(moment)
    snapshot = probe.snapshot(cache)
    assert snapshot.probed_layer == 1
    is_packed = np.isfinite(snapshot.by_token[:, 1])
    assert is_packed.any()
    assert np.isnan(snapshot.exact[is_packed]).all()


def test_a_checkpoint_keeps_no_copy_of_the_prompt():
    cache = KiviCache(SHAPE, KiviConfig(residual_length=32))
    probe = cache.watch(layer=0)
    run(cache, 500)
    before = probe.nbytes
    saved = cache.checkpoint().probe
    kept = sum(block.exact.nbytes for block in saved[-1])
    assert {block.layer for block in saved[-1]} == {0}
    # Of the two layers' packed prompt that of the layer under the microscope stays.
    assert probe.nbytes < before - kept / 2
