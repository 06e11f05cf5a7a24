"""What the CSR paper states, checked to the byte and the formula; and what our compact mode promises."""

import pytest
import torch

from kvlens.engine.errors import EngineError
from kvlens.engine.facts import StandInFacts
from kvlens.engine.methods.csr import CsrCache, CsrConfig
from kvlens.engine.registry import method
from kvlens.engine.shape import ModelShape

LLAMA_7B = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=32, head_dim=128)
SMALL = ModelShape(num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
PRESETS = method("csr").presets
PAPER = {name: config for name, config in PRESETS.items() if "(paper)" in name}
COMPACT = {name: config for name, config in PRESETS.items() if "(paper)" not in name}
SCALING = 0.125


def filled(config: CsrConfig, count: int, **options) -> tuple[CsrCache, torch.Tensor, torch.Tensor]:
    """A cache with a prompt of `count` random tokens, and its exact keys and values `[HK, T, D]`."""
    cache = CsrCache(SMALL, config, facts=StandInFacts(SMALL), **options)
    query = torch.randn(1, SMALL.num_query_heads, count, SMALL.head_dim)
    keys, values = (torch.randn(1, SMALL.num_kv_heads, count, SMALL.head_dim).half() for _ in range(2))
    cache.attend(0, query, keys.float(), values.float(), scaling=SCALING)
    cache.end_prefill()
    return cache, keys[0], values[0]


@pytest.mark.parametrize(("name", "sparsity"), [("CSR-4", 4), ("CSR-6", 6), ("CSR-8", 8), ("CSR-16", 16)])
def test_the_papers_presets_store_the_papers_bits_at_its_head_size(name, sparsity):
    config = next(config for preset, config in PAPER.items() if preset.startswith(name + ","))
    parts = config.estimate(LLAMA_7B, 1000)
    stored = parts["indices"] + parts["coefficients"]
    # 32 bits an atom, s atoms a key and s/2 for each half of a value: every token is coded.
    assert (
        8 * stored
        == 1000 * LLAMA_7B.values_per_token * 32 * sparsity / 128
        == 1000 * LLAMA_7B.values_per_token * config.bits
    )
    assert parts["window"] == parts["sinks"] == 0
    assert config.recipe(128, 1).atoms == sparsity
    assert config.recipe(128, 2).atoms == sparsity // 2


def literal_pursuit(vector: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> torch.Tensor:
    """Equations 2 to 4 of the paper for one vector, in fp64; gives what the coefficients restore."""
    residual, restored = vector.double(), torch.zeros_like(vector, dtype=torch.float64)
    for _ in range(sparsity):
        products = atoms.double() @ residual
        best = products.abs().argmax()
        residual = residual - products[best] * atoms[best].double()
        restored = restored + products[best] * atoms[best].double()
    return restored


def test_the_paper_mode_codes_keys_before_rope_and_values_in_halves():
    config = PAPER["CSR-8, 2 bit (paper)"]
    cache, keys, values = filled(config, 40)
    facts, tile = StandInFacts(SMALL), cache.rebuild(0, 0, 0, 40)
    dictionary, places = facts.dictionary(config.kind), torch.arange(40)
    before = facts.rotary.unrotate(keys.float(), places)
    want = torch.stack(
        [torch.stack([literal_pursuit(key, dictionary.keys[0], 4) for key in head]) for head in before]
    ).float()
    torch.testing.assert_close(tile.keys, facts.rotary.rotate(want, places), atol=4e-3, rtol=4e-3)
    halves = values.float().unflatten(-1, (2, 32))
    want = torch.stack(
        [
            torch.stack(
                [torch.cat([literal_pursuit(half, dictionary.values[0], 2) for half in token]) for token in head]
            )
            for head in halves
        ]
    ).float()
    torch.testing.assert_close(tile.values, want, atol=4e-3, rtol=4e-3)


def test_the_paper_mode_keeps_nothing_exact_after_a_step():
    cache, *_ = filled(PAPER["CSR-4, 1 bit (paper)"], 30)
    token = torch.randn(1, 2, 1, 64)
    cache.attend(0, token, token, token, scaling=SCALING)
    assert cache.lengths[0] == [31]
    assert cache.parts()["window"] == 0
    # The pages hold the token; what is rebuilt differs from what came in.
    assert not torch.allclose(cache.rebuild(0, 0, 30, 31).keys, token[0].half().float(), atol=1e-2)


@pytest.mark.parametrize("preset", COMPACT)
@pytest.mark.parametrize("shape", [LLAMA_7B, SMALL], ids=["128", "64"])
def test_the_compact_mode_holds_its_budget_with_the_scale_counted(preset, shape):
    config = COMPACT[preset]
    coded = config.num_packed(0, 4000)
    parts = config.estimate(shape, 4000)
    bits = 8 * (parts["codes"] + parts["scales"]) / (coded * shape.values_per_token)
    assert bits == config.bits


def test_the_compact_mode_keeps_sinks_and_window_exact_and_codes_in_blocks():
    config = CsrConfig(window=16, flush=8, num_sinks=3, num_atoms=256)
    cache, keys, values = filled(config, 50)
    coded = config.num_packed(0, 50)
    assert coded == (50 - 3 - 16) // 8 * 8
    tile = cache.rebuild(0, 0, 0, 50)
    for exact, rebuilt in ((keys, tile.keys), (values, tile.values)):
        assert torch.equal(rebuilt[:, :3], exact[:, :3].float())
        assert torch.equal(rebuilt[:, 3 + coded :], exact[:, 3 + coded :].float())
        assert not torch.allclose(rebuilt[:, 3 : 3 + coded], exact[:, 3 : 3 + coded].float(), atol=1e-2)


def test_one_prompt_and_many_steps_give_the_same_codes():
    config = CsrConfig(window=16, flush=8, num_sinks=3, num_atoms=256)
    whole, keys, values = filled(config, 90)
    stepped = CsrCache(SMALL, config, facts=StandInFacts(SMALL))
    query = torch.randn(1, 2, 1, 64)
    for token in range(90):
        stepped.attend(
            0, query, *(side[None, :, token : token + 1].float() for side in (keys, values)), scaling=SCALING
        )
    for one, other in zip(*(vars(cache.rebuild(0, 0, 0, 90)).values() for cache in (whole, stepped)), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


def test_dictionaries_count_beside_the_cache():
    cache, *_ = filled(CsrConfig(num_atoms=512), 100)
    atoms, means = 2 * 512 * 64, 2 * SMALL.num_kv_heads * 64
    assert cache.shared_bytes == 4 * (atoms + means)
    assert cache.footprint().shared_bytes == cache.shared_bytes
    assert cache.parts()["dictionary"] == 0


def test_atoms_of_the_prompt_count_in_the_cache_and_lower_its_error():
    plain = PAPER["CSR-8, 2 bit (paper)"]
    own = PRESETS["CSR-8 with atoms of the prompt (paper)"]
    errors = []
    for config in (plain, own):
        torch.manual_seed(5)
        cache, keys, _ = filled(config, 60)
        errors.append((cache.rebuild(0, 0, 0, 60).keys - keys.float()).square().sum().item())
    # 120 vectors of keys fit the 512 places, so each may become an atom: hardly anything is left to lose.
    assert errors[1] < 0.01 * errors[0]
    assert cache.parts()["dictionary"] == 512 * (64 + 32) * 2 == own.estimate(SMALL, 60)["dictionary"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_atoms": 2048}, "must be at most 1024"),
        ({"bits": 2.5}, "bits must be one of"),
        ({"keys": "sideways"}, "keys must be one of"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        CsrConfig(**settings)


def test_a_head_with_too_many_atoms_is_refused():
    with pytest.raises(ValueError, match="at most 32 atoms a vector"):
        CsrConfig(bits=4.0).check(ModelShape(1, 1, 1, 256))


def test_without_a_model_it_says_what_is_missing():
    with pytest.raises(EngineError, match=r"LoadedModel\.new_cache"):
        CsrCache(SMALL, CsrConfig())
