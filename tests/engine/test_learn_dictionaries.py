"""From text to dictionaries: what is read, what is learned, stopping and going on, and the command line."""

import gc
import gzip
import json

import pytest
import torch

from kvlens.engine.dictionaries import DictionaryKind, DictionaryStore, fingerprint
from kvlens.engine.dictionaries.__main__ import DEFAULT_KINDS, main
from kvlens.engine.dictionaries.calibration import Collected, collect, digest, read_documents, rows_of
from kvlens.engine.dictionaries.learn import LearnOptions, learn
from kvlens.engine.dictionaries.merging import MergeLimits
from kvlens.engine.errors import EngineError
from kvlens.engine.registry import method

KINDS = [DictionaryKind("pre_rope", 32, 2), DictionaryKind("post_rope", 32, 1, is_centred=True)]
OPTIONS = LearnOptions(num_tokens=600, row_tokens=100, epochs=1)
DOCUMENTS = [
    "The boat lay under the bridge all night. " * 20,
    [{"role": "user", "content": "Where is the boat?"}, {"role": "assistant", "content": "Under the bridge."}],
]


def collected(model, rows) -> Collected:
    *_, end = collect(model, rows)
    return end


def test_documents_are_prose_and_conversations(tmp_path):
    prose, chats = tmp_path / "prose.txt", tmp_path / "chats.jsonl.gz"
    prose.write_text("  Once upon a time.\n\nThe end.\n", encoding="utf-8")
    with gzip.open(chats, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"text": "Alone."}) + "\n\n" + json.dumps({"turns": ["Hello?", "Yes."]}) + "\n")
    documents = read_documents([prose, chats])
    assert documents == [
        "Once upon a time.\n\nThe end.", "Alone.",
        [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}],
    ]  # fmt: skip
    assert digest(documents) == digest(list(documents)) != digest(documents[:2])


def test_files_that_are_no_text_are_named(tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"words": "none"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    with pytest.raises(EngineError, match=r"wrong\.jsonl"):
        read_documents([wrong])
    with pytest.raises(EngineError, match=r"absent\.txt"):
        read_documents([tmp_path / "absent.txt"])
    with pytest.raises(EngineError, match="empty"):
        read_documents([empty])


def test_rows_are_bounded_and_keep_the_last_answer(tiny_model):
    rows = rows_of(tiny_model, DOCUMENTS, num_tokens=150, row_tokens=100)
    assert sum(map(len, rows)) <= 150
    assert max(map(len, rows)) <= 100
    assert rows == rows_of(tiny_model, DOCUMENTS, num_tokens=150, row_tokens=100)
    (talk,) = rows_of(tiny_model, DOCUMENTS[1:], num_tokens=1000, row_tokens=1000)
    assert tiny_model.decode(talk).endswith("Under the bridge.")


def test_what_is_collected_is_what_attention_sees(tiny_model):
    rows = [tiny_model.encode("The boat"), tiny_model.encode("lay under the bridge.")]
    seen = collected(tiny_model, rows)
    assert seen.positions.tolist() == [*range(len(rows[0])), *range(len(rows[1]))]
    with torch.inference_mode():
        cache = tiny_model.network(torch.tensor([rows[1]]), use_cache=True).past_key_values
    for layer in range(2):
        torch.testing.assert_close(seen.keys[layer][:, len(rows[0]) :], cache.layers[layer].keys[0].half())
        torch.testing.assert_close(seen.values[layer][:, len(rows[0]) :], cache.layers[layer].values[0].half())
    before = seen.exact("keys", 1, "pre_rope").float()
    torch.testing.assert_close(seen.mean("keys", 1), before.mean(dim=1))
    for space in ("pre_rope", "post_rope"):
        rest = seen.centred("keys", 1, space, seen.mean("keys", 1)).float()
        back = rest if space == "pre_rope" else seen.rotary.unrotate(rest, seen.positions)
        torch.testing.assert_close(back, before - before.mean(dim=1, keepdim=True), atol=2e-2, rtol=1e-2)


def test_every_kind_is_learned_and_fits_better_than_chance(tiny_model):
    steps = list(learn(tiny_model, DOCUMENTS, KINDS, OPTIONS))
    shares = [step.share for step in steps]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    made = {step.kind: step.dictionaries for step in steps if step.dictionaries is not None}
    assert list(made) == KINDS
    halves, centred = (made[kind] for kind in KINDS)
    assert [atoms.shape for atoms in (*halves.keys, *halves.values)] == [(32, 32)] * 2 + [(32, 16)] * 2
    assert halves.key_means is None
    assert [mean.shape for mean in centred.key_means] == [(2, 32)] * 2
    for dictionaries in made.values():
        for side in ("keys", "values"):
            assert all(0 < error < 0.9 for error in dictionaries.card["error"][side])
        for atoms in (*dictionaries.keys, *dictionaries.values):
            torch.testing.assert_close(atoms.norm(dim=1), torch.ones(32))
    num_tokens = sum(map(len, rows_of(tiny_model, DOCUMENTS, num_tokens=600, row_tokens=100)))
    assert halves.card["learned_from"] == {"sha256": digest(DOCUMENTS), "tokens": num_tokens}


def test_merged_layers_share_one_dictionary(tiny_model):
    *_, last = learn(tiny_model, DOCUMENTS, KINDS[:1], LearnOptions(num_tokens=600, epochs=1, merge=MergeLimits(1, 1)))
    assert last.dictionaries.keys[0] is last.dictionaries.keys[1]
    assert last.dictionaries.card["groups"] == {"keys": [[0, 1]], "values": [[0, 1]]}


def test_a_stopped_run_goes_on_and_ends_the_same(tiny_model, tmp_path):
    *_, whole = learn(tiny_model, DOCUMENTS, KINDS, OPTIONS)
    run = learn(tiny_model, DOCUMENTS, KINDS, OPTIONS, unfinished=tmp_path)
    for step in run:
        if step.side == "values":
            break
    run.close()
    kept = sorted(path.name for path in tmp_path.rglob("*.safetensors"))
    assert kept == ["pre-rope-32-v2-keys-0.safetensors", "pre-rope-32-v2-keys-1.safetensors"]
    resumed = list(learn(tiny_model, DOCUMENTS, KINDS, OPTIONS, unfinished=tmp_path))
    relearned = {(step.kind, step.side, step.layer) for step in resumed if step.stage == "learning"}
    assert len([step for step in resumed if step.kind == KINDS[0] and step.side == "keys"]) == 2
    assert (KINDS[1], "values", 1) in relearned
    for one, other in zip(whole.dictionaries.keys, resumed[-1].dictionaries.keys, strict=True):
        torch.testing.assert_close(one, other)
    assert list(tmp_path.rglob("*")) == []


def test_a_stopped_run_leaves_nothing_in_memory(tiny_model):
    run = learn(tiny_model, DOCUMENTS, KINDS, OPTIONS)
    next(step for step in run if step.stage == "learning")
    assert any(type(thing) is Collected for thing in gc.get_objects())
    run.close()
    gc.collect()
    assert not any(type(thing) is Collected for thing in gc.get_objects())


def test_many_heads_read_less_text(tiny_model, monkeypatch):
    monkeypatch.setattr("kvlens.engine.dictionaries.learn.MOST_VECTORS", 2 * 500)
    *_, last = learn(tiny_model, DOCUMENTS, KINDS[:1], OPTIONS)
    assert last.dictionaries.card["learned_from"]["tokens"] <= 500


def test_other_text_does_not_go_on_from_this(tiny_model, tmp_path):
    run = learn(tiny_model, DOCUMENTS, KINDS, OPTIONS, unfinished=tmp_path)
    next(step for step in run if step.side == "values")
    run.close()
    steps = list(learn(tiny_model, DOCUMENTS[:1], KINDS[:1], OPTIONS, unfinished=tmp_path))
    assert len([step for step in steps if step.side == "keys"]) > 2


def test_too_little_text_is_said(tiny_model):
    with pytest.raises(EngineError, match="Give more text"):
        next(learn(tiny_model, ["Short."], KINDS))


def test_the_command_learns_lists_and_checks(tiny_folder, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVLENS_DICTIONARIES", str(tmp_path / "learned"))
    text = tmp_path / "text.txt"
    text.write_text(DOCUMENTS[0])
    options = ["--model", tiny_folder, "--device", "cpu"]
    assert main(["check", *options]) == 1
    assert "no dictionaries yet" in capsys.readouterr().err
    train = ["train", *options, "--text", str(text), "--tokens", "600", "--epochs", "1", "--kind", KINDS[0].name]
    assert main(train) == 0
    assert "saved" in capsys.readouterr().out
    found = DictionaryStore([tmp_path / "learned"], fingerprint(tiny_model.network)).find(KINDS[0])
    assert found.num_layers == 2
    assert main(["check", *options]) == 0
    assert f"{KINDS[0].name}" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert KINDS[0].name in capsys.readouterr().out
    assert main([*train, "--kind", "none"]) == 1
    assert "pre-rope-1024-v2" in capsys.readouterr().err


def test_one_command_learns_what_every_preset_asks_for():
    wanted = {config.kind.name for config in method("csr").presets.values()}
    assert wanted <= {*DEFAULT_KINDS}
