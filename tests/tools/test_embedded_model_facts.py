"""The embedded model's facts: training never sees a held-out wording, and every question can be answered."""

import re
from collections.abc import Iterable
from random import Random

import pytest

from tools.embedded_model import clauses, deeds, echoes, facts, phrasing, recall, relations, words
from tools.embedded_model import wordings as w
from tools.embedded_model.wordings import wordings

PROSE = "The old mill stood by the river. Nobody had lived there for years. One day a boy opened the door. " * 40


@pytest.mark.parametrize("parts", [words.THINGS, words.PERSONS, *map(facts.harvested, ("nouns", "names"))])
def test_held_out_words_are_disjoint(parts):
    train, held_out, second = (facts.split_parts(parts, split) for split in facts.SPLITS)
    assert second == held_out
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(parts)
    assert train
    assert held_out


def plain(sentence: str) -> str:
    """Lower case without punctuation."""
    return " ".join(re.sub(r"[^a-z0-9{} ]", "", sentence.lower()).split())


def held_out_sentences() -> dict[str, str]:
    """What training must not see, told and asked: each with a pattern that takes anything on a line for its braces."""
    sentences: set[str] = set()
    for parts in map(wordings, ("held_out", "second")):
        sentences |= {*parts.subject_statements, *parts.subject_questions}
        for family in (*parts.families, *parts.new_families):
            sentences |= {*family.statements, *family.questions}
    return {s: re.sub(r"{.}", r"[^\\n]+", plain(s)) for s in sentences}


def leaks(sentences: Iterable[str]) -> list[tuple[str, str]]:
    """Which held-out sentences are among `sentences`, with other words filled in."""
    text = "\n".join(map(plain, sentences))
    found = ((s, re.search(f"(?m)^{pattern}$", text)) for s, pattern in held_out_sentences().items())
    return [(s, match[0]) for s, match in found if match]


def test_no_training_sentence_is_a_held_out_one_with_other_words_filled_in():
    parts = wordings("train")
    sentences = [*parts.subject_statements, *parts.subject_questions]
    sentences += [s for family in parts.families for s in (*family.statements, *family.questions)]
    assert len(sentences) > 11_000
    assert len(held_out_sentences()) > 400
    assert leaks(["Nobody knows.", "May I ask what my locker code is?"])
    assert not leaks(sentences)


@pytest.mark.parametrize("name", ["openers", "closers", "question_openers", "question_closers", "owned", "of_things"])
def test_no_training_part_is_held_out(name):
    train, held_out, _ = ({plain(str(part)) for part in getattr(wordings(split), name)} for split in facts.SPLITS)
    assert train
    assert held_out
    assert not train & held_out


def test_families_tell_their_value_and_ask_for_what_they_told():
    for split in facts.SPLITS:
        for family in (*wordings(split).families, *wordings(split).new_families):
            assert all("{v}" in sentence for sentence in (*family.statements, *family.answers)), family
            assert not any("{v}" in question for question in family.questions), family
            assert all((family.statements, family.questions, family.answers))
            told = {mark for sentence in family.statements for mark in re.findall(r"\{.\}", sentence)}
            assert all(told >= set(re.findall(r"\{.\}", question)) for question in family.questions), family


def test_no_wording_put_together_is_held_out():
    random = Random(0)
    statements = {phrasing.spoken_statement(random, "{s}", "{v}") for _ in range(20_000)}
    questions = {phrasing.spoken_question(random, "{s}") for _ in range(20_000)}
    for split in ("held_out", "second"):
        assert not statements & set(wordings(split).subject_statements)
        assert not questions & set(wordings(split).subject_questions)
    assert min(len(statements), len(questions)) > 3000


def test_no_relation_drawn_at_random_is_told_or_asked_in_a_held_out_wording():
    random = Random(0)
    drawn = [relations.relation(random, facts.draws(random, "train")) for _ in range(6000)]
    sentences = {text for d in drawn for text in (d.statement, d.question, d.other_question)}
    assert len(sentences) > 15_000
    assert not leaks(sentences)


def test_no_attribute_or_verb_of_a_held_out_relation_is_drawn():
    words_of = [
        {word for text, _ in (*parts.owned, *parts.of_things) for word in text.replace("'s", "").split()}
        for parts in (wordings("held_out"), wordings("train"))
    ]
    # Training families ask "at what time": the word alone gives no held-out relation away.
    only_held_out = words_of[0] - words_of[1] - {"time"}
    assert {"combination", "appointment"} <= only_held_out <= deeds.NEVER_TRAINED
    random = Random(0)
    draw = facts.draws(random, "train")
    drawn = {word for _ in range(20_000) for word in relations.attribute(random, draw).replace("'s", "").split()} | {
        form for deed in deeds.DEEDS for form in deed
    }
    assert len(drawn) > 500
    assert not drawn & deeds.NEVER_TRAINED


def test_relations_drawn_at_random_can_be_answered_from_what_is_told():
    random = Random(1)
    draw = facts.draws(random, "train")
    for _ in range(2000):
        sentences = relations.relation(random, draw)
        assert sentences.value in sentences.statement
        assert sentences.value in sentences.answer
        for question in (sentences.question, sentences.other_question):
            texts = (re.sub(r"\b(I|me|my)\b", "user", text) for text in (question, sentences.statement))
            asked_of = set.intersection(*(set(re.findall(r"[\w-]+", text)) for text in texts))
            assert asked_of - relations.DROPPED, (question, sentences.statement)


def test_a_clause_tells_several_things_and_asks_for_each_of_them():
    random = Random(2)
    draw = facts.draws(random, "train")
    drawn = [clauses.clause(random, draw) for _ in range(3000)]
    for made in drawn:
        assert made.statement.count(made.value) >= 1, made
        assert not any(re.search(r"[{}]|  ", text) for text in made[:3]), made
        assert not any(re.search(rf"\b{re.escape(made.value)}\b", text) for text in made[1:3]), made
    asked = {word for made in drawn for word in re.findall(r"[a-z]+", made.question)}
    assert asked >= {"who", "whom", "whose", "what", "where", "when", "why", "how", "often", "many", "which"}


@pytest.mark.parametrize(
    ("tense", "active", "asked", "passive"),
    [
        ("past", "Tom hid", "did Tom hide", "was hidden"),
        ("present", "Tom hides", "does Tom hide", "is hidden"),
        ("perfect", "Tom has hidden", "has Tom hidden", "has been hidden"),
        ("will", "Tom will hide", "will Tom hide", "will be hidden"),
    ],
)
def test_a_verb_takes_the_forms_of_its_tense(tense, active, asked, passive):
    forms = clauses.tense_of(("hide", "hid", "hidden"), tense, is_third=True, has="has")
    assert f"Tom {forms.active}" == active
    assert f"{forms.auxiliary} Tom {forms.rest}" == asked
    assert f"{forms.passive_auxiliary} {forms.passive_rest}" == passive


@pytest.mark.parametrize(
    ("base", "third"), [("carry", "carries"), ("catch", "catches"), ("buy", "buys"), ("see", "sees")]
)
def test_third_person(base, third):
    assert clauses.third_person(base) == third


def test_every_scene_can_be_told_of_a_person_and_of_the_user():
    wrong = re.compile(r"\b(I (has|were|does)|me (was|has)|(does|has|were) I|Tom (were|do))\b|[{}]")
    for scene in (*deeds.SCENES, *deeds.TIE_SCENES):
        assert all("{v}" in text for text in (*scene.statements, scene.answer)), scene
        assert not any("{v}" in text for text in scene.questions), scene
        for doer in (deeds.USER, deeds.Doer("Tom", "Tom", "Tom's")):
            fills = dict.fromkeys("bdqtnuiv", "x") | {"tie": "x"} | doer._asdict()
            for text in (*scene.statements, *scene.questions):
                assert not wrong.search(text.format(**fills)), text


def test_deeds_are_of_the_user_at_times_and_answered_with_you():
    random = Random(4)
    told = [deeds.deed(random, facts.draws(random, "train")) for _ in range(400)]
    users = [sentences for sentences in told if re.search(r"\b(you|your|yours)\b", sentences.answer)]
    assert 80 < len(users) < 200
    assert all(re.search(r"\b(I|me|my)\b", sentences.statement) for sentences in users)


def test_an_echo_asks_for_the_word_that_was_replaced_in_a_sentence_of_the_prose():
    sentence = 'The old mill stood by the river, and in Stornham two boys told Meg about the treasure."'
    sets = {"names": {"Meg", "Stornham"}, "nouns": {"river", "mill", "treasure"}}
    made = [echoes.echo(Random(seed), sentence, lambda kind: f"new-{kind}", **sets) for seed in range(80)]
    assert {echo.value for echo in made} == {"new-name", "new-place", "new-number", "new-noun"}
    for echo in made:
        assert echo.clause in echo.sentence
        assert echo.value in echo.clause
        assert echo.answer == echo.clause + "."
        assert echo.value not in echo.question
        assert set(re.findall(r"\w{4,}", echo.question)) & set(re.findall(r"\w{4,}", sentence))
    assert len({echo.question for echo in made}) > 25


def test_prose_without_a_word_to_replace_gives_no_echo():
    assert echoes.echo(Random(0), "So it was.", str, names=(), nouns=()) is None
    assert recall.with_echoes(Random(0), "So it was. So it is.", 3) == ("So it was. So it is.", [])


def test_echoes_are_facts_of_the_changed_prose():
    prose, told = recall.with_echoes(Random(3), PROSE, 5)
    assert told
    assert all(fact.statement in prose and fact.statement not in PROSE for fact in told)


def test_questions_are_surrounded_by_remarks_in_training_alone():
    fact = facts.Fact("my code is 42", "what is my code", "Your code is 42.", "42")
    asides, scraps = wordings("train").asides, 0
    for split in facts.SPLITS:
        asked = [recall.asked(Random(seed), fact, split, prose="Nobody knew.") for seed in range(200)]
        assert any(text.startswith(asides) for text in asked) == (split == "train")
        scraps += any(text.startswith(("Nobody", "knew")) for text in asked)
        assert all("what is my code" in text.lower() for text in asked)
    assert scraps == 1


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


def test_in_training_many_facts_are_the_first_thing_that_is_told():
    fact = facts.Fact("my code is 42", "what is my code", "Your code is 42.", "42")
    first = dict.fromkeys(facts.SPLITS, 0)
    for split in facts.SPLITS:
        for seed in range(200):
            text = recall.hide_facts(Random(seed), PROSE, [fact], split)[0][0]
            first[split] += "my code is 42" in text.lower()
    assert first["train"] > 30
    assert max(first["held_out"], first["second"]) < 10


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
            if message["role"] == "assistant" and message["content"] not in w.READING_REPLIES:
                assert any(word.strip(".").lower() in passage.lower() for word in message["content"].split())


def test_a_question_can_have_unseen_wording_and_values_and_seen_attributes_and_things():
    owned = {text for text, _ in wordings("train").owned}
    told = [facts.draw_fact(Random(seed), "held_out", subjects="train").statement for seed in range(300)]
    assert sum(any(f" {text}" in f" {statement}" for text in owned) for statement in told) > 60
    patterns = held_out_sentences().values()
    assert all(any(re.search(pattern, plain(statement)) for pattern in patterns) for statement in told)
