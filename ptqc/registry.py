"""Names to classes, found by file name: adding a file adds a name.

`Registry.get("hqq")` imports `<package>.hqq` on first use, or loads the entry point `hqq` of the
group named like the package, so there is no central list, `import ptqc` stays cheap, and a
third-party plugin looks like a built-in.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from ptqc.errors import UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """A lazily filled table of one kind of plug-in.

    kind: what an entry is called in messages ("method").
    package: dotted package whose modules register themselves; also the entry-point group.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name`.

        Raises: ValueError if another object already has the name.
        """

        def file_under(entry: T) -> T:
            if self._entries.setdefault(name, entry) is not entry:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            return entry

        return file_under

    def names(self) -> list[str]:
        """Every name that `get` accepts, sorted: modules, entry points and direct registrations."""
        package = import_module(self.package)
        modules = {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
        return sorted(modules | set(entry_points(group=self.package).names) | set(self._entries))

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises: UnknownNameError naming the known ones.
        """
        if name not in self._entries:
            self._import(name)
        return self._entries[name]

    def name_of(self, entry: T) -> str:
        """The name that an entry is filed under; its own name if nobody registered it."""
        found = next((name for name, filed in self._entries.items() if filed is entry), None)
        return found or str(getattr(entry, "__name__", entry))

    def _import(self, name: str) -> None:
        known = self.names()
        if name not in known:
            raise UnknownNameError(f"no {self.kind} is called {name!r}; known: {', '.join(known)}")
        for entry_point in entry_points(group=self.package, name=name):
            self._entries.setdefault(name, entry_point.load())
            return
        import_module(f"{self.package}.{name}")
        if name not in self._entries:
            raise UnknownNameError(f"{self.package}.{name} registers no {self.kind} called {name!r}")
