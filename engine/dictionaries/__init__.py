"""Dictionaries for sparse coding of keys and values: learned once for a model, then looked up by layer.

Source: CSR (Zhang et al., AAAI 2025, arXiv 2412.11741). `store.py` keeps them; `learn.py` makes them.
"""

from kvlens.engine.dictionaries.store import (
    DictionaryKind,
    DictionarySet,
    DictionaryStore,
    MissingDictionary,
    fingerprint,
    folders,
    matches,
)

__all__ = [
    "DictionaryKind",
    "DictionarySet",
    "DictionaryStore",
    "MissingDictionary",
    "fingerprint",
    "folders",
    "matches",
]
