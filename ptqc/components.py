"""From what a user writes for a method to transforms and a method, every one with its options set.

    "gptq", GPTQ(damp=0.02)                     one method
    "awq", AWQ(grid=10)                         one transform, and the method that it is made for
    ["smoothquant", "gptq"], "smoothquant+gptq"     transforms in order, then one method
    {"name": "smoothquant", "alpha": 0.8}       a name with options, wherever a name may stand

A method may bring transforms of its own (`brings`); they go first unless they are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from ptqc.act_spec import ActSpec
from ptqc.errors import PtqcError, UnknownNameError, first_line
from ptqc.methods import METHODS, Method
from ptqc.option_types import wrong_option
from ptqc.registry import Registry
from ptqc.transforms import TRANSFORMS, Transform

__all__ = ["Chain", "Component", "chain", "describe", "entries", "name_of"]

Component = str | Method | Transform | Mapping[str, Any]
"""One of them as a user writes it."""

_AUTO = 'auto chooses a recipe by what calibration data shows: ptqc.quantize(model, "auto", bits=3.5, calibration=...)'


@dataclass(frozen=True)
class Chain:
    """Transforms, then the method. group, activation: what the last transform asks of a method it chose itself."""

    transforms: tuple[Transform, ...]
    method: Method
    group: int | None = None
    activation: ActSpec | None = None


@dataclass(frozen=True)
class _Draft:
    """A component on its way: `made` if the user configured it, else a kind with options."""

    name: str
    kind: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    made: Any = None

    @property
    def is_transform(self) -> bool:
        return isinstance(self.kind, type) and issubclass(self.kind, Transform)

    @property
    def known(self) -> set[str]:
        """Options that can still be set."""
        return set() if self.made is not None else {entry.name for entry in fields(self.kind)}

    def make(self) -> Any:
        if self.made is not None:
            return self.made
        found = self._tried(self.options)
        if not isinstance(found, Exception):
            return found
        culprit = next((name for name in self.options if not isinstance(self._without(name), Exception)), None)
        if not isinstance(found, PtqcError):
            found = PtqcError(f"{_kind(self)} cannot be made with {dict(self.options)!r}: {first_line(found)}")
        raise found if culprit is None else _about(found, self, culprit)

    def _tried(self, options: Mapping[str, Any]) -> Any:
        """The component, or the error that it raises."""
        try:
            return self.kind(**options)
        except (TypeError, ValueError, PtqcError) as error:
            return error

    def _without(self, option: str) -> Any:
        return self._tried({name: value for name, value in self.options.items() if name != option})


def chain(method: Component | Sequence[Component], options: Mapping[str, Any] | None = None) -> Chain:
    """Read what a user wrote. options: each goes to the component that knows it.

    Raises: UnknownNameError; PtqcError for an order that cannot be, or an option that none or several know.
    """
    drafts = _in_order([draft for entry in entries(method) for draft in _drafts(entry)])
    first = drafts[0] if len(drafts) == 1 else None
    last, group, activation = drafts[-1], None, None
    if last.is_transform:
        drafts.append(_default_method(last))
        group = getattr(last.kind, "default_group", None)
        activation = getattr(last.kind, "default_activation", None)
    drafts = [*_brought(drafts), *drafts]
    made = [draft.make() for draft in _with_options(drafts, first, options or {})]
    return Chain(tuple(made[:-1]), made[-1], group, activation)


def entries(method: Component | Sequence[Component]) -> list[Component]:
    """What a user wrote, one or several, as a list."""
    return list(method) if isinstance(method, (list, tuple)) else [method]  # type: ignore[list-item]


def _drafts(entry: Component) -> list[_Draft]:
    if isinstance(entry, str):
        return [_named(name.strip(), {}) for name in entry.split("+")]
    if isinstance(entry, Mapping):
        options = dict(entry)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise PtqcError(f'a method with options is written {{"name": "gptq", ...}}, not {dict(entry)!r}')
        draft = _named(name, {})
        return [_set(draft, options)]
    if isinstance(entry, type) or not (isinstance(entry, Transform) or hasattr(entry, "choose")):
        raise PtqcError(f"{entry!r} is neither a name nor a configured method or transform, such as GPTQ(damp=0.02)")
    return [_Draft(type(entry).__name__, type(entry), made=entry)]


def _named(name: str, options: Mapping[str, Any]) -> _Draft:
    registries: tuple[Registry[Any], ...] = (METHODS, TRANSFORMS)
    for registry in registries:
        if name in registry.names():
            return _Draft(name, registry.get(name), options)
    if name == "auto":
        raise PtqcError(_AUTO)
    methods, transforms = ", ".join(METHODS.names()), ", ".join(TRANSFORMS.names())
    raise UnknownNameError(f"no method is called {name!r}; known: {methods}; transforms: {transforms or 'none'}")


def _set(draft: _Draft, options: Mapping[str, Any]) -> _Draft:
    unknown = sorted(map(str, set(options) - draft.known))
    if unknown:
        text = f"{_kind(draft)} has no option {', '.join(unknown)}; known: {_known(draft)}"
        raise _about(PtqcError(text), draft, unknown[0])
    wrong = wrong_option(draft.kind, options)
    if wrong is not None:
        raise _about(PtqcError(f"{_kind(draft)}: {wrong[1]}"), draft, wrong[0])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}  # from files
    return _Draft(draft.name, draft.kind, {**draft.options, **given}, draft.made)


def _about(error: PtqcError, draft: _Draft, option: str) -> PtqcError:
    """An error that says which option it is about."""
    error.option = (draft.name, option)
    return error


def _kind(draft: _Draft) -> str:
    return f"{'transform' if draft.is_transform else 'method'} {draft.name!r}"


def _known(draft: _Draft) -> str:
    return ", ".join(sorted(draft.known)) or "none"


def _in_order(drafts: list[_Draft]) -> list[_Draft]:
    """The same drafts, held to: transforms first, each once, then at most one method."""
    if not drafts:
        raise PtqcError('name a method, as in "gptq", or transforms and a method, as in ["smoothquant", "gptq"]')
    early = next((draft for draft in drafts[:-1] if not draft.is_transform), None)
    if early is not None:
        rest = ", ".join(draft.name for draft in drafts[drafts.index(early) + 1 :])
        raise PtqcError(f"{early.name} chooses the codes and goes last, but {rest} follows; transforms come first")
    twice = next((draft for draft in drafts if sum(other.kind is draft.kind for other in drafts) > 1), None)
    if twice is not None:
        raise PtqcError(f"{twice.name} is named twice; once is enough")
    return drafts


def _default_method(transform: _Draft) -> _Draft:
    method = _named(getattr(transform.kind, "default_method", "rtn"), {})
    return _set(method, getattr(transform.kind, "default_options", {}))


def _brought(drafts: Sequence[_Draft]) -> list[_Draft]:
    """The transforms that the method brings and nobody gave."""
    given = {draft.kind for draft in drafts}
    brought = []
    for entry in getattr(drafts[-1].kind, "brings", ()):
        name, options = (entry, {}) if isinstance(entry, str) else entry
        draft = _set(_named(name, {}), options)
        if draft.kind not in given:
            brought.append(draft)
    return brought


def _with_options(drafts: Sequence[_Draft], first: _Draft | None, options: Mapping[str, Any]) -> list[_Draft]:
    """Hand out the options, each to the one component that knows it. first: asked before the others, if not None."""
    if options and all(draft.made is not None for draft in drafts):
        raise PtqcError(f"{drafts[-1].name} is already configured; options {sorted(options)} do not apply")
    given: dict[str, dict[str, Any]] = {draft.name: {} for draft in drafts}
    for option, value in options.items():
        takers = [draft for draft in drafts if option in draft.known]
        takers = [first] if first in takers and first is not None else takers
        if len(takers) != 1:
            raise _about(PtqcError(_no_taker(option, takers, drafts)), drafts[-1], str(option))
        given[takers[0].name][option] = value
    return [_set(draft, given[draft.name]) for draft in drafts]


def _no_taker(option: str, takers: Sequence[_Draft], drafts: Sequence[_Draft]) -> str:
    if takers:
        names = " and ".join(draft.name for draft in takers)
        return f'{names} both have an option {option}; write {{"name": {takers[0].name!r}, "{option}": ...}} for one'
    if len(drafts) == 1:
        return f"{_kind(drafts[0])} has no option {option}; known: {_known(drafts[0])}"
    return f"no option is called {option}; " + "; ".join(f"{_kind(draft)} knows {_known(draft)}" for draft in drafts)


def name_of(component: Method | Transform) -> str:
    """The name under which a component is registered, else that of its class."""
    registry: Registry[Any] = TRANSFORMS if isinstance(component, Transform) else METHODS
    return registry.name_of(type(component))


def describe(component: Method | Transform) -> dict[str, Any]:
    """A component as a mapping of plain values that `chain` reads: its name, and options other than the default."""
    described: dict[str, Any] = {"name": name_of(component)}
    options: tuple[Field[Any], ...] = fields(component) if is_dataclass(component) else ()
    for entry in options:
        value = getattr(component, entry.name)
        usual: Any = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if value != usual:
            described[entry.name] = _plain(value)
    return described


def _plain(value: Any) -> Any:
    """What files can hold: lists for tuples, and text for what is none of numbers, texts, lists and mappings."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
