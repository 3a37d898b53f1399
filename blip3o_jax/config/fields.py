"""Typed settings: bounds stand in a field's annotation, and one mechanism checks them.

A group of settings is a frozen dataclass that inherits `ConfigGroup`. A field's type says what it
may hold:

    steps: Annotated[int, Bounds(1, 10**9)] = 1000
    name: Literal["adamw", "muon"] = "adamw"
    clip: tuple[Positive, Positive] | None = None

Values are checked when a group is constructed, in Python as from JSON or the command line. A number
that JSON or Python wrote as an integer becomes the float a field declares, a list becomes its
tuple; nothing else is converted. What concerns several fields at once is checked by the group's own
`__post_init__`, after `super().__post_init__()`.
"""

import ast
import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Protocol

INT32 = 2**31 - 1
UINT32 = 2**32 - 1
_NAME_MAX = 255
_PATH_MAX = 4096
_SHOWN = 80  # characters of a value in a message
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UserError(ValueError):
    """What a user can cause and cure: one line that says what, where and what to do. The command
    prints it without a traceback; any other exception is a bug and keeps its traceback.
    """


class ConfigError(UserError):
    """A setting that cannot be used; the message names the field and says what to do."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raise ConfigError that names `field` unless `value` is one of `choices`."""
    choices = tuple(choices)
    check(value in choices, f"{field}={shown(value)} is not one of {', '.join(map(str, choices))}")


def escaped(text: str) -> str:
    """Return `text` with all that cannot be printed escaped, lone surrogates among them: a name
    from elsewhere may hold a line's end or a terminal's commands."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """Return `repr(value)` on one line, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, the exception's name where it has no
    message.
    """
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


class Constraint(Protocol):
    """What an annotation asks of a value beyond its type."""

    def refusal(self, value: Any) -> str:
        """Return what the value must be, as the end of a sentence, or "" where it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval of numbers. NaN lies in none; `note` says what a special value does."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    note: str = ""

    def refusal(self, value: float) -> str:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return ""
        left = f"{_number(self.low)} (excluded)" if self.open_low else _number(self.low)
        right = f"{_number(self.high)} (excluded)" if self.open_high else _number(self.high)
        note = f"; {self.note}" if self.note else ""
        return f"must lie between {left} and {right}{note}"


@dataclasses.dataclass(frozen=True)
class Length:
    """How many elements a tuple has."""

    low: int
    high: int

    def refusal(self, value: tuple[Any, ...]) -> str:
        if self.low <= len(value) <= self.high:
            return ""
        return f"must have {self.low} to {self.high} elements, not {len(value)}"


@dataclasses.dataclass(frozen=True)
class PathText:
    """Text that Linux takes as a path. Bytes that are not UTF-8 are allowed (surrogate escapes)."""

    def refusal(self, value: str) -> str:
        if "\0" in value:
            return "must be a path: it contains a NUL character"
        try:
            name = max((os.fsencode(name) for name in value.split("/")), key=len)
        except UnicodeEncodeError:
            return "must be a path: it contains a lone surrogate"
        if len(name) > _NAME_MAX or len(value) >= _PATH_MAX:
            return f"must be a path: at most {_PATH_MAX - 1} bytes, and {_NAME_MAX} in one name"
        return ""


@dataclasses.dataclass(frozen=True)
class UnicodeText:
    """Text that can be written as UTF-8: no lone surrogate, no NUL."""

    def refusal(self, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "must be text that UTF-8 can hold: it contains a lone surrogate"
        return "must be text: it contains a NUL character" if "\0" in value else ""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A regular expression."""

    def refusal(self, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            return f"must be a regular expression: {error}"
        return ""


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else str(value)
    return f"{value:g}"


# Aliases that several groups share. Upper bounds are beyond what any machine of today holds;
# whether a size fits this machine is asked later, with all sizes at hand (train/memory.py).
Count = Annotated[int, Bounds(0, INT32)]
PositiveInt = Annotated[int, Bounds(1, INT32)]
Seed = Annotated[int, Bounds(0, UINT32)]
Width = Annotated[int, Bounds(1, 2**17)]
Depth = Annotated[int, Bounds(1, 1024)]
Heads = Annotated[int, Bounds(1, 1024)]
Side = Annotated[int, Bounds(1, 2**14)]  # pixels, patches
Epsilon = Annotated[
    float, Bounds(1e-30, 1)
]  # a smaller one vanishes in float32, where 0 / 0 is left
Fraction = Annotated[float, Bounds(0, 1)]
Decay = Annotated[float, Bounds(0, 1, open_high=True)]
NonNegative = Annotated[float, Bounds(0, 1e6)]
Positive = Annotated[float, Bounds(1e-6, 1e6)]
Finite = Annotated[float, Bounds(-1e6, 1e6)]
Path = Annotated[str, PathText()]
Text = Annotated[str, UnicodeText()]
Regex = Annotated[str, UnicodeText(), Pattern()]


class ConfigGroup:
    """Base of a frozen dataclass of settings: checks every field against its annotation when it is
    constructed.

    `path`: where the group stands in `Config` ("optimizer"), for messages about values given in
    Python. A group that stands in several places has the last name alone; values that come through
    `from_dict` are named in full anywhere.
    """

    group_path = ""

    def __init_subclass__(cls, path: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.group_path = path

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            converted = convert(value, hints[field.name], join(self.group_path, field.name))
            if converted is not value:
                object.__setattr__(self, field.name, converted)


def join(path: str, name: str) -> str:
    """Return the dotted name of field `name` of the group at `path`."""
    return f"{path}.{name}" if path else name


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return {field: annotation} of a group, constraints included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def is_group(hint: Any) -> bool:
    """Return whether an annotation is a group of settings."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Return (type, its constraints, whether None is allowed) of an annotation."""
    optional = typing.get_origin(hint) in (types.UnionType, typing.Union)
    if optional:
        (hint,) = (a for a in typing.get_args(hint) if a is not types.NoneType)
    if typing.get_origin(hint) is Annotated:
        hint, *constraints = typing.get_args(hint)
        return hint, tuple(constraints), optional
    return hint, (), optional


def from_dict(values: Any, cls: Any, path: str = "") -> Any:
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
    hints = field_types(cls)
    for key in values:
        if key not in hints:
            name = key if isinstance(key, str) and key.isprintable() else shown(key)
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {join(path, near[0])}?" if near else f"it takes {', '.join(hints)}"
            )
            raise ConfigError(f"unknown config key {join(path, name)}: {hint}")
    return cls(
        **{key: convert(value, hints[key], join(path, key)) for key, value in values.items()}
    )


def convert(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the annotation `hint` declares it; ConfigError that names `path` where it
    cannot be.
    """
    kind, constraints, optional = unwrapped(hint)
    if optional and value is None:
        return None
    value = _typed(value, kind, path)
    for constraint in constraints:
        if why := constraint.refusal(value):
            raise ConfigError(f"{path}={shown(value)} {why}")
    return value


def _typed(value: Any, kind: Any, path: str) -> Any:
    if is_group(kind):
        return value if isinstance(value, kind) else from_dict(value, kind, path)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        # An unhashable or unequal type compares unequal; True is no 1.
        check(
            any(type(value) is type(a) and value == a for a in args),
            f"{path}={shown(value)} is not one of {choices(kind)}",
        )
        return value
    if origin is tuple:
        return _tuple(value, args, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    right = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    check(right, f"{path}={shown(value)} must be of type {kind.__name__}")
    return value


def choices(kind: Any) -> str:
    """Return the values of a Literal, as a message lists them; an empty text as ''."""
    return ", ".join(str(a) or "''" for a in typing.get_args(kind))


def _tuple(value: Any, args: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    check(isinstance(value, list | tuple), f"{path}={shown(value)} must be a list")
    if len(args) == 2 and args[1] is Ellipsis:
        kinds = (args[0],) * len(value)
    else:
        check(len(value) == len(args), f"{path}={shown(value)} must hold {len(args)} values")
        kinds = args
    converted = tuple(
        convert(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True))
    )
    same = isinstance(value, tuple) and all(a is b for a, b in zip(value, converted, strict=True))
    return value if same else converted


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
    inner, _, _ = unwrapped(typing.get_args(kind)[0])
    if is_group(inner):
        names = ", ".join(field_types(inner))
        return f"a list of groups such as \"[{{'path': 'a.tar'}}]\" (fields: {names})"
    example = {str: "('a', 'b')", int: "(16, 32)", float: "(0.2, 0.3)"}.get(inner, "((5,), ())")
    return f'a list such as "{example}"'
