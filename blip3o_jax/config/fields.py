"""Typed settings: bounds stand in a field's annotation, and one mechanism checks them.

A group of settings is a frozen dataclass that inherits `ConfigGroup`. A field's type says what it
may hold:

    steps: Annotated[int, Bounds(1, 10**9)] = 1000
    name: Literal["adamw", "muon"] = "adamw"
    clip: tuple[Positive, Positive] | None = None
    kwargs: Keywords = Keywords()

Values are checked when a group is constructed, in Python as from JSON or the command line. A number
that JSON or Python wrote as an integer becomes the float a field declares, a list becomes its
tuple; nothing else is converted. What concerns several fields at once is checked by the group's own
`__post_init__`, after `super().__post_init__()`. An annotation is walked once: `reader` turns it
into a function that checks values.
"""

import ast
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, TypeVar

from blip3o_jax.config.constraints import Constraint
from blip3o_jax.config.errors import (
    ConfigError,
    check,
    check_choice,
    correction,
    listed,
    nearest,
    not_a_choice,
    shown,
)

MODEL_TYPE = "model_type"  # the key that names a family, as config.json of transformers has it
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

Group = TypeVar("Group")


class Keywords(tuple[tuple[str, Any], ...]):
    """Hold keyword arguments of a library function: ((name, value), ...), given as a mapping or as
    pairs. Values are numbers, text, booleans, None, or tuples and mappings of these.
    """


# Returns a value as an annotation declares it, or raises ConfigError that names the dotted field.
Reader = Callable[[Any, str], Any]


class ConfigGroup:
    """Check every field of a frozen dataclass of settings against its annotation at construction.

    `path`: the path of the group in `Config` ("optimizer"), for messages about values given in
    Python. For a group with several places it is the last name alone; values that come through
    `from_dict` are always named in full.
    """

    group_path = ""

    def __init_subclass__(cls, path: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.group_path = path

    def __post_init__(self) -> None:
        cls: type = type(self)
        for name, read in _readers(cls).items():
            value = getattr(self, name)
            converted = read(value, join(self.group_path, name))
            if converted is not value:
                object.__setattr__(self, name, converted)


class PartConfig(ConfigGroup):
    """Define the base of settings of a part with several families, distinguished by their types.

    A direct subclass represents the part: it annotates the settings that all families have, and is
    the type of the field that holds the part's settings. A dataclass below it with a `model_type`
    is a family:

        class LanguageModelConfig(PartConfig, path="model.ar"): ...
        class Qwen3Config(LanguageModelConfig, path="model.ar", model_type="qwen3"): ...

    In JSON and on the command line the key `model_type` names the family; a group without it is of
    the first family that was declared.
    """

    model_type: ClassVar[str] = ""
    families: ClassVar[dict[str, type]] = {}
    # Every family is a dataclass, so a part's settings can be passed to `dataclasses.replace`.
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, path: str = "", model_type: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(path=path, **kwargs)
        if PartConfig in cls.__bases__:
            cls.families = {}
        if model_type:
            cls.model_type = model_type
            cls.families[model_type] = cls


def concrete(cls: type, model_type: Any = None, path: str = "") -> type:
    """Return the family of a part's base class that `model_type` names, the first one where it is
    None; any other group as it is. ConfigError for a name that is none of the part's.
    """
    if not issubclass(cls, PartConfig):
        return cls
    if model_type is None:
        return cls if cls.model_type else next(iter(cls.families.values()))
    choices = (cls.model_type,) if cls.model_type else tuple(cls.families)
    check(
        isinstance(model_type, str),
        f"{join(path, MODEL_TYPE)}={shown(model_type)} {not_a_choice(model_type, choices)}",
    )
    check_choice(join(path, MODEL_TYPE), model_type, choices)
    return cls.families[model_type]


def join(path: str, name: str) -> str:
    """Return the dotted name of field `name` of the group at `path`."""
    return f"{path}.{name}" if path else name


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return {field: annotation} of a group, constraints included."""
    cls = concrete(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_group(hint: Any) -> bool:
    """Return whether an annotation is a group of settings."""
    return isinstance(hint, type) and (
        dataclasses.is_dataclass(hint) or issubclass(hint, PartConfig)
    )


def unwrapped(hint: Any) -> tuple[Any, tuple[Constraint, ...], bool]:
    """Return (type, its constraints, whether None is allowed) of an annotation."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = (a for a in typing.get_args(hint) if a is not types.NoneType)
    if typing.get_origin(hint) is Annotated:
        hint, *constraints = typing.get_args(hint)
        return hint, tuple(constraints), optional
    return hint, (), optional


def from_dict(values: Any, cls: type[Group], path: str = "") -> Group:
    """Return the group `cls` with `values`, {field: value}; the others have their defaults.

    Raises ConfigError that names the field, by its dotted name from `path` on, for an unknown key
    (with the nearest valid one) and for a value that the field's annotation or the group refuses.
    """
    if hasattr(values, "to_dict"):
        values = values.to_dict()
    check(
        isinstance(values, dict),
        f"{path or 'config'} must be a group of fields, not {shown(values)}",
    )
    group: type = cls
    if issubclass(group, PartConfig):
        group = concrete(group, values.get(MODEL_TYPE), path)
        values = {key: value for key, value in values.items() if key != MODEL_TYPE}
    readers = _readers(group)
    for key in values:
        if key not in readers:
            raise unknown_key(key, group, path)
    read: Group = group(
        **{key: readers[key](value, join(path, key)) for key, value in values.items()}
    )
    return read


def unknown_key(key: Any, cls: type, path: str) -> ConfigError:
    """Return the error of a key that the group `cls` at `path` does not have. It names the fields
    of that name in the groups below, or the nearest field of the group, or the nearest below. A key
    that is no misspelling may mean something else: then the fields of the group are listed too.
    """
    name = key if isinstance(key, str) and key.isprintable() else shown(key)
    own = {field: [field] for field in field_types(cls)}
    below: dict[str, list[str]] = {}
    for field in _names_below(cls):
        below.setdefault(field.split(".")[-1], []).append(field)
    near = below.get(name, [])
    for names in (own, below):
        near = near or [field for other in nearest(name, names) for field in names[other]]
    hints = []
    if near:
        hints.append(f"did you mean {' or '.join(join(path, field) for field in near)}?")
    if name not in below and not correction(name, [*own, *below]):
        hints.append(f"{path or 'the config'} takes {listed(own)}")
    return ConfigError(f"unknown config key {join(path, name)}: {' '.join(hints)}")


def _names_below(cls: type) -> Iterator[str]:
    """Yield the dotted names of the fields of all groups below `cls`."""
    for name, hint in field_types(cls).items():
        if is_group(hint):
            yield from (join(name, field) for field in field_types(hint))
            yield from (join(name, field) for field in _names_below(hint))


def convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the annotation `hint` declares it; ConfigError that names `path` where it
    cannot be.
    """
    return reader(hint)(value, path)


@functools.cache
def _readers(cls: type) -> dict[str, Reader]:
    return {name: reader(hint) for name, hint in field_types(cls).items()}


@functools.cache
def reader(hint: Any) -> Reader:
    """Return the function that checks and converts values of the annotation `hint`."""
    kind, constraints, optional = unwrapped(hint)
    typed = _typed(kind)

    def read(value: Any, path: str) -> Any:
        if optional and value is None:
            return None
        value = typed(value, path)
        for constraint in constraints:
            if why := constraint.refusal(value):
                raise ConfigError(f"{path}={shown(value)} {why}")
        return value

    return read


def _typed(kind: Any) -> Reader:
    """Return the reader of a type without constraints."""
    if is_group(kind):
        return lambda value, path: (
            value if isinstance(value, kind) else from_dict(value, kind, path)
        )
    if kind is Keywords:
        return _keywords
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return _literal(typing.get_args(kind))
    if origin is tuple:
        return _tuple(typing.get_args(kind))
    return functools.partial(_scalar, kind)


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not right:
        raise ConfigError(f"{path}={shown(value)} must be of type {kind.__name__}")
    return value


def _literal(choices: tuple[Any, ...]) -> Reader:
    def read(value: Any, path: str) -> Any:
        # An unhashable or unequal type compares unequal; True is no 1.
        if not any(type(value) is type(a) and value == a for a in choices):
            raise ConfigError(f"{path}={shown(value)} {not_a_choice(value, choices)}")
        return value

    return read


def _tuple(args: tuple[Any, ...]) -> Reader:
    variadic = len(args) == 2 and args[1] is Ellipsis
    items = [reader(a) for a in args if a is not Ellipsis]

    def read(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={shown(value)} must be a list")
        if not variadic and len(value) != len(items):
            raise ConfigError(f"{path}={shown(value)} must hold {len(items)} values")
        readers = items * len(value) if variadic else items
        converted = tuple(
            item(v, f"{path}[{i}]") for i, (v, item) in enumerate(zip(value, readers, strict=True))
        )
        same = isinstance(value, tuple) and all(
            a is b for a, b in zip(value, converted, strict=True)
        )
        return value if isinstance(value, tuple) and same else converted

    return read


def _keywords(value: Any, path: str) -> Keywords:
    if type(value) is Keywords:
        return value
    plain = _plain(value, path)
    pairs = isinstance(plain, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in plain
    )
    if not pairs:
        raise ConfigError(f"{path}={shown(value)} must be {_KEYWORDS}")
    names = [name for name, _ in plain]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path} gives {shown(name)} twice")
    return Keywords(plain)


_KEYWORDS = "keyword arguments such as \"{'momentum': 0.9, 'nesterov': True}\""


def _plain(value: Any, path: str) -> Any:
    """Return a value with lists as tuples and mappings as tuples of pairs, so that it can be hashed
    and compared with itself as JSON brings it back.
    """
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, list | tuple):
        return tuple(_plain(item, path) for item in value)
    if value is not None and type(value) not in (bool, int, float, str):
        raise ConfigError(f"{path} holds {shown(value)}: its values are numbers, text or booleans")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} holds {value}, which is no finite number")
    return value


def parse(text: str, hint: Any, key: str) -> Any:
    """Return `text`, from a command line, as a value of the kind that the annotation `hint`
    declares.

    Tuples are written as Python literals. Raises ConfigError that names `key` for text that is no
    such value; whether it lies within the annotation's bounds, `convert` says.
    """
    kind, _, optional = unwrapped(hint)
    if optional and text.lower() == "none":
        return None
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        if kind in (int, float):
            return kind(text)
        value = ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise ConfigError(f"{key}={shown(text)} must be {_wanted(kind)}") from None
    return tuple(value) if isinstance(value, list) else value


def _wanted(kind: Any) -> str:
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return f"of type {kind.__name__}"
    if kind is Keywords:
        return _KEYWORDS
    inner, _, _ = unwrapped(typing.get_args(kind)[0])
    if is_group(inner):
        names = ", ".join(field_types(inner))
        return f"a list of groups such as \"[{{'path': 'a.tar'}}]\" (fields: {names})"
    example = {str: "('a', 'b')", int: "(16, 32)", float: "(0.2, 0.3)"}.get(inner, "((5,), ())")
    return f'a list such as "{example}"'
