"""Define the constraints that a setting's annotation can put on its value beyond its type."""

import dataclasses
import itertools
import math
import os
import re
from typing import Any, ClassVar, Protocol

_NAME_MAX = 255
_PATH_MAX = 4096


class Constraint(Protocol):
    """Constrain a value beyond its type."""

    @property
    def rule(self) -> str:
        """Return what the value must be, in words after the type's name ("between 0 and 1")."""
        ...

    def refusal(self, value: Any) -> str:
        """Return what the value must be, as the end of a sentence, or "" where it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Require a number in an interval; NaN is in none. `note` says what a special value does."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    note: str = ""

    @property
    def rule(self) -> str:
        left = f"{_number(self.low)} (excluded)" if self.open_low else _number(self.low)
        right = f"{_number(self.high)} (excluded)" if self.open_high else _number(self.high)
        note = f"; {self.note}" if self.note else ""
        return f"between {left} and {right}{note}"

    def refusal(self, value: float) -> str:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return "" if above and below else f"must lie {self.rule}"


@dataclasses.dataclass(frozen=True)
class NonZero:
    """Require a number other than 0; `note` says why."""

    note: str = ""

    @property
    def rule(self) -> str:
        return f"not 0{self.note and f': {self.note}'}"

    def refusal(self, value: float) -> str:
        return "" if value else f"must not be 0{self.note and f': {self.note}'}"


@dataclasses.dataclass(frozen=True)
class Multiple:
    """Require a multiple of `of`; `note` says why."""

    of: int
    note: str = ""

    @property
    def rule(self) -> str:
        what = "even" if self.of == 2 else f"a multiple of {self.of}"
        return f"{what}{self.note and f': {self.note}'}"

    def refusal(self, value: int) -> str:
        return "" if value % self.of == 0 else f"must be {self.rule}"


@dataclasses.dataclass(frozen=True)
class Odd:
    """Require an odd number; `note` says why."""

    note: str = ""

    @property
    def rule(self) -> str:
        return f"odd{self.note and f': {self.note}'}"

    def refusal(self, value: int) -> str:
        return "" if value % 2 else f"must be {self.rule}"


@dataclasses.dataclass(frozen=True)
class Square:
    """Require the square of a whole number."""

    rule: ClassVar[str] = "a square number"

    def refusal(self, value: int) -> str:
        return "" if math.isqrt(value) ** 2 == value else f"must be {self.rule}"


@dataclasses.dataclass(frozen=True)
class Length:
    """Require a number of elements of a tuple."""

    low: int
    high: int

    @property
    def rule(self) -> str:
        return f"{self.low} to {self.high:,} elements"

    def refusal(self, value: tuple[Any, ...]) -> str:
        if self.low <= len(value) <= self.high:
            return ""
        return f"must have {self.rule}, not {len(value)}"


@dataclasses.dataclass(frozen=True)
class Unique:
    """Require a tuple without two equal elements."""

    rule: ClassVar[str] = "no element twice"

    def refusal(self, value: tuple[Any, ...]) -> str:
        twice = next((a for i, a in enumerate(value) if a in value[:i]), None)
        return "" if twice is None else f"must not hold {twice} twice"


@dataclasses.dataclass(frozen=True)
class Increasing:
    """Require a tuple of increasing numbers."""

    rule: ClassVar[str] = "(low, high), the first below the second"

    def refusal(self, value: tuple[float, ...]) -> str:
        rises = all(a < b for a, b in itertools.pairwise(value))
        return "" if rises else f"must be {self.rule}"


@dataclasses.dataclass(frozen=True)
class PathText:
    """Require text that Linux accepts as a path. Bytes that are not UTF-8 are allowed (surrogate
    escapes).
    """

    rule: ClassVar[str] = "a path"

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
    """Require text that can be written as UTF-8: no lone surrogate, no NUL."""

    rule: ClassVar[str] = ""

    def refusal(self, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "must be text that UTF-8 can hold: it contains a lone surrogate"
        return "must be text: it contains a NUL character" if "\0" in value else ""


@dataclasses.dataclass(frozen=True)
class Placeholder:
    """Require text with `name` in it; `meaning` says what replaces it, `once` whether it may occur
    only once.
    """

    name: str
    meaning: str
    once: bool = False

    @property
    def rule(self) -> str:
        return f"with {self.name}{' once' * self.once}, where {self.meaning} stands"

    def refusal(self, value: str) -> str:
        found = value.count(self.name)
        if found == 1 or (found and not self.once):
            return ""
        return f"must have {self.rule.removeprefix('with ')}"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Require a regular expression."""

    rule: ClassVar[str] = "a regular expression"

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
