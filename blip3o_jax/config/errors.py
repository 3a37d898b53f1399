"""Define the errors that a user can cause and fix, and format values and the nearest valid names
for their messages.
"""

import difflib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

_SHOWN = 80  # characters of a value in a message
_LISTED = 40  # valid values that a message lists
_GUESSES = 3  # nearest names in a message


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
    near = nearest(wrong, choices)
    return f"did you mean {' or '.join(map(form, near))}?" if near else ""


def nearest(wrong: Any, choices: Iterable[str]) -> list[str]:
    """Return the choice that `wrong` misspells, or else those that share its words; [] for none."""
    choices = list(choices)
    misspelt = correction(wrong, choices)
    return [misspelt] if misspelt else _of_same_words(wrong, choices)


def correction(wrong: Any, choices: Iterable[str]) -> str | None:
    """Return the choice that differs from `wrong` in a few letters only. Case does not matter."""
    if not isinstance(wrong, str):
        return None
    by_case = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(wrong.lower(), by_case, n=1, cutoff=0.75)
    return by_case[near[0]] if near else None


def _of_same_words(wrong: Any, choices: Iterable[str]) -> list[str]:
    """Return the choices that share words with `wrong`, the best first, or whose initials it is:
    "kl" for kl_coef, "num_inference_steps" for steps, "lr" for learning_rate. Where many do equally
    well none is returned, since it would be a guess.
    """
    given = _words(wrong) if isinstance(wrong, str) else []
    scores = {choice: _overlap(given, _words(choice)) for choice in choices}
    best = max(scores.values(), default=0.0)
    near = [c for c, score in scores.items() if score and score >= 0.75 * best]
    near.sort(key=lambda choice: -scores[choice])
    return near if len(near) <= _GUESSES else []


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+|[0-9]+", name.lower())


def _overlap(given: list[str], words: list[str]) -> float:
    """Return the Dice coefficient of two names' words. 0 where they have neither the first nor the
    last word of `words` in common: what is in the middle says little about a name.
    """
    if len(words) > 1 and given == ["".join(word[0] for word in words)]:
        return 1.0
    common = [any(_same_word(word, other) for other in given) for word in words]
    if not (common and (common[0] or common[-1])):
        return 0.0
    return 2 * sum(common) / (len(words) + len(given))


def _same_word(a: str, b: str) -> bool:
    """Return whether two words are equal, one begins with the other, or both begin alike
    ("accumulate", "accumulation").
    """
    shorter = min(len(a), len(b))
    return a == b or (shorter > 1 and a[: min(4, shorter)] == b[: min(4, shorter)])


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


def install_command(extra: str) -> str:
    """Return the command that installs an extra of setup.py: in a clone of the repository, which it
    names unless it is the present directory, or of an installed wheel.
    """
    clone = pathlib.Path(__file__).parents[2]
    if not (clone / "setup.py").is_file():
        return f"pip install 'blip3o_jax[{extra}]'"
    return f"pip install -e '{'.' if clone == pathlib.Path.cwd() else clone}[{extra}]'"


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
