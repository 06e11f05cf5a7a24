"""The ablation counts bits as the cache stores them, and codes as the cache does."""

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import csr_report
from benchmarks.csr_coding import Coder, Variant, squared_error
from benchmarks.csr_variants import variants
from kvlens.engine.dictionaries import DictionaryKind, DictionarySet
from kvlens.engine.rotary import Rotary
from kvlens.kernels.pursuit import SparseCodes, pack_atoms, pursue, restore, unpack_atoms
from tests import tiny

KIND = DictionaryKind("pre_rope", 64, 1, is_centred=True)


def dictionaries(kind: DictionaryKind = KIND, head_dim: int = 32) -> DictionarySet:
    keys = [normalize(torch.randn(kind.num_atoms, head_dim), dim=1)]
    values = [normalize(torch.randn(kind.num_atoms, head_dim // kind.value_parts), dim=1)]
    means = [torch.randn(2, head_dim)] if kind.is_centred else None
    return DictionarySet(kind, keys, values, {}, means, means)


def test_every_bit_is_counted():
    paper = Variant("modes", "paper", DictionaryKind("pre_rope", 64, 2), key_atoms=4, value_atoms=4)
    assert paper.bits_per_value(1000, 2, 64) == {"keys": 2.0, "values": 2.0}
    ours = Variant("modes", "ours", KIND, key_atoms=7, value_atoms=7, coefficient_bits=6)
    assert ours.bits_per_value(1000, 2, 64)["keys"] == (7 * 12 + 16) / 64
    window = Variant("window", "window", KIND, sinks=4, window=96, key_atoms=4, value_atoms=4)
    assert window.bits_per_value(1000, 2, 64)["keys"] == pytest.approx(0.1 * 16 + 0.9 * 2)
    online = Variant("online", "online", KIND, num_sampled=50, num_guarded=50)
    assert online.bits_per_value(1000, 2, 64)["values"] == pytest.approx(2 + 16 * 100 / 2000)
    assert Variant("modes", "KIVI", kivi_bits=2, kivi_group=32).bits_per_value(1000, 2, 64)["keys"] == 3.0


def test_the_budgets_hold_for_every_mode():
    # Half of an odd number of atoms is rounded up, as in the cache: 6 value atoms of 32 bits where 3 x 2 would do.
    for variant in variants():
        if variant.group == "modes" and variant.kind is not None:
            named = float(variant.name.split(" bit")[0].split()[-1])
            bits = variant.bits_per_value(2000, 2, 64)
            assert bits["keys"] <= named
            assert bits["values"] <= named + (0.5 if "paper 1.5" in variant.name else 0)


def test_coefficients_are_those_that_packed_atoms_keep():
    variant = Variant("modes", "ours", DictionaryKind("post_rope", 64), key_atoms=5, pursuit="MP + fit",
                      coefficient_bits=6)  # fmt: skip
    made, exact = dictionaries(variant.kind), torch.randn(2, 9, 32)
    coder = Coder(variant, made, Rotary.of(tiny.network()))
    codes = pursue(exact, made.keys[0], sparsity=5, refit=True)
    expected = restore(unpack_atoms(pack_atoms(codes)), made.keys[0])
    torch.testing.assert_close(coder.restored("keys", 0, exact), expected)
    assert isinstance(codes, SparseCodes)


@pytest.mark.parametrize("space", ["pre_rope", "post_rope"])
@pytest.mark.parametrize("parts", [1, 2])
def test_with_atoms_enough_everything_comes_back(space, parts):
    kind = DictionaryKind(space, 64, parts, is_centred=True)
    made = dictionaries(kind)
    made.keys[0][:32], made.values[0][: 32 // parts] = torch.eye(32), torch.eye(32 // parts)
    variant = Variant("modes", "all", kind, key_atoms=32, value_atoms=32, pursuit="OMP", sinks=2, window=3)
    coder, exact = Coder(variant, made, Rotary.of(tiny.network())), torch.randn(2, 20, 32)
    for side in ("keys", "values"):
        restored = coder.restored(side, 0, exact)
        assert torch.equal(restored[:, :2], exact[:, :2])
        assert torch.equal(restored[:, -3:], exact[:, -3:])
        assert squared_error(exact, restored).max() < 1e-4


def test_errors_are_shares_of_each_vector():
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(squared_error(exact, torch.zeros(2, 2)), torch.ones(2))
    torch.testing.assert_close(squared_error(exact, exact + torch.tensor([0.0, 1.0])), torch.tensor([0.04, 0.25]))


def test_the_picture_shows_every_mode():
    rows = [
        {"group": "modes", "variant": name, "bits_per_value": bits, "attention_error": error}
        for name, bits, error in (
            ("paper 1 bit, N 4096", "1", "0.3"), ("paper 2 bit, N 4096", "2", "0.1"),
            ("pre-rope centred 2 bit, N 1024", "2", "0.05"), ("post-rope centred 2 bit, N 1024", "2", "0.08"),
            ("pre-rope centred 2 bit, N 4096", "2", "0.03"), ("KIVI 2 bit, group 32", "3", "0.1"),
        )
    ]  # fmt: skip
    picture = csr_report.draw(rows)
    assert picture.count("<polyline") == 5
    assert picture.count("<circle") == 6


def test_page_and_picture_are_those_of_the_saved_results():
    rows = csr_report.saved()
    page = (csr_report.DOCS / "csr.md").read_text("utf-8")
    assert csr_report.render(page, rows) == page, "run `python -m benchmarks.csr_report`"
    assert (csr_report.DOCS / "csr.svg").read_text("utf-8") == csr_report.draw(rows)
