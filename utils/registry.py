"""Registries: names to factories; an unknown name raises an error that lists the known ones."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class UnknownName(KeyError):
    """A name that a registry has not; its text is the message, where that of a KeyError is a quotation of it."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry(Generic[Factory]):
    """A small table of factories, e.g. `SOURCES = Registry("source")`; `@SOURCES.register("ade20k")` adds one."""

    def __init__(self, kind: str):
        self.kind = kind
        self._factories: dict[str, Any] = {}

    def register(self, *names: str) -> Callable[[Decorated], Decorated]:
        """A decorator that registers a class or function by one or several names."""

        def add(factory: Decorated) -> Decorated:
            for name in names:
                if name in self._factories:
                    raise ValueError(f"two {self.kind}s are called {name!r}")
                self._factories[name] = factory
            return factory

        return add

    def __getitem__(self, name: str) -> Factory:
        try:
            return self._factories[name]
        except KeyError:
            raise UnknownName(unknown(self.kind, name, self._factories)) from None

    def __contains__(self, name: str) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))


def unknown(kind: str, name: str, have: Any) -> str:
    """The message for a name that is not in `have`: the most similar one first, then all."""
    similar = difflib.get_close_matches(name, list(have), n=1)
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"no {kind} {name!r}{hint}; have: {', '.join(sorted(have))}"
