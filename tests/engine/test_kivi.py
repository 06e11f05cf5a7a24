"""What the KIVI paper and its authors' code state, checked to the bit."""

import pytest
import torch

from kvlens.engine.methods.kivi import KiviCache, KiviConfig
from kvlens.engine.shape import ModelShape

LLAMA_7B = ModelShape(num_layers=32, num_query_heads=32, num_kv_heads=32, head_dim=128)
SMALL = ModelShape(num_layers=1, num_query_heads=2, num_kv_heads=2, head_dim=64)
SCALING = 0.125


def fill(cache: KiviCache, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Append a prompt of `count` random tokens; gives exact keys and values `[HK, T, D]`."""
    shape = cache.shape
    query = torch.randn(1, shape.num_query_heads, count, shape.head_dim)
    keys, values = (torch.randn(1, shape.num_kv_heads, count, shape.head_dim).half() for _ in range(2))
    cache.attend(0, query, keys.float(), values.float(), scaling=SCALING)
    cache.end_prefill()
    return keys[0], values[0]


def authors_quantize(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The authors' formula for one group, written out number by number in fp64."""
    low, high = values.min().item(), values.max().item()
    scale = torch.tensor((high - low) / (2**bits - 1)).half().item()
    out = []
    for value in values.tolist():
        code = 0 if scale == 0 else round(min(max((value - low) / scale, 0), 2**bits - 1))
        out.append(code * scale + low)
    return torch.tensor(out)


@pytest.mark.parametrize(
    ("config", "bits_per_packed_value"),
    [
        (KiviConfig(), 3.0),
        (KiviConfig(key_bits=4, value_bits=4), 5.0),
        (KiviConfig(group_size=64), 2.5),
        (KiviConfig(group_size=128), 2.25),
        (KiviConfig(key_bits=4, value_bits=2), 4.0),
        (KiviConfig(value_group_size=8), 2 + (1 + 4) / 2),
    ],
)
def test_bits_a_packed_value_are_what_the_paper_counts(config, bits_per_packed_value):
    num_tokens = 128 * 32
    parts = config.estimate(LLAMA_7B, num_tokens)
    keys, values = config.num_packed(0, num_tokens), config.num_packed(1, num_tokens)
    packed = LLAMA_7B.values_per_token // 2 * (keys + values)
    bits = {side: LLAMA_7B.values_per_token // 2 * count for side, count in (("k", keys), ("v", values))}
    group = config.value_group(LLAMA_7B.head_dim)
    key_bits, value_bits = config.key_bits + 32 / config.group_size, config.value_bits + 32 / group
    assert 8 * (parts["codes"] + parts["scales"]) == bits["k"] * key_bits + bits["v"] * value_bits
    assert (key_bits + value_bits) / 2 == bits_per_packed_value
    assert packed > 0


@pytest.mark.parametrize("length", [1, 127, 128, 129, 255, 256, 300, 400])
def test_prefill_packs_what_the_authors_pack(length):
    cache = KiviCache(SMALL, KiviConfig())
    fill(cache, length)
    view = cache.view(0, 0)
    assert view.num_packed_keys == length - length % 128
    assert view.num_packed_values == max(0, length - 128)


def test_decode_flushes_keys_in_blocks_and_values_one_by_one():
    cache = KiviCache(SMALL, KiviConfig(residual_length=32))
    fill(cache, 20)
    for length in range(21, 140):
        token = [torch.randn(1, 2, 1, 64) for _ in range(3)]
        cache.attend(0, *token, scaling=SCALING)
        view = cache.view(0, 1)
        assert (view.num_packed_keys, view.num_packed_values) == (length // 32 * 32, max(0, length - 32))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("group_size", "value_group_size"), [(32, 0), (64, 8), (128, 16)])
def test_packed_tokens_are_the_authors_formula(bits, group_size, value_group_size):
    config = KiviConfig(key_bits=bits, value_bits=bits, group_size=group_size, value_group_size=value_group_size)
    cache = KiviCache(SMALL, config)
    keys, values = fill(cache, 300)
    tile = cache.rebuild(0, 0, 0, 300)
    for head, channel, group in ((0, 0, 0), (1, 63, 1), (1, 17, 0)):
        tokens = slice(group * group_size, (group + 1) * group_size)
        want = authors_quantize(keys[head, tokens, channel].float(), bits)
        torch.testing.assert_close(tile.keys[head, tokens, channel], want, atol=1e-5, rtol=1e-5)
    width = config.value_group(64)
    for head, token, group in ((0, 0, 0), (1, 171, 64 // width - 1)):
        channels = slice(group * width, (group + 1) * width)
        want = authors_quantize(values[head, token, channels].float(), bits)
        torch.testing.assert_close(tile.values[head, token, channels], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tile.keys[:, 256:], keys[:, 256:].float(), atol=0, rtol=0)
    torch.testing.assert_close(tile.values[:, 172:], values[:, 172:].float(), atol=0, rtol=0)


def test_a_token_is_exact_in_the_step_that_adds_it_and_packed_after():
    cache = KiviCache(SMALL, KiviConfig(residual_length=32))
    keys, values = fill(cache, 31)
    query, key, value = (torch.randn(1, 2, 1, 64).half().float() for _ in range(3))
    got = cache.attend(0, query, key, value, scaling=SCALING)
    everything = [torch.cat([side.float(), new[0]], dim=1) for side, new in ((keys, key), (values, value))]
    want = torch.nn.functional.scaled_dot_product_attention(query[0], *everything, scale=SCALING)
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)
    assert cache.view(0, 0).num_packed_keys == 32


def test_all_equal_groups_stay_finite_and_exact():
    cache = KiviCache(SMALL, KiviConfig())
    constant = torch.full((1, 2, 300, 64), 1.5)
    cache.attend(0, torch.randn(1, 2, 300, 64), constant, constant, scaling=SCALING)
    cache.end_prefill()
    tile = cache.rebuild(0, 0, 0, 300)
    assert (tile.keys == 1.5).all()
    assert (tile.values == 1.5).all()


def test_options_that_depart_from_the_paper_keep_more_exact():
    sinks = KiviCache(SMALL, KiviConfig(num_sinks=4))
    keys, values = fill(sinks, 300)
    tile = sinks.rebuild(0, 0, 0, 4)
    torch.testing.assert_close(tile.keys, keys[:, :4].float(), atol=0, rtol=0)
    torch.testing.assert_close(tile.values, values[:, :4].float(), atol=0, rtol=0)
    assert sinks.view(0, 0).num_packed_keys == 256
    blocks = KiviConfig(value_flush=32)
    assert [blocks.num_packed(1, count) for count in (128, 159, 160, 191, 192)] == [0, 0, 32, 32, 64]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key_bits": 3}, "key_bits must be one of 2, 4; got 3"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128; got 48"),
        ({"group_size": 128, "residual_length": 192}, "residual_length must be a multiple of group_size"),
        ({"num_sinks": 65}, "num_sinks must lie between 0 and 64; got 65"),
        ({"num_sinks": 2.5}, "num_sinks must be a whole number; got 2.5"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        KiviConfig(**settings)


def test_a_value_group_that_does_not_divide_the_head_is_refused():
    with pytest.raises(ValueError, match="must divide the head of 64 channels; got 128"):
        KiviCache(SMALL, KiviConfig(value_group_size=128))


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 256])
def test_every_head_size_finds_a_value_group(head_dim):
    shape = ModelShape(num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=head_dim)
    cache = KiviCache(shape, KiviConfig())
    fill(cache, 200)
    assert cache.footprint().parts == KiviConfig().estimate(shape, 200)
