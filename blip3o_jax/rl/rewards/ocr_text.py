"""Normalize the text that is asked for and the text that was read, so that only visible and
recognisable differences count.

    case, spaces, invisible characters      left out of the comparison
    forms of one character                  Unicode's NFKC: full-width letters, ligatures,
                                            fractions, superscripts
    characters of one look                  quotes, dashes, dots, slashes ... each become one of
                                            them (`_ALIKE`)
    accents                                 kept where the recogniser has the accented letter, else
                                            left out
    pictures and rare signs                 left out, on both sides: letters, digits and `_SIGNS`
                                            remain

The recogniser's list of characters (PP-OCR's, 18,708 of them) has Latin letters up to U+02AF, Greek
without accents, Chinese and Japanese. Other characters cannot be read.
"""

# ruff: noqa: RUF001  # this file maps characters that look alike

import re
import unicodedata

_SIGNS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_{|}~£€¥¢₩₹₽₿¿§°±÷·←↑→↓√∞≈≠≤≥¶†‡")
# What looks the same becomes the first; of dots and dashes any number above one is the same.
_ALIKE = {
    "'": "‘’‚‛′‵´`ʹʻʼʽˈˊˋ❛❜",
    '"': "“”„‟″‶«»《》〝〞〟ʺ˝❝❞",
    "-": "‐‑‒–—―−⁃˗─━ー一",
    "·": "•‣∙⋅‧・･",
    "...": "…⋯",
    ".": "。｡",
    ",": "、､",
    "/": "⁄∕╱",
    "x": "×✕✖✗✘╳",
    "*": "∗⁎⋆",
    "~": "∼˜〜",
    "|": "│┃¦ǀ",
    "<": "‹〈",
    ">": "›〉",
    "[": "【〔〖「『",
    "]": "】〕〗」』",
    "°": "º˚◦",
    "a": "ª",
    "oe": "œŒ",
    "ae": "æÆ",
    "i": "ı",
    "c": "©",
    "r": "®",
    "p": "℗",
    "?!": "‽",
}
_TABLE = {ord(char): form for form, chars in _ALIKE.items() for char in chars}
_LAST_WITH_ACCENTS = "\u02af"  # of the Latin letters in the recogniser's list
_SCRIPTS = ("LATIN", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC")


def normalise(text: str) -> str:
    """Return the form of `text` that is compared; "" where nothing of it can be."""
    # The table first: NFKC would turn the masculine ordinal sign into "o", and the acute accent
    # into a space and a combining accent.
    text = unicodedata.normalize("NFKC", text.translate(_TABLE))
    text = unicodedata.normalize("NFKC", text.casefold()).translate(_TABLE)
    text = "".join(map(_without_accent, text))
    text = "".join(char for char in text if char.isalnum() or char in _SIGNS)
    return re.sub(r"\.{2,}", "...", re.sub("-+", "-", text.replace("''", '"')))


def unreadable(text: str) -> str:
    """Return the letters and digits of `text` that the recogniser has no character for."""
    letters = (char for char in normalise(text) if char.isalnum() and not char.isascii())
    return "".join(char for char in letters if not unicodedata.name(char, "").startswith(_SCRIPTS))


def _without_accent(char: str) -> str:
    """Return the letter alone, where the recogniser's list lacks it with its accent."""
    if char <= _LAST_WITH_ACCENTS or not unicodedata.name(char, "").startswith(("LATIN", "GREEK")):
        return char
    return unicodedata.normalize("NFD", char)[0]
