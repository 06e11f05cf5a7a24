"""What the page shows of sparse codes, against a literal computation from what the cache rebuilds."""

import numpy as np
import pytest
import torch

from kvlens.engine import atoms
from kvlens.engine.facts import StandInFacts
from kvlens.engine.methods.csr import CsrCache, CsrConfig
from kvlens.engine.methods.kivi import KiviCache, KiviConfig
from kvlens.engine.shape import ModelShape

SHAPE = ModelShape(num_layers=2, num_query_heads=2, num_kv_heads=2, head_dim=64)
COUNT = 70
PAPER = {"keys": "before RoPE", "coefficient_bits": 16, "value_parts": 2, "pursuit": "MP", "is_centred": False}
CONFIGS = {
    "paper": CsrConfig(num_atoms=256, window=0, flush=1, num_sinks=0, **PAPER),
    "centred before RoPE": CsrConfig(num_atoms=256, keys="before RoPE", window=16, flush=8, num_sinks=3),
    "centred after RoPE": CsrConfig(num_atoms=256, keys="after RoPE", window=16, flush=8, num_sinks=3),
}


def filled(config, count: int = COUNT, layer: int = 1):
    """A cache under the microscope with a random prompt; gives it with exact keys and values of `layer`."""
    cache = CsrCache(SHAPE, config, facts=StandInFacts(SHAPE))
    probe, exact = cache.watch(layer), None
    for each in range(SHAPE.num_layers):
        query, keys, values = (torch.randn(1, 2, count, 64) for _ in range(3))
        keys, values = keys.half().float(), values.half().float()
        cache.attend(each, query, keys, values, scaling=0.125)
        exact = (keys[0], values[0]) if each == layer else exact
    cache.end_prefill()
    return cache, atoms.snapshot(cache, probe.snapshot(cache)), exact


def restored(side, head: int, token: int) -> np.ndarray:
    """`start + sum of coefficient * atom`, written out."""
    total = side.start[head, min(token, side.start.shape[1] - 1)].copy()
    width = side.atoms.shape[1]
    for step in range(side.indices.shape[2]):
        for part in range(side.indices.shape[3]):
            atom = side.atoms[side.indices[head, token, step, part]]
            total[part * width : (part + 1) * width] += side.coefficients[head, token, step, part] * atom
    return total


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_atoms_add_up_to_what_the_cache_rebuilds(config):
    cache, snapshot, exact = filled(config)
    rotary, tile = cache.facts.rotary, cache.rebuild(1, 0, 0, COUNT)
    places = torch.arange(COUNT)
    for side, rebuilt, own in ((snapshot.keys, tile.keys, exact[0]), (snapshot.values, tile.values, exact[1])):
        if side is snapshot.keys and not config.is_after_rope:
            rebuilt, own = rotary.unrotate(rebuilt, places), rotary.unrotate(own, places)
        coded = slice(side.first_token, side.first_token + config.num_packed(0, COUNT))
        assert side.exact.shape == (2, config.num_packed(0, COUNT), 64)
        np.testing.assert_allclose(side.exact, own[:, coded], atol=1e-4)
        want = np.stack([[restored(side, head, token) for token in range(side.exact.shape[1])] for head in range(2)])
        np.testing.assert_allclose(want, rebuilt[:, coded], atol=1e-4)
        norm = np.linalg.norm(side.exact, axis=-1)
        for column, sums in ((0, side.start), (-1, want)):
            missing = np.linalg.norm(side.exact - sums, axis=-1)
            np.testing.assert_allclose(side.remaining[..., column], missing / norm, rtol=1e-4)
        assert side.remaining.shape[-1] == side.indices[0, 0].size + 1


def test_each_atom_of_a_pursuit_leaves_less():
    _, snapshot, _ = filled(CONFIGS["paper"])
    for side in (snapshot.keys, snapshot.values):
        assert (np.diff(side.remaining, axis=-1) <= 1e-3).all()
        assert (side.remaining[..., 0] == 1).all()


def test_coverage_is_the_share_of_atoms_used_in_each_layer():
    cache, snapshot, _ = filled(CONFIGS["paper"])
    for side, store in enumerate((cache._keys, cache._values)):
        for layer in range(SHAPE.num_layers):
            codes = store.read(cache._table.pool, cache._table.of(layer, 0), 0, COUNT)
            assert snapshot.coverage[side, layer] == pytest.approx(len(codes.indices.unique()) / 256)


def test_only_a_constant_mean_is_kept_once():
    _, snapshot, _ = filled(CONFIGS["centred after RoPE"])
    assert snapshot.keys.start.shape[1] == snapshot.keys.exact.shape[1]
    assert snapshot.values.start.shape[1] == 1
    assert np.abs(snapshot.values.start).min() > 0


def test_nothing_coded_yet_is_an_empty_picture():
    _, snapshot, _ = filled(CONFIGS["centred before RoPE"], count=10)
    assert snapshot.keys.indices.shape[1] == 0
    assert (snapshot.coverage == 0).all()


def test_tokens_from_before_the_microscope_came_are_not_known():
    cache, _, _ = filled(CONFIGS["paper"], layer=1)
    cache.probe.look_at(0)
    snapshot = atoms.snapshot(cache, cache.probe.snapshot(cache))
    assert snapshot.probed_layer == 0
    assert np.isnan(snapshot.keys.exact).all()
    assert np.isnan(snapshot.values.remaining).all()
    assert np.isfinite(snapshot.values.coefficients).all()


def test_a_method_without_sparse_codes_has_no_atoms():
    cache = KiviCache(SHAPE, KiviConfig())
    probe = cache.watch(0)
    tokens = torch.randn(1, 2, 40, 64)
    for layer in range(SHAPE.num_layers):
        cache.attend(layer, tokens, tokens, tokens, scaling=0.125)
    cache.end_prefill()
    assert atoms.snapshot(cache, probe.snapshot(cache)) is None
