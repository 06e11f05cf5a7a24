"""The throughput lab's engine: what a cell holds, when it is refused, and that nothing is left behind."""

import threading

import pytest
import torch

from kvlens.engine import bench as benches
from kvlens.engine import throughput
from kvlens.engine.architectures import ARCHITECTURES, Architecture, random_model
from kvlens.engine.bench import AttentionBench, Candidate, Cell, NetworkBench
from kvlens.engine.budget import MemoryBudget
from kvlens.engine.errors import EngineError, OutOfMemory
from kvlens.engine.methods.dense import DenseConfig
from kvlens.engine.methods.kivi import KiviConfig
from kvlens.engine.model import load_model
from kvlens.engine.registry import method
from kvlens.engine.shape import ModelShape
from kvlens.engine.throughput import FilledCell, measure, needed_bytes, plan_cells, random_prompt

DENSE = Candidate("fp16", "dense", DenseConfig())
KIVI = Candidate("KIVI-2", "kivi", KiviConfig(residual_length=32))
SMALL = Architecture("small", "qwen3", ModelShape(3, 4, 2, 32), 64, 96, 100, 1024)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder, device="cpu")


@pytest.fixture
def network(model):
    return NetworkBench(model)


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.setattr(benches, "last_cache_bytes", lambda device: 1 << 16)
    return AttentionBench(SMALL, torch.device("cpu"))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(throughput, "TIMED_STEPS", 2 * throughput.ROUND_STEPS)


def results(bench, cells, **options):
    *_, last = measure(bench, cells, **options)
    assert last.cell is None
    return last.results


def test_a_prompt_that_is_appended_is_stored_as_one_that_attends(model):
    for candidate in (DENSE, KIVI):
        caches = [model.new_cache(candidate.method, candidate.config, batch_size=2) for _ in range(2)]
        keys, values = torch.randn(2, 2, 2, 90, 32).half()
        query = torch.randn(2, 4, 90, 32).half()
        for layer in range(model.shape.num_layers):
            caches[0].attend(layer, query, keys, values, scaling=1.0)
            caches[1].append(layer, keys, values)
        for cache in caches:
            cache.end_prefill()
        assert caches[0].seen_tokens(1) == caches[1].seen_tokens(1) == 90
        for row in range(2):
            want, got = (cache.rebuild(1, row, 0, 90) for cache in caches)
            torch.testing.assert_close(got.keys, want.keys, atol=0, rtol=0)
            torch.testing.assert_close(got.values, want.values, atol=0, rtol=0)
    with pytest.raises(ValueError, match="2 sequences"):
        caches[0].append(0, keys[:1], values[:1])


@pytest.mark.parametrize("candidate", [DENSE, KIVI], ids=lambda one: one.label)
def test_a_measured_cell_says_what_it_held_and_how_long_a_step_took(network, candidate):
    cell = Cell(candidate, 300, 3)
    (found,) = results(network, [cell])
    assert (found.status, found.num_steps, found.batch_size) == ("measured", 16, 3)
    assert found.kv_bytes == needed_bytes(network.shape, cell) <= found.allocated_bytes
    assert 0 < found.step_ms_low <= found.step_ms <= found.step_ms_high
    assert found.tokens_per_second == pytest.approx(3000 / found.step_ms)
    assert found.measured_layers == found.num_layers == 2
    assert found.attention_path


def test_every_batch_size_takes_the_way_of_a_chat(model, monkeypatch):
    taken, run = [], model.short_step.run
    monkeypatch.setattr(model.short_step, "run", lambda cache, tokens: taken.append(len(tokens)) or run(cache, tokens))
    found = results(NetworkBench(model), plan_cells([DENSE, KIVI], [300], [1, 2, 5]))
    steps = found[0].num_steps + throughput.WARM_UP_STEPS
    assert taken == [1] * 2 * steps + [2] * 2 * steps + [5] * 2 * steps


@pytest.mark.parametrize("candidate", [DENSE, KIVI], ids=lambda one: one.label)
@pytest.mark.parametrize("context", [128, 300])
def test_every_timed_step_is_one_of_the_last_before_the_context(network, monkeypatch, candidate, context):
    lengths, step = [], network.step
    monkeypatch.setattr(network, "step", lambda cache: lengths.append(cache.num_tokens // 2) or step(cache))
    results(network, [Cell(candidate, context, 2)])
    assert lengths[throughput.WARM_UP_STEPS :] == [*range(context - 8, context)] * 2


@pytest.mark.parametrize("candidate", [DENSE, KIVI], ids=lambda one: one.label)
def test_a_prompt_in_pieces_is_stored_as_one_in_a_piece(network, monkeypatch, candidate):
    tiles = []
    for size in (10**6, 100):
        monkeypatch.setitem(throughput.FILL_TOKENS, "cpu", size)
        filled = FilledCell(network, Cell(candidate, 300, 2))
        assert len(list(filled.fill())) == 2 * (1 if size > 1000 else 6)
        tiles.append(filled.cache.rebuild(1, 1, 0, 300 - 8))
    torch.testing.assert_close(tiles[0].keys, tiles[1].keys, atol=0, rtol=0)
    torch.testing.assert_close(tiles[0].values, tiles[1].values, atol=0, rtol=0)


def test_every_row_of_a_batch_has_its_own_storage(network):
    filled = FilledCell(network, Cell(KIVI, 300, 3))
    for _ in filled.fill():
        pass
    one = filled.cache.rebuild(1, 0, 0, 100).keys
    assert one.abs().max() > 0
    assert filled.cache.lengths == [[300 - 8] * 3] * 2
    filled.cache.append(0, torch.zeros(3, 2, 40, 32).half(), torch.zeros(3, 2, 40, 32).half())
    filled.cache.end_prefill()
    whole = needed_bytes(network.shape, Cell(KIVI, 300 - 8, 3))
    assert filled.cache.footprint().reserved_bytes >= whole
    filled.close()
    assert filled.cache.footprint().reserved_bytes == 0


def test_a_cell_over_budget_is_not_measured_and_the_rest_goes_on(network):
    cells = plan_cells([DENSE, KIVI], [512], [1, 4])
    limit = needed_bytes(network.shape, cells[2]) - 1
    found = results(network, cells, limit_bytes=limit)
    assert [one.status for one in found] == ["measured", "measured", "over budget", "measured"]
    assert found[2].kv_bytes == limit + 1
    assert found[2].step_ms is None


def test_what_the_process_may_not_hold_is_over_budget_too(network):
    whole = MemoryBudget(10_000)
    (found,) = results(network, [Cell(DENSE, 512, 4)], within=whole)
    assert found.status == "over budget"
    assert "KV budget" in found.note
    assert whole.used_bytes == 0


def test_a_budget_within_a_budget_takes_and_gives_in_both():
    outer = MemoryBudget(100)
    inner = MemoryBudget(80, within=outer)
    inner.take(60)
    assert (inner.used_bytes, outer.used_bytes) == (60, 60)
    with pytest.raises(OutOfMemory):
        inner.take(30)
    outer.take(30)
    with pytest.raises(OutOfMemory):
        inner.take(15)
    assert (inner.used_bytes, outer.used_bytes) == (60, 90)
    inner.give(60)
    assert (inner.used_bytes, outer.used_bytes) == (0, 30)


def test_memory_is_given_back_after_each_cell_and_after_a_stop(network):
    whole, stop, held = MemoryBudget(), threading.Event(), []
    cells = plan_cells([DENSE, KIVI], [300, 400], [2])
    for progress in measure(network, cells, within=whole, stop=stop):
        held.append(whole.used_bytes)
        if len(progress.results) == 2 and whole.used_bytes:
            stop.set()
    assert len(progress.results) == 2
    assert progress.cell is None
    assert max(held) > 0
    assert whole.used_bytes == 0


def test_an_iterator_that_is_closed_gives_memory_back(network):
    whole = MemoryBudget()
    running = measure(network, [Cell(DENSE, 300, 2)], within=whole)
    while not whole.used_bytes:
        next(running)
    running.close()
    assert whole.used_bytes == 0


def test_stop_takes_effect_with_the_step_under_way(network):
    stop, after = threading.Event(), 0
    for progress in measure(network, plan_cells([DENSE], [300], [1, 2]), stop=stop):
        after += stop.is_set()
        if progress.results:
            stop.set()
    # What was under way, and the closing record.
    assert after <= 2
    assert len(progress.results) == 1


def test_a_method_that_cannot_run_says_why_and_the_rest_goes_on(network, monkeypatch):
    def no_dictionary(cache, num_tokens):
        raise EngineError("There is no dictionary for this model. Learn one first.")

    monkeypatch.setattr(method("kivi").cache, "reserve", no_dictionary)
    found = results(network, [Cell(KIVI, 300, 1), Cell(DENSE, 300, 1)])
    assert [one.status for one in found] == ["not served", "measured"]
    assert found[0].note == "There is no dictionary for this model. Learn one first."


def test_contexts_out_of_range_and_settings_that_do_not_fit_are_sentences(network, monkeypatch):
    def no_fit(config, shape):
        raise ValueError("group_size must divide head_dim")

    monkeypatch.setattr(KiviConfig, "check", no_fit)
    found = results(network, [Cell(KIVI, 300, 1), Cell(DENSE, 2000, 1), Cell(DENSE, 100, 1)])
    assert [one.status for one in found] == ["not served"] * 3
    assert found[0].note == "group_size must divide head_dim"
    assert "got 2,000" in found[1].note
    assert "got 100" in found[2].note


def test_what_time_does_not_reach_is_skipped(network):
    found = results(network, plan_cells([DENSE], [300, 400], [1]), max_seconds=0.0)
    assert [one.status for one in found] == ["skipped", "skipped"]


def test_a_slow_cell_takes_fewer_steps(network, monkeypatch):
    monkeypatch.setattr(throughput, "CELL_SECONDS", 0.0)
    (found,) = results(network, [Cell(DENSE, 300, 1)])
    assert found.num_steps == throughput.ROUND_STEPS


def test_attention_alone_measures_some_layers_and_speaks_of_all(attention, monkeypatch):
    monkeypatch.setattr(AttentionBench, "_MAX_LAYERS", 2)
    for candidate in (DENSE, KIVI):
        cell = Cell(candidate, 512, 2)
        (found,) = results(attention, [cell], limit_bytes=needed_bytes(attention.shape, cell) * 2)
        assert (found.status, found.measured_layers, found.num_layers) == ("measured", 2, 3)
        assert found.kv_bytes == needed_bytes(attention.shape, cell)
        (found,) = results(attention, [cell], limit_bytes=needed_bytes(attention.shape, cell) - 1)
        assert found.status == "over budget"


def test_a_layer_too_large_for_the_lab_is_a_sentence(attention, monkeypatch):
    monkeypatch.setattr(benches, "LAYER_BYTES", 1000)
    (found,) = results(attention, [Cell(DENSE, 512, 2)])
    assert found.status == "not served"
    assert "smaller batch" in found.note


def test_a_random_network_runs_through_the_same_bench():
    model = random_model(SMALL, torch.device("cpu"), torch.float32)
    found = results(NetworkBench(model), plan_cells([DENSE, KIVI], [300], [2]))
    assert [one.status for one in found] == ["measured", "measured"]
    assert SMALL.weight_bytes == 2 * model.num_parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Llama-3.1-8B", 8.03), ("Llama-2-7B", 6.74), ("Mistral-7B-v0.3", 7.25), ("Qwen3-8B", 8.19),
     ("Qwen3-0.6B", 0.596), ("Llama-3.2-1B", 1.236)],
)  # fmt: skip
def test_architectures_have_the_parameters_that_their_cards_say(name, billions):
    architecture = ARCHITECTURES[name]
    assert architecture.weight_bytes / 2e9 == pytest.approx(billions, rel=0.002)
    assert ModelShape.of(architecture.config()) == architecture.shape


def test_random_prompts_have_large_key_channels_and_plain_values():
    keys, values = random_prompt(ModelShape(1, 4, 2, 64), 400, dtype=torch.float32, device=torch.device("cpu"))
    assert keys.shape == values.shape == (1, 2, 400, 64)
    spread = keys.abs().mean(dim=2)
    assert spread.max() > 4 * spread.median()
    assert values.abs().mean(dim=2).max() < 2
