"""Loading: every family through the same door, and a sentence for whatever cannot be served."""

import errno
import gc
from unittest.mock import MagicMock
from weakref import ref

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from kvlens.engine.errors import ModelError
from kvlens.engine.model import load_model
from kvlens.engine.registry import method
from kvlens.engine.warm_up import warm_up
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_families_load_and_pass_their_self_test(family, tmp_path):
    said = []
    model = load_model(tiny.save(tmp_path, family), device="cpu", progress=said.append)
    assert model.shape.head_dim == 32
    assert model.max_context == 1024
    assert model.cache_dtype == torch.float16
    assert model.end_tokens == {0}
    assert len(said) == 4


def test_a_sliding_window_bounds_the_context_instead_of_being_lost(tmp_path):
    model = load_model(tiny.save(tmp_path, "mistral", sliding_window=200), device="cpu")
    assert model.max_context == 200
    assert load_model(str(tmp_path), device="cpu", max_context=100).max_context == 100


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no/such-model-anywhere", {}, "cannot be loaded|no model called"),
        ("not a name at all!", {}, "no model called|cannot be loaded"),
        (None, {"device": "tpu9"}, "device must be auto, cpu, cuda"),
        (None, {"device": "cuda"}, "torch finds no NVIDIA GPU"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(name, options, message, tiny_folder):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelError, match=message):
        load_model(name or tiny_folder, **options)


def test_bad_options_are_refused(tiny_folder):
    with pytest.raises(ModelError, match="dtype must be auto or one of"):
        load_model(tiny_folder, device="cpu", dtype="int3")
    with pytest.raises(ModelError, match="max_context must be at least 16"):
        load_model(tiny_folder, device="cpu", max_context=3)


def test_pickled_weights_are_refused(tmp_path):
    folder = tiny.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch.save({"weights": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("layer_types", "reason"), [(None, "mixes layers of sliding"), (["full_attention"] * 2, "cannot be served")]
)
def test_a_model_whose_attention_we_do_not_serve_is_refused(tmp_path, layer_types, reason):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, sliding_window=64,
        layer_types=layer_types,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        load_model(str(tmp_path), device="cpu")


def test_a_model_that_was_left_for_another_goes(tmp_path):
    model = load_model(tiny.save(tmp_path), device="cpu")
    warm_up(model, "kivi", method("kivi").config())
    network = ref(model.network)
    del model
    gc.collect()
    assert network() is None


def test_chat_without_a_template_is_plain_text(tiny_model, monkeypatch):
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    assert tiny_model.render_chat(messages).endswith("<user>two<end><assistant>")
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", None)
    assert tiny_model.render_chat(messages) == "one\n\ntwo"
    answered = [messages[0], {"role": "assistant", "content": "goes on"}, messages[1]]
    assert tiny_model.render_chat(answered) == "one goes on\n\ntwo"


def test_a_template_that_refuses_is_a_sentence(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ModelError, match="roles must alternate"):
        tiny_model.render_chat([{"role": "user", "content": "x"}])


def _raise(error: Exception):
    def load(*_, **__):
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full: .* cannot be stored"),
        (
            OSError("it has no file named config.json\nmore lines"),
            "cannot be loaded: it has no file named config.json$",
        ),
        (GatedRepoError("restricted", response=MagicMock()), "is gated: accept its terms"),
        (RepositoryNotFoundError("404", response=MagicMock()), "no model called"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit the memory of this device"),
    ],
)
def test_faults_of_a_download_are_sentences(error, message, tiny_folder, monkeypatch):
    monkeypatch.setattr("kvlens.engine.model.AutoModelForCausalLM.from_pretrained", _raise(error))
    with pytest.raises(ModelError, match=message):
        load_model(tiny_folder, device="cpu")
