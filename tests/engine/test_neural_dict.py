"""Learning atoms: the gradient is that of the paper's loss, planted atoms are found, dead ones revived."""

import pytest
import torch
from torch.nn.functional import normalize

from kvlens.engine.dictionaries import merging
from kvlens.engine.dictionaries.neural_dict import NeuralDict, Recipe, centroids, relative_error
from kvlens.engine.dictionaries.online import extra_atoms, guard, sample_newest
from kvlens.kernels.pursuit import pursue


def planted(num_vectors: int = 6000, *, num_atoms: int = 24, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors that are sums of two of the atoms, and the atoms."""
    atoms = normalize(torch.randn(num_atoms, width), dim=1)
    chosen = torch.rand(num_vectors, num_atoms).topk(2, dim=1).indices
    weights = (1 + torch.rand(num_vectors, 2)) * torch.randn(num_vectors, 2).sign()
    return (atoms[chosen] * weights.unsqueeze(-1)).sum(dim=1), atoms


@pytest.mark.parametrize("is_diverse", [True, False])
def test_the_gradient_is_that_of_the_papers_loss(is_diverse):
    recipe = Recipe(sparsity=3, is_diverse=is_diverse)
    learner = NeuralDict(torch.randn(20, 8), recipe)
    batch = torch.randn(50, 8) * 5
    weights = learner.atoms.clone().requires_grad_()
    codes = pursue(batch, learner.atoms, sparsity=3)
    restored = (weights[codes.indices.long()] * codes.coefficients.unsqueeze(-1)).sum(dim=1)
    loss = (batch - restored).square().sum() / batch.square().sum()
    error = loss.item()
    if is_diverse:
        diversity = (torch.eye(20) - weights @ weights.T).square().sum() / 20**2
        loss = loss + (0.1 * error / diversity.detach()).clamp(0, 1) * diversity
    loss.backward()
    gradient, residual, measured = learner._gradient(batch, learner.atoms @ learner.atoms.T)
    torch.testing.assert_close(gradient, weights.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(residual, (batch - restored).detach(), atol=1e-5, rtol=1e-5)
    assert measured == pytest.approx(error, rel=1e-5)


def test_planted_atoms_are_learned_and_stay_of_unit_length():
    vectors, atoms = planted()
    recipe = Recipe(sparsity=2, epochs=20, batch_vectors=500, learning_rate=3e-2)
    learner = NeuralDict(centroids(vectors, 24), recipe)
    start = relative_error(vectors, learner.atoms, recipe, whole=vectors)
    steps = list(learner.fit(vectors.half()))
    end = relative_error(vectors, learner.atoms, recipe, whole=vectors)
    torch.testing.assert_close(learner.atoms.norm(dim=1), torch.ones(24))
    assert steps[-1].share == pytest.approx(1.0)
    assert end < 0.7 * start
    found = (atoms @ learner.atoms.T).abs().amax(dim=1)
    assert (found > 0.95).float().mean() > 0.6


def test_learning_is_the_same_at_every_run():
    vectors, _ = planted(1000)
    ends = []
    for _ in range(2):
        learner = NeuralDict(centroids(vectors, 24), Recipe(sparsity=2, epochs=1, batch_vectors=200))
        list(learner.fit(vectors))
        ends.append(learner.atoms)
    torch.testing.assert_close(*ends)


def test_atoms_that_nothing_uses_begin_anew():
    vectors, atoms = planted(2000)
    dead = torch.zeros(8, 16)
    dead[:, 0] = 1.0
    vectors[:, 0], atoms[:, 0] = 0.0, 0.0
    start = torch.cat([normalize(atoms, dim=1)[:16], dead])
    ends = {}
    for has_revival in (True, False):
        recipe = Recipe(sparsity=2, epochs=10, batch_vectors=200, is_diverse=False, has_revival=has_revival)
        learner = NeuralDict(start, recipe)
        list(learner.fit(vectors))
        ends[has_revival] = relative_error(vectors, learner.atoms, recipe, whole=vectors)
    assert ends[True] < 0.7 * ends[False]


def test_fewer_vectors_than_a_batch_are_one_batch_and_fewer_than_atoms_are_refused():
    vectors = torch.randn(30, 8)
    learner = NeuralDict(centroids(vectors, 10), Recipe(sparsity=2, epochs=2))
    assert len(list(learner.fit(vectors))) == 2
    with pytest.raises(ValueError, match="got 30"):
        centroids(vectors, 31)


def test_zero_vectors_do_no_harm():
    learner = NeuralDict(torch.randn(10, 8), Recipe(sparsity=2, epochs=2))
    list(learner.fit(torch.zeros(100, 8)))
    assert learner.atoms.isfinite().all()


def test_errors_are_shares_of_the_whole_vector():
    atoms = torch.eye(4)
    part = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    assert relative_error(part, atoms, Recipe(sparsity=1), whole=part) == pytest.approx(0.1)
    assert relative_error(part, atoms, Recipe(sparsity=1), whole=10 * part) == pytest.approx(0.001)
    assert relative_error(part, atoms, Recipe(sparsity=2), whole=part) == pytest.approx(0.0, abs=1e-6)


def test_divergence_tells_like_from_unlike():
    one, same, other = torch.randn(3, 20_000, 8)
    other = other.abs()
    alike, unlike = merging.divergence(one, same), merging.divergence(one, other)
    assert 0 <= alike < unlike <= 1
    assert merging.divergence(one, one) == 0
    assert merging.divergence(one, other) == pytest.approx(merging.divergence(other, one), abs=1e-3)


def test_layers_join_up_to_both_limits():
    divergences = [0.1, 0.1, 0.1, 0.5, 0.2]
    groups = merging.groups
    assert groups(divergences, None) == [[0], [1], [2], [3], [4], [5]]
    assert groups(divergences, merging.MergeLimits(0.3, 1.0)) == [[0, 1, 2, 3], [4, 5]]
    assert groups(divergences, merging.MergeLimits(0.3, 0.25)) == [[0, 1, 2], [3], [4, 5]]
    assert groups([], merging.MergeLimits(0.3, 1.0)) == [[0]]


def test_the_newest_vectors_come_first_with_all_heads():
    vectors = torch.arange(1.0, 13.0).view(2, 3, 2)
    newest = sample_newest(vectors, 3)
    expected = normalize(torch.stack([vectors[0, 2], vectors[1, 2], vectors[0, 1]]), dim=1)
    torch.testing.assert_close(newest, expected)
    assert len(sample_newest(vectors, 100)) == 6
    assert len(sample_newest(torch.zeros(2, 3, 2), 100)) == 0
    torch.testing.assert_close(sample_newest(vectors[0], 1), normalize(vectors[0, 2:], dim=1))


def test_the_guard_takes_what_the_dictionary_does_not_know():
    dictionary = torch.eye(4)[:2]
    vectors = torch.tensor([[5.0, 1.0, 0.1, 0.0], [1.0, 1.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0], [0.0] * 4])
    atoms = guard(vectors, dictionary, 2, sparsity=2)
    torch.testing.assert_close(atoms, normalize(vectors[[2, 1]], dim=1))
    both = extra_atoms(vectors, dictionary, num_sampled=1, num_guarded=2, sparsity=2)
    torch.testing.assert_close(both, torch.cat([atoms, normalize(vectors[2:3], dim=1)]))
