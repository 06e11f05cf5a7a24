"""The embedded model's training tools: generator, tokenizer, rows, and a short run that stops and resumes."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvlens.engine.model import EMBEDDED
from tools.embedded_model import facts, recall
from tools.embedded_model.card import write_card
from tools.embedded_model.corpus import RowMaker, Texts, recast, story_topic
from tools.embedded_model.curve import CURVE_FIELDS, append_row, read_curve, whole_curve
from tools.embedded_model.evaluate import DEPTHS, RECALL_TABLES, recall_tables
from tools.embedded_model.tokenizer import as_chat_tokenizer, train_tokenizer
from tools.embedded_model.train import (
    STEEPEST_FALL,
    Clock,
    ModelShape,
    Recipe,
    Trainer,
    export,
    load_weights,
    main,
    run,
)
from tools.embedded_model.widening import widened

PROSE = "The old mill stood by the river. Nobody had lived there for years. One day a boy opened the door. " * 40
STORY = "Once there was a fox. The fox had a red hat. The fox lost the hat. A bird found the hat."


@pytest.fixture(scope="module")
def texts() -> Texts:
    """A tiny corpus of the right form."""
    turns = [
        ("user", "do you like films?"),
        ("assistant", "yes, very much."),
        ("user", "so do I."),
        ("assistant", "good!"),
    ]
    return Texts(books=[PROSE * 3], stories=[STORY], dialogues={"self_dialogue": [turns]})


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with a small vocabulary."""
    return train_tokenizer([PROSE, STORY], vocab_size=400)


SHAPE = ModelShape(vocab_size=400, hidden_size=64, num_layers=1, num_query_heads=2, num_key_value_heads=1, mlp_size=64)


def make_trainer(texts, tokenizer, *, shape: ModelShape = SHAPE) -> Trainer:
    recipe = Recipe(tokens_per_step=512, stages=(((64,), 4096), ((64, 128), float("inf"))), warmup_steps=5)
    rows, held_out_rows = (
        RowMaker(texts, tokenizer, seed=1),
        RowMaker(texts, tokenizer, seed=1, split="held_out"),
    )
    return Trainer(shape=shape, recipe=recipe, rows=rows, held_out_rows=held_out_rows, device="cpu", compiled=False)


def test_same_seed_gives_same_conversation():
    chats = [recall.passage_conversation(Random(5), PROSE[:800], num_facts=4).as_messages() for _ in range(2)]
    assert chats[0] == chats[1]
    assert chats[0] != recall.passage_conversation(Random(6), PROSE[:800], num_facts=4).as_messages()


def test_answer_weight_covers_only_the_value():
    fact = facts.Fact("my code is 42", "what is my code", "Your code is 42.", "42")
    assert recall.weighted_answer(fact) == [("Your code is ", 1.0), ("42", recall.ANSWER_WEIGHT), (".", 1.0)]


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_recall_questions_keep_length_and_depth(tokenizer, depth):
    def count_tokens(messages):
        return len(tokenizer.encode(messages[0]["content"]).ids)

    settings = {
        "prose": PROSE * 5,
        "num_tokens": 400,
        "depth": depth,
        "count": 4,
        "seed": 3,
        "count_tokens": count_tokens,
    }
    questions = list(recall.recall_questions(**settings))
    assert questions == list(recall.recall_questions(**settings))
    for question in questions:
        content = question.messages[0]["content"]
        assert 300 <= question.num_tokens <= 400
        assert abs(content.lower().find(question.value.lower()) / len(content) - depth) < 0.25


def test_the_model_card_has_a_table_for_everything_that_is_measured(tmp_path):
    rows = {"250": {"0.00": 0.5, "1.00": 1.0, "mean": 0.75}}
    loss = {"nats_per_token": 2.0, "perplexity": 7.4, "bits_per_character": 1.0, "num_tokens": 1000}
    outliers = {"layer": 0, "keys_max_over_median": [5.0], "values_max_over_median": [2.0]}
    figures = dict.fromkeys(RECALL_TABLES, rows) | {
        "made": "today", "device": "CPU", "versions": {"torch": "2", "transformers": "5"}, "num_parameters": 5_000_000,
        "load_seconds": 0.1, "num_recall_questions": 16, "decode_tokens_per_second": 400, "perplexity": {"books": loss},
        "channel_outliers": [outliers], "samples": [{"prompt": "Hello!", "reply": "Hi."}],
    }  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    (tmp_path / "curve.csv").write_text(",".join(CURVE_FIELDS) + "\n" + ",".join("1" for _ in CURVE_FIELDS) + "\n")
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "[[" not in card
    assert card.count("| 250 | 50% | 100% | 75% |") == len(RECALL_TABLES)
    assert "keys 5.0 at most, 5.0 in the mean; values 2.0 and 2.0" in card


def test_depth_outside_the_text_is_refused():
    with pytest.raises(ValueError, match="depth"):
        next(recall.recall_questions(prose=PROSE, num_tokens=100, depth=1.5, count=1, seed=0, count_tokens=len))


@pytest.mark.parametrize("text", ["Hello, wörld! 12345", "  two  blanks\n\nand lines", "日本語 and 🙂"])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.encode("90817").tokens == list("90817")


def test_chat_template(tokenizer):
    chat_tokenizer = as_chat_tokenizer(tokenizer, max_length=512)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    closed = "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello<|end|>"
    assert chat_tokenizer.apply_chat_template(messages, tokenize=False) == closed
    assert chat_tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True).endswith(
        "<|end|><|assistant|>"
    )


def test_rows_match_the_chat_template(texts, tokenizer):
    conversation = recall.chat_conversation(Random(1), [], num_facts=2)
    ids, weights = RowMaker(texts, tokenizer, seed=1).encode(conversation)
    chat_tokenizer = as_chat_tokenizer(tokenizer, max_length=512)
    rendered = chat_tokenizer.apply_chat_template(conversation.as_messages(), tokenize=False)
    assert ids.tolist() == chat_tokenizer(rendered, add_special_tokens=False).input_ids
    assert len(weights) == len(ids)
    assert weights.max() == recall.ANSWER_WEIGHT
    assert weights[0] == 0


def test_rows_depend_on_seed_and_step_alone(texts, tokenizer):
    first, again = (RowMaker(texts, tokenizer, seed=1).rows(step=3, num_rows=2, length=128) for _ in range(2))
    other = RowMaker(texts, tokenizer, seed=1).rows(step=4, num_rows=2, length=128)
    assert first[0].shape == (2, 129)
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


def test_short_run_learns_and_resumes_exactly(texts, tokenizer, tmp_path):
    trainer = make_trainer(texts, tokenizer)
    losses = [trainer.train_step() for _ in range(20)]
    assert sum(losses[-3:]) < sum(losses[:3])
    trainer.save(tmp_path / "checkpoint.pt")
    straight = [trainer.train_step() for _ in range(3)]
    resumed = make_trainer(texts, tokenizer)
    resumed.load(tmp_path / "checkpoint.pt")
    assert [resumed.train_step() for _ in range(3)] == straight


def test_export_loads_with_transformers(texts, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = make_trainer(texts, tokenizer)
    export(trainer.model, tokenizer, tmp_path)
    model, chat_tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert model.dtype == torch.float16
    assert model.config.head_dim == 64
    assert model.generation_config.eos_token_id == chat_tokenizer.eos_token_id == tokenizer.token_to_id("<|end|>")
    expected = trainer.model.get_input_embeddings().weight.half()
    torch.testing.assert_close(model.get_input_embeddings().weight, expected, rtol=0, atol=0)


def test_run_follows_the_clock_to_a_rate_of_zero(texts, tokenizer, tmp_path):
    trainer = make_trainer(texts, tokenizer)
    now = time.monotonic()
    assert Clock(now + 1000, 500).share() == 1
    assert 0.45 < Clock(now + 250, 500).share() <= 0.5
    run(
        trainer,
        tmp_path,
        max_tokens=float("inf"),
        anneal_steps=1,
        report_every=1000,
        clock=Clock(time.monotonic() + 0.3, 0.2),
    )
    assert trainer.progress.step > 0
    assert trainer.progress.is_done
    assert trainer.progress.learning_rate_share(5) == 0


def test_the_curve_has_no_row_without_a_loss(texts, tokenizer, tmp_path):
    trainer = make_trainer(texts, tokenizer)
    clock = Clock(time.monotonic() + 0.3, 0.2)
    run(trainer, tmp_path, max_tokens=float("inf"), anneal_steps=1, report_every=1, clock=clock)
    steps, losses = zip(*((row.split(",")[0], float(row.split(",")[4])) for row in
                          (tmp_path / "curve.csv").read_text().splitlines()[1:]), strict=True)  # fmt: skip
    assert len(set(steps)) == len(steps) == trainer.progress.step
    assert min(losses) > 0


def test_a_curve_goes_on_where_the_run_before_it_ended(tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    for path, losses in ((first, (3.0, 2.5)), (second, (2.4, 2.3))):
        for step, loss in enumerate(losses, 1):
            append_row(path, (40 * step, 1000 * step, 256, "1.000", loss, loss, 0.5, 700))
    assert whole_curve(first, None) == first.read_text()
    assert whole_curve(tmp_path / "no report yet", first) == first.read_text()
    first.write_text(whole_curve(second, first))
    assert [(row["step"], row["tokens"], row["train_loss"]) for row in read_curve(first)] == [
        ("40", "1000", "3.0"), ("80", "2000", "2.5"), ("120", "3000", "2.4"), ("160", "4000", "2.3"),
    ]  # fmt: skip


def test_a_run_that_would_start_from_its_own_result_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--data", "none", "--start", str(tmp_path), "--out", f"{tmp_path}/."])
    with pytest.raises(SystemExit):
        main()
    assert "--out must be another folder than --start" in capsys.readouterr().err


def test_the_clock_walks_down_though_the_time_is_over():
    clock = Clock(time.monotonic() - 1, 500)
    shares = [0.09]
    while shares[-1] > 0:
        shares.append(clock.share(shares[-1]))
    falls = [before - after for before, after in pairwise(shares)]
    assert max(falls) <= STEEPEST_FALL + 1e-9
    assert len(falls) == 5


def test_a_story_is_asked_for_by_what_it_is_about():
    topics = {story_topic(Random(seed), STORY) for seed in range(20)}
    assert topics == {"fox"}
    assert story_topic(Random(0), "It was late. She slept.") is None


def test_the_first_mentions_of_a_topic_weigh_more(texts, tokenizer):
    rows = RowMaker(texts, tokenizer, seed=1)
    told = [rows._story(Random(seed), 500) for seed in range(40)]
    replies = [made.messages[1][1] for made in told if not isinstance(made, str) and len(made.messages[1][1]) > 1]
    assert replies
    for pieces in replies:
        assert sum(weight == rows.TOPIC_WEIGHT for _, weight in pieces) == rows.NUM_TOPIC_MENTIONS


def test_noise_changes_words_of_a_story_and_asks_for_none_of_them(texts, tokenizer):
    rows = RowMaker(texts, tokenizer, seed=1)
    ids, weights = rows.encode(rows._story(Random(3), 500))
    noised, kept = zip(*(rows._noised(Random(seed), ids, weights) for seed in range(50)), strict=True)
    changed = np.stack(noised) != ids
    unasked = np.stack(kept) != weights
    assert (unasked | ~changed).all()  # a word may be replaced by itself
    assert (np.stack(kept)[unasked] == 0).all()
    tellable = weights == recall.PLAIN_WEIGHT
    assert not unasked[:, ~tellable].any()
    assert not unasked[:, -1].any()
    assert unasked[:, tellable].mean() == pytest.approx(rows.STORY_NOISE, abs=0.03)


def test_only_rows_to_train_on_have_noise(texts, tokenizer, monkeypatch):
    noised = []
    monkeypatch.setattr(RowMaker, "_noised", lambda self, random, ids, weights: noised.append(1) or (ids, weights))
    RowMaker(texts, tokenizer, seed=1, split="held_out").rows(step=0, num_rows=8, length=512)
    assert not noised
    RowMaker(texts, tokenizer, seed=1).rows(step=0, num_rows=8, length=512)
    assert noised


def test_a_recast_story_is_about_the_new_topic_alone():
    told = [recast(Random(seed), STORY.replace("fox", "owl").replace("a owl", "an owl"), "owl") for seed in range(40)]
    for topic, story in told:
        assert story.count(topic) == 3
        assert f"{'an' if topic[0] in 'aeiou' else 'a'} {topic}." in story
    assert len({topic for topic, _ in told}) > 10


def test_run_starts_from_the_weights_of_an_exported_model(texts, tokenizer, tmp_path):
    first, second = make_trainer(texts, tokenizer), make_trainer(texts, tokenizer)
    first.train_step()
    export(first.model, tokenizer, tmp_path)
    load_weights(second.model, tmp_path, seed=1)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value.half().float(), rtol=0, atol=0)


def test_a_model_with_wider_mlps_computes_what_the_narrow_one_did_and_learns_with_all_of_them(
    texts, tokenizer, tmp_path
):
    narrow = make_trainer(texts, tokenizer)
    narrow.train_step()
    export(narrow.model, tokenizer, tmp_path)
    wide = make_trainer(texts, tokenizer, shape=replace(SHAPE, mlp_size=2 * SHAPE.mlp_size))
    load_weights(wide.model, tmp_path, seed=1)
    ids = torch.arange(40)[None]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(wide.model(ids).logits, exported(ids).logits, rtol=1e-5, atol=1e-5)
    wide.train_step()
    written = wide.model.model.layers[0].mlp.down_proj.weight[:, SHAPE.mlp_size :]
    assert (written.abs().amax(dim=0) > 0).all()


def test_an_mlp_cannot_be_made_narrower():
    state = {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}
    with pytest.raises(ValueError, match="has 8 neurons, got mlp_size 6"):
        widened(state, mlp_size=6, seed=1)


def test_processes_that_share_the_recall_questions_give_the_same_tables():
    alone, shared = (recall_tables(EMBEDDED, PROSE, lengths=(150,), count=1, processes=number) for number in (1, 2))
    assert alone == shared
    assert [*alone] == [*RECALL_TABLES]
    means = [table["150"]["mean"] for table in alone.values()]
    assert all([*table["150"]] == [*(f"{depth:.2f}" for depth in DEPTHS), "mean"] for table in alone.values())
    assert 0.5 < sum(means) / len(means) <= 1
