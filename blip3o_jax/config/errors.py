"""Define the errors that a user can cause and fix, and format values and the nearest valid names
for their messages.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

_SHOWN = 80  # characters of a value in a message
_LISTED = 40  # valid values that a message lists


class UserError(ValueError):
    """Report an error that a user can cause and fix, in one line that says what, where and what to
    do. The command prints it without a traceback; any other exception is a bug and keeps its
    traceback.
    """


class ConfigError(UserError):
    """Report a setting that cannot be used; the message names the field and says what to do."""


def check(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ConfigError that names `field` and the nearest choice unless `value` is a choice."""
    valid = tuple(choices)
    if value not in valid:
        raise ConfigError(f"{field}={shown(value)} {not_a_choice(value, valid)}")


def not_a_choice(value: Any, choices: Iterable[Any]) -> str:
    """Return the end of a sentence whose subject is `value`: it "is not one of A, B", with the
    nearest of them where one is near.
    """
    names = [str(choice) or "''" for choice in choices]
    near = did_you_mean(value, names)
    return f"is not one of {listed(names)}" + (f"; {near}" if near else "")


def listed(names: Iterable[str]) -> str:
    """Return the names with commas between, the first ones alone where they are many."""
    names = list(names)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def did_you_mean(wrong: Any, choices: Iterable[str], form: Callable[[str], str] = str) -> str:
    """Return "did you mean NEAREST?", or "" where no choice is near. Case does not matter.

    `form`: how the message writes a choice.
    """
    if not isinstance(wrong, str):
        return ""
    by_case = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(wrong.lower(), by_case, n=1, cutoff=0.5)
    return f"did you mean {form(by_case[near[0]])}?" if near else ""


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


def type_and_line(error: BaseException) -> str:
    """Return an exception's name and the first line of its message, where it has one."""
    kind = type(error).__name__
    line = first_line(error)
    return kind if line == kind else f"{kind}: {line}"
