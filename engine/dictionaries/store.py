"""Dictionaries on disk and in memory, each tied to the one model it was learned from.

A set is one safetensors file: float16 atoms, the model's fingerprint, and a card that says how it was learned.
This module knows neither how dictionaries are learned nor how caches use them.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import normalize

from kvlens.engine.errors import EngineError

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "model" / "dictionaries"
"""Where the embedded model's own dictionaries lie."""

SPACES = ("pre_rope", "post_rope")
MAX_ATOMS = 32_768
"""An index has 16 bits, one of them its sign."""

_SIGNATURE_LENGTH = 8
_TOLERANCE = 0.01


class MissingDictionary(EngineError):
    """No dictionary of `kind` was learned for this model."""

    def __init__(self, kind: "DictionaryKind", sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


@dataclass(frozen=True)
class DictionaryKind:
    """Which dictionary a method wants.

    Keys are coded before or after RoPE, values in `value_parts` equal parts. Where `is_centred`, what is coded is the
    difference from a mean vector of each head.
    """

    space: str
    num_atoms: int
    value_parts: int = 1
    is_centred: bool = False

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}; got {self.space!r}")
        if not 1 <= self.num_atoms <= MAX_ATOMS:
            raise ValueError(f"num_atoms must be 1 to {MAX_ATOMS}, so that an index fits 16 bits; got {self.num_atoms}")
        if self.value_parts not in (1, 2):
            raise ValueError(f"value_parts must be 1 or 2; got {self.value_parts}")

    @property
    def name(self) -> str:
        """As in file names and on the command line, such as `pre-rope-1024-v1-centred`."""
        return f"{self.space.replace('_', '-')}-{self.num_atoms}-v{self.value_parts}{'-centred' * self.is_centred}"

    @classmethod
    def parse(cls, name: str) -> "DictionaryKind":
        """The kind called `name`. Raises: EngineError."""
        match = re.fullmatch(r"(pre|post)-rope-(\d+)-v([12])(-centred)?", name)
        if match is None:
            raise EngineError(
                f"a kind of dictionary is called like pre-rope-1024-v2 or pre-rope-1024-v1-centred; got {name!r}"
            )
        return cls(f"{match[1]}_rope", int(match[2]), int(match[3]), match[4] is not None)


@dataclass(frozen=True)
class DictionarySet:
    """The dictionaries of all layers of a model. Layers that share one share the tensor object.

    Shapes: keys[layer] float32 `[N, D]`, values[layer] float32 `[N, D / value_parts]`, rows of length 1;
    key_means[layer] and value_means[layer] float32 `[HK, D]`, or None where the kind is not centred. Means of keys are
    always those before RoPE: what is coded after RoPE is the difference from the mean turned to the key's position.
    `card` says what they were learned from and how well they fit; it is plain JSON.
    """

    kind: DictionaryKind
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    card: dict[str, Any] = field(default_factory=dict)
    key_means: list[torch.Tensor] | None = None
    value_means: list[torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise ValueError(f"every layer has keys and values; got {len(self.keys)} and {len(self.values)}")
        for side, dictionaries in (("keys", self.keys), ("values", self.values)):
            for layer, atoms in enumerate(dictionaries):
                if atoms.ndim != 2 or atoms.shape[0] != self.kind.num_atoms:
                    raise ValueError(
                        f"{side} of layer {layer} must be [{self.kind.num_atoms}, width]; got {list(atoms.shape)}"
                    )
        for means in (self.key_means, self.value_means):
            if (means is not None) != self.kind.is_centred or (means is not None and len(means) != self.num_layers):
                raise ValueError(
                    f"means must be given for every layer if, and only if, the kind {self.kind} is centred"
                )

    @property
    def num_layers(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "DictionarySet":
        """The same set with its atoms on `device`; itself if they are there. Shared dictionaries stay shared."""
        moved = {id(tensor): tensor.to(device) for tensor in self._held()}
        if all(moved[id(tensor)] is tensor for tensor in self._held()):
            return self
        keys, values, key_means, value_means = (
            None if layers is None else [moved[id(tensor)] for tensor in layers]
            for layers in (self.keys, self.values, self.key_means, self.value_means)
        )
        return DictionarySet(self.kind, keys, values, self.card, key_means, value_means)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory; a shared dictionary counts once."""
        return sum({id(tensor): tensor.nbytes for tensor in self._held()}.values())

    def _held(self) -> tuple[torch.Tensor, ...]:
        return (*self.keys, *self.values, *(self.key_means or ()), *(self.value_means or ()))


def fingerprint(network: torch.nn.Module) -> torch.Tensor:
    """What a model's attention weights look like from a fixed direction. Shapes: float32 `[L, 8]`.

    Every matrix of an attention block is projected on fixed waves, so that fused and separate projections
    are both seen and rounding to 16 bits moves it by far less than a percent. Raises: EngineError if the network
    has no attention blocks.
    """
    layers: dict[int, torch.Tensor] = {}
    blocks = [module for module in network.modules() if type(module).__name__.endswith("Attention")]
    for module in blocks:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            continue
        matrices = [weight for weight in module.parameters() if weight.ndim == 2]
        signature = layers.setdefault(layer, torch.zeros(_SIGNATURE_LENGTH))
        for place, weight in enumerate(matrices):
            signature += _signature(weight.detach(), place)
    if not layers:
        raise EngineError("this network has no attention blocks with a layer_idx, so no dictionary can be tied to it")
    return torch.stack([layers[layer] for layer in sorted(layers)])


def _signature(weight: torch.Tensor, place: int) -> torch.Tensor:
    """Eight numbers of a matrix `[M, K]`: waves · weight · wave."""
    num_rows, num_columns = weight.shape
    device = weight.device
    columns = torch.arange(num_columns, device=device).mul(math.sqrt(2) + place).cos()
    rows = torch.arange(num_rows, device=device)
    steps = torch.arange(1, _SIGNATURE_LENGTH + 1, device=device).mul(math.sqrt(3)).add(place)
    return (torch.outer(steps, rows).cos() @ (weight.float() @ columns)).cpu()


def matches(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two fingerprints are of one model, in whatever dtype it was loaded."""
    if one.shape != other.shape:
        return False
    difference = (one - other).norm(dim=1)
    return bool((difference <= _TOLERANCE * one.norm(dim=1)).all())


def learned_folder() -> Path:
    """Where learned dictionaries go: `KVLENS_DICTIONARIES` or `~/.cache/kvlens/dictionaries`."""
    return Path(os.environ.get("KVLENS_DICTIONARIES") or Path.home() / ".cache" / "kvlens" / "dictionaries")


def folders() -> list[Path]:
    """Where a model's dictionaries are looked for: what was learned here, then what is shipped."""
    return [learned_folder(), SHIPPED]


def write(dictionaries: DictionarySet, mark: torch.Tensor, path: Path) -> None:
    """Store a set with its model's fingerprint `mark`; the file is there whole or not at all."""
    groups = {"keys": _groups(dictionaries.keys), "values": _groups(dictionaries.values)}
    tensors = {"fingerprint": mark.float().contiguous()}
    for side, layers in (("keys", dictionaries.keys), ("values", dictionaries.values)):
        tensors |= {f"{side}.{layer}": layers[layer].half().contiguous().cpu() for layer in set(groups[side])}
    for side, means in (("key_means", dictionaries.key_means), ("value_means", dictionaries.value_means)):
        tensors |= {f"{side}.{layer}": mean.float().cpu().clone() for layer, mean in enumerate(means or ())}
    header = {"kind": dictionaries.kind.name, "groups": groups, "card": dictionaries.card}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"kvlens": json.dumps(header)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _groups(layers: Sequence[torch.Tensor]) -> list[int]:
    """For each layer the first layer that has the same dictionary."""
    first: dict[int, int] = {}
    return [first.setdefault(id(atoms), layer) for layer, atoms in enumerate(layers)]


@dataclass(frozen=True)
class StoredSet:
    """A file as its header tells, without its atoms."""

    path: Path
    kind: DictionaryKind
    card: dict[str, Any]
    fingerprint: torch.Tensor

    @property
    def model_name(self) -> str:
        return self.card.get("model") or "an unnamed model"

    def load(self) -> DictionarySet:
        """Its dictionaries, in float32 and of unit length again. Raises: EngineError if the file is damaged."""
        groups = _header(self.path)["groups"]
        with safe_open(self.path, "pt") as file:

            def atoms(side: str) -> list[torch.Tensor]:
                own = {layer: normalize(file.get_tensor(f"{side}.{layer}").float(), dim=1) for layer in {*groups[side]}}
                return [own[layer] for layer in groups[side]]

            def means(side: str) -> list[torch.Tensor] | None:
                if not self.kind.is_centred:
                    return None
                return [file.get_tensor(f"{side}.{layer}") for layer in range(len(groups["keys"]))]

            return DictionarySet(
                self.kind, atoms("keys"), atoms("values"), self.card, means("key_means"), means("value_means")
            )


def read(path: Path) -> StoredSet:
    """What a file holds. Raises: EngineError if it is no set of dictionaries."""
    header = _header(path)
    with safe_open(path, "pt") as file:
        mark = file.get_tensor("fingerprint")
    return StoredSet(path, DictionaryKind.parse(header["kind"]), header["card"], mark)


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["kvlens"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{path} is not a file of dictionaries, or is damaged; delete it and learn anew.") from error


class DictionaryStore:
    """The dictionaries of the one model whose `fingerprint` is given, looked for in `folders`.

    The first folder is written to. A set is read once and stays in memory.
    """

    def __init__(self, folders: Sequence[Path | str], fingerprint: torch.Tensor, *, model_name: str = "MODEL") -> None:
        if not folders:
            raise ValueError("folders must name at least one folder")
        self.folders = [Path(folder) for folder in folders]
        self.fingerprint = fingerprint
        self.model_name = model_name
        self._loaded: dict[DictionaryKind, DictionarySet] = {}

    def find(self, kind: DictionaryKind) -> DictionarySet:
        """The dictionaries of `kind`. Raises: MissingDictionary, whose sentence has the command to learn them."""
        if kind not in self._loaded:
            self._loaded[kind] = self._first(kind).load()
        return self._loaded[kind]

    def check(self, kind: DictionaryKind) -> None:
        """Reads no atoms. Raises: MissingDictionary, as `find` would."""
        if kind not in self._loaded:
            self._first(kind)

    def save(self, dictionaries: DictionarySet) -> Path:
        """Keep a set of this model, in place of an older one of its kind; gives the file."""
        kind = dictionaries.kind
        path = self.folders[0] / f"{_slug(self.model_name)}--{kind.name}.safetensors"
        # A model may be called by its folder today and by its id tomorrow.
        older = [found.path for found in self._own(kind, self.folders[:1]) if found.path != path]
        write(dictionaries, self.fingerprint, path)
        for replaced in older:
            replaced.unlink()
        self._loaded.pop(kind, None)
        return path

    def available(self) -> list[DictionaryKind]:
        """The kinds that `find` finds."""
        found = (stored for stored in stored_sets(self.folders) if matches(stored.fingerprint, self.fingerprint))
        return list(dict.fromkeys(stored.kind for stored in found))

    def _own(self, kind: DictionaryKind, folders: Sequence[Path]) -> list[StoredSet]:
        """This model's sets of `kind`."""
        stored = (found for found in stored_sets(folders) if found.kind == kind)
        return [found for found in stored if matches(found.fingerprint, self.fingerprint)]

    def _first(self, kind: DictionaryKind) -> StoredSet:
        own = self._own(kind, self.folders)
        if own:
            return own[0]
        stored = [found for found in stored_sets(self.folders) if found.kind == kind]
        reason = f"{self.model_name} has no dictionary {kind.name} yet"
        if stored:
            names = ", ".join(sorted({found.model_name for found in stored}))
            reason += f" (the one found is of another model: {names})"
        command = f"python -m kvlens.engine.dictionaries train --model {quote(self.model_name)} --kind {kind.name}"
        raise MissingDictionary(kind, f"{reason}. Learn it with: {command}")


def stored_sets(folders: Sequence[Path]) -> list[StoredSet]:
    """Every set in `folders`, in their order; files that are no sets are passed over."""
    found = []
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        try:
            found.append(read(path))
        except EngineError:
            # A damaged file is as good as none: the sentence about the missing set says what to do.
            continue
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
