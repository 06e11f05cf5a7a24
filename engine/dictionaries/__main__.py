"""The command line: learn dictionaries, list those there are, check that they fit a model."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from kvlens.engine.dictionaries import calibration
from kvlens.engine.dictionaries.learn import LearnOptions, Progress, learn
from kvlens.engine.dictionaries.merging import MergeLimits
from kvlens.engine.dictionaries.store import (
    DictionaryKind,
    DictionaryStore,
    fingerprint,
    folders,
    learned_folder,
    matches,
    stored_sets,
)
from kvlens.engine.errors import EngineError
from kvlens.engine.model import LoadedModel, load_model

EMBEDDED_NAMES = ("embedded", "embedded model")
"""The second is what the page calls it, and so what its advice says."""

DEFAULT_KINDS = ("pre-rope-4096-v2", "pre-rope-1024-v1-centred", "post-rope-1024-v1-centred", "post-rope-1024-v1")
"""Every kind that a preset of CSR asks for, and keys after RoPE with their means taken off."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; gives the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvlens.engine.dictionaries", description=__doc__)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="learn dictionaries of a model from text")
    train.add_argument("--model", default="embedded", help="Hugging Face id, folder, or embedded")
    train.add_argument("--text", nargs="+", type=Path, default=[calibration.SHIPPED_TEXT], help=".txt or .jsonl files")
    train.add_argument("--kind", nargs="+", default=list(DEFAULT_KINDS), help=f"default: {' '.join(DEFAULT_KINDS)}")
    train.add_argument("--num-atoms", type=int, help="in place of the number in the kinds' names")
    train.add_argument("--sparsity", type=int, default=LearnOptions.sparsity, help="atoms a vector while learning")
    train.add_argument("--tokens", type=int, default=LearnOptions.num_tokens, help="tokens of text to read")
    train.add_argument("--epochs", type=int, default=LearnOptions.epochs)
    train.add_argument("--merge", nargs=2, type=float, metavar=("PAIR", "GROUP"), help="limits of layer merging, bits")
    train.add_argument("--device", default="auto")
    train.add_argument("--out", type=Path, help=f"folder to write to; default: {learned_folder()}")
    train.set_defaults(run=_train)
    listing = commands.add_parser("list", help="the dictionaries there are")
    listing.set_defaults(run=_list)
    check = commands.add_parser("check", help="whether a model has dictionaries, and their errors when learned")
    check.add_argument("--model", default="embedded")
    check.add_argument("--device", default="auto")
    check.set_defaults(run=_check)
    return parser


def _load(options: argparse.Namespace) -> LoadedModel:
    return load_model(None if options.model in EMBEDDED_NAMES else options.model, device=options.device)


def _train(options: argparse.Namespace) -> None:
    kinds = [DictionaryKind.parse(name) for name in options.kind]
    if options.num_atoms is not None:
        kinds = [replace(kind, num_atoms=options.num_atoms) for kind in kinds]
    documents = calibration.read_documents(options.text)
    model = _load(options)
    folder = options.out or learned_folder()
    store = DictionaryStore([folder], fingerprint(model.network), model_name=options.model)
    settings = LearnOptions(
        num_tokens=options.tokens, row_tokens=min(LearnOptions.row_tokens, model.max_context),
        sparsity=options.sparsity, epochs=options.epochs, merge=MergeLimits(*options.merge) if options.merge else None,
    )  # fmt: skip
    last = time.monotonic()
    for progress in learn(model, documents, kinds, settings, unfinished=learned_folder() / "unfinished"):
        if progress.dictionaries is not None:
            print(f"\rsaved {store.save(progress.dictionaries)}{'':40}")
        elif time.monotonic() - last > 0.5:
            last = time.monotonic()
            print(f"\r{_line(progress):<78}", end="", flush=True)


def _line(progress: Progress) -> str:
    if progress.kind is None:
        return f"{progress.share:6.1%}  reading the text"
    where = f"{progress.kind.name}  layer {progress.layer} {progress.side}"
    return f"{progress.share:6.1%}  {where}  squared error {progress.error:.3f}"


def _list(options: argparse.Namespace) -> None:
    found = stored_sets(folders())
    for stored in found:
        size = stored.path.stat().st_size / 2**20
        print(f"{stored.kind.name:28} {size:5.1f} MiB  {stored.model_name}  {_errors(stored.card)}  {stored.path}")
    if not found:
        print(f"no dictionaries in {' or '.join(map(str, folders()))}")


def _check(options: argparse.Namespace) -> None:
    model = _load(options)
    mark = fingerprint(model.network)
    own = [stored for stored in stored_sets(folders()) if matches(stored.fingerprint, mark)]
    if not own:
        raise EngineError(f"{model.name} has no dictionaries yet; learn them with the command train")
    for stored in own:
        stored.load()
        print(f"{stored.kind.name:28} fits {model.name}  {_errors(stored.card)}  {stored.path}")


def _errors(card: dict) -> str:
    """Mean over the layers, as it was measured when the dictionary was learned."""
    error = card.get("error", {})
    return "  ".join(f"{side} {sum(error[side]) / len(error[side]):.3f}" for side in error)


if __name__ == "__main__":
    sys.exit(main())
