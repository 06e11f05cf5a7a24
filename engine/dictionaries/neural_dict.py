"""NeuralDict: learns the atoms that reconstruct vectors best from a few of them.

Source: CSR (arXiv 2412.11741), algorithm 1 and equations 8 to 11: one linear layer without bias, begun with cluster
centroids; a batch is coded by pursuit with the present atoms, outside the gradient;
L = L_MSE + beta L_div with L_div = |I - W W^T|^2 / N^2 and beta = clamp(0.1 L_MSE / L_div, 0, 1); atoms get
length 1 again after every step.
Ours, where the paper is silent: Adam with a falling rate; L_MSE as a share of the vectors' energy, so that one rate
serves every layer; centroids by spherical k-means in which a vector and its negative are one, as coefficients have
signs; atoms that nothing uses begin anew as the worst residuals; the pursuit may be the one used later, with its
final fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from kvlens.kernels.pursuit import pursue, restore

_DIVERSITY = 0.1
_BETAS = (0.9, 0.999)
_EPSILON = 1e-12
_REVIVAL_STEPS = 10
_REVIVAL_SHARE = 0.8
_CLUSTER_SWEEPS = 8
_CLUSTER_BATCH = 8192
_CLUSTER_MEMORY = 3.0


@dataclass(frozen=True)
class Recipe:
    """How a dictionary is learned. `sparsity` atoms a vector, with a final least-squares fit if `has_refit`."""

    sparsity: int
    has_refit: bool = False
    epochs: int = 3
    batch_vectors: int = 2048
    learning_rate: float = 1e-2
    is_diverse: bool = True
    has_revival: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """How far a training is. `error` is the squared error of the last batch as a share of its energy."""

    share: float
    error: float


class NeuralDict:
    """A dictionary being learned. Shapes: atoms float32 `[N, W]`, rows of length 1."""

    def __init__(self, atoms: torch.Tensor, recipe: Recipe) -> None:
        self.atoms = normalize(atoms.float(), dim=1)
        self.recipe = recipe
        self._mean = torch.zeros_like(self.atoms)
        self._square = torch.zeros_like(self.atoms)
        self._uses = torch.zeros(len(atoms), device=atoms.device)
        self._num_steps = 0

    def fit(self, vectors: torch.Tensor) -> Iterator[Step]:
        """Learns from `vectors` `[M, W]` (any float dtype), a step a batch; may be left at any step."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed)
        size = min(recipe.batch_vectors, len(vectors))
        num_batches = len(vectors) // size
        total = recipe.epochs * num_batches
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(vectors), generator=generator)
            for place in range(num_batches):
                done = (epoch * num_batches + place) / total
                batch = vectors[order[place * size : (place + 1) * size]].to(self.atoms.device).float()
                rate = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
                error = self.step(batch, rate, may_revive=recipe.has_revival and done < _REVIVAL_SHARE)
                yield Step(done + 1 / total, error)

    def step(self, batch: torch.Tensor, learning_rate: float, *, may_revive: bool = False) -> float:
        """One batch `[M, W]`; its squared error before the step, as a share of its energy."""
        gram = self.atoms @ self.atoms.T
        gradient, residual, error = self._gradient(batch, gram)
        self._adam(gradient, learning_rate)
        self.atoms = normalize(self.atoms, dim=1)
        if may_revive and self._num_steps % _REVIVAL_STEPS == 0:
            self._revive(residual)
        return error

    def _gradient(self, batch: torch.Tensor, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """dL/dW with the codes as constants; the residuals; L_MSE as a share of the batch's energy."""
        codes = pursue(batch, self.atoms, sparsity=self.recipe.sparsity, gram=gram, refit=self.recipe.has_refit)
        residual = batch - restore(codes, self.atoms)
        energy = batch.square().sum().clamp(min=_EPSILON)
        error = residual.square().sum() / energy
        gradient = torch.zeros_like(self.atoms)
        indices = codes.indices.long()
        for slot in range(indices.shape[1]):
            gradient.index_add_(0, indices[:, slot], residual * codes.coefficients[:, slot, None])
        gradient *= -2 / energy
        self._uses += torch.bincount(indices.flatten(), minlength=len(self.atoms))
        if self.recipe.is_diverse:
            alike = gram - torch.eye(len(gram), device=gram.device)
            num_pairs = len(gram) ** 2
            diversity = alike.square().sum() / num_pairs
            beta = (_DIVERSITY * error / diversity.clamp(min=_EPSILON)).clamp(0.0, 1.0)
            gradient += beta * (4 / num_pairs) * (alike @ self.atoms)
        return gradient, residual, error.item()

    def _adam(self, gradient: torch.Tensor, learning_rate: float) -> None:
        self._num_steps += 1
        first, second = _BETAS
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square(), 1 - second)
        mean = self._mean / (1 - first**self._num_steps)
        square = self._square / (1 - second**self._num_steps)
        self.atoms = self.atoms - learning_rate * mean / (square.sqrt() + _EPSILON)

    def _revive(self, residual: torch.Tensor) -> None:
        """Atoms without a use since the last time become the largest residuals."""
        dead = (self._uses == 0).nonzero().squeeze(-1)[: len(residual)]
        worst = residual.norm(dim=1).topk(len(dead)).indices
        self.atoms[dead] = normalize(residual[worst], dim=1)
        self._mean[dead] = self._square[dead] = 0
        self._uses.zero_()


def centroids(vectors: torch.Tensor, num_atoms: int, *, seed: int = 0) -> torch.Tensor:
    """Directions that the vectors gather around, by spherical mini-batch k-means. Shapes: float32 `[N, W]`.

    Raises: ValueError if there are fewer vectors than atoms.
    """
    if len(vectors) < num_atoms:
        raise ValueError(f"{num_atoms} atoms need at least as many vectors; got {len(vectors)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(vectors), generator=generator)
    centres = normalize(vectors[order[:num_atoms]].float(), dim=1)
    for _ in range(_CLUSTER_SWEEPS):
        chosen = torch.randint(len(vectors), (min(_CLUSTER_BATCH, len(vectors)),), generator=generator)
        directions = normalize(vectors[chosen].float(), dim=1)
        similarity = directions @ centres.T
        nearest = similarity.abs().argmax(dim=1)
        signs = similarity.gather(1, nearest.unsqueeze(1)).sign()
        # An old centre counts as a few vectors, so that a small batch does not throw it about.
        sums = _CLUSTER_MEMORY * centres
        centres = normalize(sums.index_add_(0, nearest, directions * signs), dim=1)
    return centres


def relative_error(vectors: torch.Tensor, atoms: torch.Tensor, recipe: Recipe, *, whole: torch.Tensor) -> float:
    """Mean over vectors of |x - x^|^2 / |x|^2, where `whole` are the x of which `vectors` are what is coded.

    Shapes: vectors, whole `[M, W]`.
    """
    vectors, whole = vectors.to(atoms.device).float(), whole.to(atoms.device).float()
    codes = pursue(vectors, atoms, sparsity=recipe.sparsity, refit=recipe.has_refit)
    lost = (vectors - restore(codes, atoms)).square().sum(dim=1)
    return (lost / whole.square().sum(dim=1).clamp(min=_EPSILON)).mean().item()
