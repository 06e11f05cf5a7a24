"""Learns the dictionaries of a model from text, step by step, so that a page or a command can follow and stop.

The text is read once for all kinds; then the keys and the values of every layer (or group of layers) get their
dictionary. Nothing outlives the generator but what it has handed out and, if asked for, files to go on from.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import normalize

from kvlens.engine.dictionaries import calibration, merging
from kvlens.engine.dictionaries.calibration import Collected, Document
from kvlens.engine.dictionaries.merging import MergeLimits
from kvlens.engine.dictionaries.neural_dict import NeuralDict, Recipe, centroids, relative_error
from kvlens.engine.dictionaries.store import DictionaryKind, DictionarySet
from kvlens.engine.errors import EngineError
from kvlens.engine.model import LoadedModel

SIDES = ("keys", "values")

MOST_VECTORS = 200_000
"""Vectors kept of each layer and side: models with many heads read less text, so that memory suffices."""

_READING_SHARE = 0.25
_HELD_OUT_SHARE = 0.05
_COMPARED_VECTORS = 20_000
_MEASURED_VECTORS = 8192


@dataclass(frozen=True)
class LearnOptions:
    """How much is read and how long is learned. `sparsity` is of keys, and of values with all their parts."""

    num_tokens: int = 80_000
    row_tokens: int = 2048
    sparsity: int = 4
    epochs: int = 2
    merge: MergeLimits | None = None

    def recipe(self, kind: DictionaryKind, side: str) -> Recipe:
        """How one side of a kind is learned. A value in two parts spends its atoms half on each."""
        sparsity = self.sparsity if side == "keys" else max(1, self.sparsity // kind.value_parts)
        # The products of all atoms with each other cost a step the same whatever its batch.
        return Recipe(sparsity, epochs=self.epochs, batch_vectors=max(Recipe.batch_vectors, 2 * kind.num_atoms))


@dataclass(frozen=True)
class Progress:
    """Where learning stands. `share` is of everything, 0 to 1; `error` is the latest squared relative error.

    `dictionaries` is there once for each kind, when it is finished.
    """

    share: float
    stage: str
    kind: DictionaryKind | None = None
    side: str | None = None
    layer: int | None = None
    error: float | None = None
    dictionaries: DictionarySet | None = None


def learn(
    model: LoadedModel,
    documents: Sequence[Document],
    kinds: Sequence[DictionaryKind],
    options: LearnOptions | None = None,
    *,
    unfinished: Path | None = None,
) -> Iterator[Progress]:
    """Dictionaries of `kinds` for `model`. Close the iterator to stop; nothing stays in memory.

    With a folder `unfinished`, every finished dictionary is kept there and a stopped run goes on from them.
    Raises: EngineError if the text is too short for the dictionaries.
    """
    options = options or LearnOptions()
    started = time.monotonic()
    num_tokens = min(options.num_tokens, MOST_VECTORS // model.shape.num_kv_heads)
    rows = calibration.rows_of(model, documents, num_tokens=num_tokens, row_tokens=options.row_tokens)
    _check_size(model, kinds, sum(map(len, rows)))
    for read in calibration.collect(model, rows):
        if isinstance(read, Collected):
            collected = read
        else:
            yield Progress(_READING_SHARE * read, "reading")
    run = hashlib.sha256(f"{model.name} {calibration.digest(documents)} {options}".encode()).hexdigest()[:12]
    kept = None if unfinished is None else unfinished / run
    for place, kind in enumerate(kinds):
        made = _Maker(model, collected, kind, options, kept)
        for progress in made.run():
            share = _READING_SHARE + (1 - _READING_SHARE) * (place + progress.share) / len(kinds)
            yield replace(progress, share=share)
        card = {
            "model": model.name,
            "learned_from": {"sha256": calibration.digest(documents), "tokens": collected.num_tokens},
            "sparsity": options.sparsity, "epochs": options.epochs,
            "groups": made.groups, "error": made.errors, "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
        dictionaries = DictionarySet(kind, *made.atoms.values(), card, **made.means)
        share = _READING_SHARE + (1 - _READING_SHARE) * (place + 1) / len(kinds)
        yield Progress(share, "done", kind, dictionaries=dictionaries)
    if kept is not None:
        _remove(kept)


def _check_size(model: LoadedModel, kinds: Sequence[DictionaryKind], num_tokens: int) -> None:
    largest = max((kind.num_atoms for kind in kinds), default=0)
    num_vectors = int(num_tokens * model.shape.num_kv_heads * (1 - _HELD_OUT_SHARE))
    if num_vectors < 4 * largest:
        raise EngineError(
            f"{largest} atoms need at least {4 * largest} vectors to learn from; the text has {num_tokens} tokens of "
            f"{model.shape.num_kv_heads} heads. Give more text, or ask for fewer atoms."
        )


def _remove(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if folder.is_dir():
        folder.rmdir()


class _Maker:
    """Learns one kind. After `run`: atoms and errors of every layer by side, groups, and the means."""

    def __init__(
        self, model: LoadedModel, collected: Collected, kind: DictionaryKind, options: LearnOptions, kept: Path | None
    ) -> None:
        if model.shape.head_dim % kind.value_parts:
            raise EngineError(f"heads of {model.shape.head_dim} channels cannot be cut in {kind.value_parts} parts")
        self._device, self._layers = model.device, range(model.shape.num_layers)
        self._collected, self._kind, self._options, self._kept = collected, kind, options, kept
        self.atoms: dict[str, list[torch.Tensor]] = {}
        self.errors: dict[str, list[float]] = {}
        self.groups: dict[str, list[list[int]]] = {}
        self.means: dict[str, list[torch.Tensor]] = {}
        if kind.is_centred:
            self.means = {
                f"{side[:-1]}_means": [collected.mean(side, layer) for layer in self._layers] for side in SIDES
            }

    def run(self) -> Iterator[Progress]:
        jobs = []
        for side in SIDES:
            self.groups[side] = self._groups(side)
            self.atoms[side], self.errors[side] = [None] * len(self._layers), [0.0] * len(self._layers)
            jobs += [(side, group) for group in self.groups[side]]
        for place, (side, group) in enumerate(jobs):
            recipe = self._options.recipe(self._kind, side)
            atoms = self._found(side, group)
            if atoms is None:
                train = torch.cat([self._coded(side, layer, held_out=False) for layer in group])
                learner = NeuralDict(centroids(train, self._kind.num_atoms).to(self._device), recipe)
                for step in learner.fit(train):
                    share = (place + step.share) / len(jobs)
                    yield Progress(share, "learning", self._kind, side, group[0], step.error)
                atoms = learner.atoms.cpu()
                self._keep(side, group, atoms)
            for layer in group:
                self.atoms[side][layer] = atoms
                self.errors[side][layer] = round(self._measure(side, layer, atoms, recipe), 5)
            yield Progress((place + 1) / len(jobs), "learning", self._kind, side, group[0], self.errors[side][group[0]])

    def _coded(self, side: str, layer: int, *, held_out: bool, whole: bool = False) -> torch.Tensor:
        """Vectors to learn from or to measure on; `whole`: what they are parts or differences of. `[M, W]` fp16."""
        space = self._kind.space
        if self._kind.is_centred and not whole:
            tensor = self._collected.centred(side, layer, space, self.means[f"{side[:-1]}_means"][layer])
        else:
            tensor = self._collected.exact(side, layer, space)
        cut = int(tensor.shape[1] * (1 - _HELD_OUT_SHARE))
        tensor = tensor[:, cut:] if held_out else tensor[:, :cut]
        parts = self._kind.value_parts if side == "values" else 1
        return tensor.unflatten(-1, (parts, -1)).flatten(0, -2)

    def _measure(self, side: str, layer: int, atoms: torch.Tensor, recipe: Recipe) -> float:
        """Mean squared relative error on tokens that were not learned from."""
        coded, whole = (self._coded(side, layer, held_out=True, whole=whole) for whole in (False, True))
        some = torch.linspace(0, len(coded) - 1, min(len(coded), _MEASURED_VECTORS)).long()
        return relative_error(coded[some], atoms.to(self._device), recipe, whole=whole[some])

    def _groups(self, side: str) -> list[list[int]]:
        limits = self._options.merge
        if limits is None:
            return merging.groups([1.0] * (len(self._layers) - 1), None)
        some = [self._coded(side, layer, held_out=False)[:_COMPARED_VECTORS] for layer in self._layers]
        divergences = [merging.divergence(one, other) for one, other in pairwise(some)]
        return merging.groups(divergences, limits)

    def _file(self, side: str, group: Sequence[int]) -> Path | None:
        return None if self._kept is None else self._kept / f"{self._kind.name}-{side}-{group[0]}.safetensors"

    def _found(self, side: str, group: Sequence[int]) -> torch.Tensor | None:
        path = self._file(side, group)
        if path is None or not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return normalize(file.get_tensor("atoms"), dim=1)

    def _keep(self, side: str, group: Sequence[int], atoms: torch.Tensor) -> None:
        path = self._file(side, group)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"atoms": atoms}, partial)
            partial.replace(path)
