"""The list of methods. A method registers itself; everything else iterates over `available()`."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from kvlens.engine.cache import KVCache
from kvlens.engine.config import MethodConfig


@dataclass(frozen=True)
class Method:
    """What a method is called, where it comes from and how it is configured.

    `presets` are named configurations, the first of which is where the page starts. `is_simulated` says
    that the method only rounds in fp16 and stores fp16: it then shows no memory and no speed.
    """

    name: str
    title: str
    summary: str
    source: str
    config: type[MethodConfig]
    cache: type[KVCache]
    presets: dict[str, MethodConfig] = field(default_factory=dict)
    is_simulated: bool = False


_methods: dict[str, Method] = {}


def register(
    name: str,
    *,
    title: str,
    summary: str,
    source: str,
    config: type[MethodConfig],
    presets: dict[str, MethodConfig],
    is_simulated: bool = False,
) -> Callable[[type[KVCache]], type[KVCache]]:
    """Class decorator that enters a `KVCache` into the list. Raises: ValueError for a name taken."""

    def enter(cache_class: type[KVCache]) -> type[KVCache]:
        if name in _methods:
            raise ValueError(f"a method named {name!r} is registered already")
        cache_class.name = name
        _methods[name] = Method(name, title, summary, source, config, cache_class, presets, is_simulated)
        return cache_class

    return enter


@cache
def _import_all() -> None:
    from kvlens.engine import methods

    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")


def available() -> dict[str, Method]:
    """All methods by name, dense first."""
    _import_all()
    return dict(sorted(_methods.items(), key=lambda entry: (entry[0] != "dense", entry[0])))


def method(name: str) -> Method:
    """The method called `name`. Raises: ValueError with the names there are."""
    methods = available()
    if name not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}; got {name!r}")
    return methods[name]
