"""The embedded model's training tools: generator, tokenizer, rows, and a short run that stops and resumes."""

import re
import time
from random import Random

import numpy as np
import pytest
import torch

from tools.embedded_model import facts, phrasing, recall, relations, wordings, words
from tools.embedded_model.corpus import RowMaker, Texts
from tools.embedded_model.tokenizer import as_chat_tokenizer, train_tokenizer
from tools.embedded_model.train import Clock, ModelShape, Recipe, Trainer, export, load_weights, run

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


def make_trainer(texts, tokenizer) -> Trainer:
    shape = ModelShape(
        vocab_size=400, hidden_size=64, num_layers=1, num_query_heads=2, num_key_value_heads=1, mlp_size=64
    )
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


@pytest.mark.parametrize(
    "parts",
    [
        wordings.SUBJECT_STATEMENTS,
        wordings.SUBJECT_QUESTIONS,
        wordings.OWNED,
        words.THINGS,
        words.PERSONS,
        words.VALUES["word"],
    ]
    + [facts.harvested("nouns"), facts.harvested("names")]
    + [family.statements for family in wordings.FAMILIES]
    + [family.questions for family in wordings.FAMILIES],
)
def test_held_out_wordings_are_disjoint(parts):
    train, held_out = (facts.split_parts(parts, split) for split in facts.SPLITS)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(parts)
    assert train
    assert held_out


def test_no_wording_put_together_is_held_out():
    random = Random(0)
    statements = {phrasing.spoken_statement(random, "{s}", "{v}") for _ in range(20_000)}
    questions = {phrasing.spoken_question(random, "{s}") for _ in range(20_000)}
    assert not statements & set(facts.split_parts(wordings.SUBJECT_STATEMENTS, "held_out"))
    assert not questions & set(facts.split_parts(wordings.SUBJECT_QUESTIONS, "held_out"))
    assert min(len(statements), len(questions)) > 3000


def held_out_sentences() -> dict[str, re.Pattern]:
    """Held-out statements and questions, each with a pattern that takes anything for names and values."""
    parts = [facts.split_parts(p, "held_out") for p in (wordings.SUBJECT_STATEMENTS, wordings.SUBJECT_QUESTIONS)]
    for family in wordings.FAMILIES:
        parts += [facts.split_parts(p, "held_out") for p in (family.statements, family.questions)]
    for family in wordings.HELD_OUT_FAMILIES:
        parts += [family.statements, family.questions]
    sentences = {sentence for part in parts for sentence in part}
    return {s: re.compile(re.sub(r"\\{.\\}", ".+", re.escape(s))) for s in sentences}


def test_no_relation_drawn_at_random_is_told_or_asked_in_a_held_out_wording():
    patterns, random = held_out_sentences(), Random(0)
    drawn = [relations.relation(random, facts.draws(random, "train")) for _ in range(6000)]
    sentences = {text for d in drawn for text in (d.statement, d.question, d.other_question)}
    assert len(sentences) > 15_000
    assert not [(s, text) for s, pattern in patterns.items() for text in sentences if pattern.fullmatch(text)]


def test_no_attribute_or_verb_of_a_held_out_relation_is_drawn():
    held_out = [facts.split_parts(parts, "held_out") for parts in (wordings.OWNED, wordings.THING_ATTRIBUTES)]
    trained = [facts.split_parts(parts, "train") for parts in (wordings.OWNED, wordings.THING_ATTRIBUTES)]
    words_of = [
        {word for part in parts for text, _ in part for word in text.replace("'s", "").split()}
        for parts in (held_out, trained)
    ]
    # Training families ask "at what time": the word alone gives no held-out relation away.
    only_held_out = words_of[0] - words_of[1] - {"time"}
    assert {"combination", "appointment"} <= only_held_out <= relations.NEVER_TRAINED
    random = Random(0)
    draw = facts.draws(random, "train")
    drawn = {word for _ in range(20_000) for word in relations.attribute(random, draw).replace("'s", "").split()} | {
        form for deed in relations.DEEDS for form in deed
    }
    assert len(drawn) > 500
    assert not drawn & relations.NEVER_TRAINED


def test_relations_drawn_at_random_can_be_answered_from_what_is_told():
    random = Random(1)
    draw = facts.draws(random, "train")
    for _ in range(2000):
        sentences = relations.relation(random, draw)
        assert sentences.value in sentences.statement
        assert sentences.value in sentences.answer
        for question in (sentences.question, sentences.other_question):
            asked_of = set.intersection(*(set(re.findall(r"[\w-]+", s)) for s in (question, sentences.statement)))
            assert asked_of - relations.DROPPED, (question, sentences.statement)


def test_kindred_facts_share_owners_and_attributes_but_never_both():
    random = Random(2)
    kindred = relations.kindred(random, facts.draws(random, "train"), 6)
    subjects = [sentences.answer.removesuffix(f" is {sentences.value}.") for sentences in kindred]
    assert len(set(subjects)) == 6
    assert len({subject.split("'s ")[0] for subject in subjects}) < 6


def test_a_noisy_question_keeps_the_words_that_say_what_is_meant():
    for seed in range(200):
        noisy = relations.noisy(Random(seed), "what is the code of the silver gate").split()
        assert {"code", "silver", "gate"} <= set(noisy)


def test_facts_asked_for_twice_are_asked_in_other_words_the_second_time():
    told = [
        facts.Fact(f"my code {i} is {i}", f"what is code {i}", f"it is {i}.", str(i), f"code {i}") for i in range(40)
    ]
    asked = recall.with_second_questions(Random(0), told)
    assert len(asked) > len(told)
    assert len({fact.question for fact in asked}) == len(asked)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held_out"):
        facts.split_parts((1, 2), "test")


@pytest.mark.parametrize("split", facts.SPLITS)
def test_every_value_is_told_before_it_is_asked(split):
    for seed in range(60):
        messages = recall.passage_conversation(Random(seed), PROSE[:600], num_facts=5, split=split).as_messages()
        passage = " ".join(m["content"] for m in messages if m["role"] == "user")
        for fact in facts.distinct_facts(Random(seed), split, 5):
            assert fact.value.lower() in fact.statement.lower()
            assert fact.value.lower() in fact.answer.lower()
        for message in messages:
            if message["role"] == "assistant" and message["content"] not in wordings.READING_REPLIES:
                assert any(word.strip(".").lower() in passage.lower() for word in message["content"].split())


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


def test_run_starts_from_the_weights_of_an_exported_model(texts, tokenizer, tmp_path):
    first, second = make_trainer(texts, tokenizer), make_trainer(texts, tokenizer)
    first.train_step()
    export(first.model, tokenizer, tmp_path)
    load_weights(second.model, tmp_path)
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], value.half().float(), rtol=0, atol=0)
