"""Dictionaries come back as they were saved, and only for the model they were learned from."""

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from kvlens.engine.dictionaries import (
    DictionaryKind,
    DictionarySet,
    DictionaryStore,
    MissingDictionary,
    fingerprint,
    matches,
)
from kvlens.engine.dictionaries.store import read, stored_sets
from kvlens.engine.errors import EngineError
from tests import tiny

KIND = DictionaryKind("post_rope", 16, 2)


def make_set(kind: DictionaryKind = KIND, *, num_layers: int = 3, head_dim: int = 8) -> DictionarySet:
    """Random atoms; the keys of layers 0 and 1 are shared."""
    keys = [normalize(torch.randn(kind.num_atoms, head_dim), dim=1) for _ in range(num_layers)]
    values = [normalize(torch.randn(kind.num_atoms, head_dim // kind.value_parts), dim=1) for _ in range(num_layers)]
    means = [torch.randn(2, head_dim) for _ in range(num_layers)] if kind.is_centred else None
    return DictionarySet(kind, [keys[0], keys[0], *keys[2:]], values, {"model": "one", "seconds": 1.5}, means, means)


@pytest.fixture
def mark() -> torch.Tensor:
    return torch.randn(3, 8)


def test_a_set_comes_back_with_shared_layers_and_unit_atoms(tmp_path, mark):
    saved = make_set()
    DictionaryStore([tmp_path], mark, model_name="some/model").save(saved)
    found = DictionaryStore([tmp_path], mark).find(KIND)
    for one, other in zip((*saved.keys, *saved.values), (*found.keys, *found.values), strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
        torch.testing.assert_close(other.norm(dim=1), torch.ones(16), atol=1e-6, rtol=0)
    assert found.keys[0] is found.keys[1]
    assert found.keys[0] is not found.keys[2]
    assert found.card == saved.card
    assert found.num_bytes == 4 * 16 * (2 * 8 + 3 * 4)


def test_means_of_a_centred_set_come_back_exactly(tmp_path, mark):
    kind = DictionaryKind("pre_rope", 16, 1, is_centred=True)
    saved = make_set(kind)
    DictionaryStore([tmp_path], mark).save(saved)
    found = DictionaryStore([tmp_path], mark).find(kind)
    for one, other in zip((*saved.key_means, *saved.value_means), (*found.key_means, *found.value_means), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="means"):
        DictionarySet(kind, saved.keys, saved.values)
    with pytest.raises(ValueError, match="means"):
        DictionarySet(KIND, saved.keys, [atoms[:, :4] for atoms in saved.values], {}, saved.key_means, None)


def test_a_set_is_read_once_and_again_after_saving(tmp_path, mark):
    store = DictionaryStore([tmp_path], mark)
    store.save(make_set())
    first = store.find(KIND)
    assert store.find(KIND) is first
    store.save(make_set())
    assert store.find(KIND) is not first
    assert store.available() == [KIND]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_set_saved_under_another_name_replaces_the_older(tmp_path, mark):
    DictionaryStore([tmp_path], mark, model_name="folder").save(make_set())
    DictionaryStore([tmp_path], mark + 9, model_name="stranger").save(make_set())
    path = DictionaryStore([tmp_path], mark, model_name="some/model").save(make_set())
    assert {found.path.name for found in stored_sets([tmp_path])} == {
        path.name, f"stranger--{KIND.name}.safetensors"
    }  # fmt: skip


def test_what_is_missing_is_said_with_the_command(tmp_path, mark):
    store = DictionaryStore([tmp_path / "absent"], mark, model_name="some/model")
    for ask in (store.find, store.check):
        with pytest.raises(MissingDictionary, match=r"train --model some/model --kind post-rope-16-v2") as missing:
            ask(KIND)
        assert missing.value.kind == KIND
    assert store.available() == []


def test_looking_whether_there_is_a_set_reads_no_atoms(tmp_path, mark):
    store = DictionaryStore([tmp_path], mark)
    store.save(make_set())
    store.check(KIND)
    assert store._loaded == {}


def test_a_set_of_another_model_is_not_used_and_said(tmp_path, mark):
    DictionaryStore([tmp_path], mark, model_name="one").save(make_set())
    store = DictionaryStore([tmp_path], mark.flip(0), model_name="other")
    with pytest.raises(MissingDictionary, match="of another model: one"):
        store.find(KIND)
    assert store.available() == []


def test_the_first_folder_wins_and_is_written_to(tmp_path, mark):
    shipped, learned = tmp_path / "shipped", tmp_path / "learned"
    DictionaryStore([shipped], mark).save(make_set())
    store = DictionaryStore([learned, shipped], mark)
    shipped_set = store.find(KIND)
    own = make_set()
    assert store.save(own).parent == learned
    torch.testing.assert_close(store.find(KIND).keys[0], own.keys[0], atol=1e-3, rtol=0)
    assert not torch.allclose(shipped_set.keys[0], own.keys[0], atol=1e-2)


def test_a_damaged_file_is_named_and_passed_over(tmp_path, mark):
    path = DictionaryStore([tmp_path], mark).save(make_set())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EngineError, match="delete it"):
        read(path)
    assert stored_sets([tmp_path]) == []


def test_an_interrupted_save_leaves_the_old_set(tmp_path, mark, monkeypatch):
    store = DictionaryStore([tmp_path], mark)
    path = store.save(make_set())
    before = path.read_bytes()

    def broken(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no room"):
        store.save(make_set())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_kinds_have_names_and_rules():
    assert DictionaryKind.parse(KIND.name) == KIND
    assert DictionaryKind("pre_rope", 1024, 2).name == "pre-rope-1024-v2"
    centred = DictionaryKind("pre_rope", 1024, 1, is_centred=True)
    assert centred.name == "pre-rope-1024-v1-centred"
    assert DictionaryKind.parse(centred.name) == centred
    for wrong in ("post-rope-16", "mid-rope-16-v1", "post-rope-x-v1"):
        with pytest.raises(EngineError, match="pre-rope-1024-v1"):
            DictionaryKind.parse(wrong)
    with pytest.raises(ValueError, match="32769"):
        DictionaryKind("post_rope", 32_769)
    with pytest.raises(ValueError, match="value_parts"):
        DictionaryKind("post_rope", 16, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_fingerprint_survives_rounding_but_not_another_model(family, dtype):
    network = tiny.network(family)
    mark = fingerprint(network)
    assert mark.shape == (2, 8)
    torch.manual_seed(8)
    stranger = type(network)(network.config)
    assert not matches(mark, fingerprint(stranger))
    assert matches(mark, fingerprint(network.to(dtype)))


def test_a_change_of_one_layer_changes_the_fingerprint():
    network = tiny.network()
    mark = fingerprint(network)
    network.model.layers[1].self_attn.k_proj.weight.data.mul_(1.1)
    assert not matches(mark, fingerprint(network))


@pytest.mark.parametrize(
    ("config", "model"), [("Phi3Config", "Phi3ForCausalLM"), ("GPTNeoXConfig", "GPTNeoXForCausalLM")]
)
def test_fused_projections_have_a_fingerprint(config, model):
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    networks = [getattr(transformers, model)(getattr(transformers, config)(**sizes)) for _ in range(2)]
    marks = [fingerprint(network) for network in networks]
    assert marks[0].shape == (2, 8)
    assert matches(marks[0], fingerprint(networks[0].bfloat16()))
    assert not matches(*marks)


def test_a_network_without_attention_has_no_fingerprint():
    with pytest.raises(EngineError, match="no attention"):
        fingerprint(torch.nn.Linear(2, 2))
