"""Check that the asked text and the text that is read have one form, within the recogniser's
characters."""

import pathlib
import string
import unicodedata

import pytest

from blip3o_jax.rl.rewards import ocr
from blip3o_jax.rl.rewards.ocr_text import _SIGNS, normalise, unreadable

# The characters of published prompt files (PartiPrompts, DrawBench, GenEval, TextCaps' and
# Flow-GRPO's lists of texts) beyond ASCII, and their relatives: what word processors, keyboards and
# translations write.
ALPHABET = (
    string.printable
    # quotes
    + "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f"
    + "\u2032\u2033\u00b4\u02bc\u00ab\u00bb\u2039\u203a"
    # dashes, dots, slash
    + "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2022\u00b7\u2026\u2025\u2044"
    # spaces and what is not seen
    + "\u00a0\u2002\u2003\u2009\u202f\u3000\u200b\u200c\u200d\u2060\ufeff\u00ad\ufe0f"
    # fractions, indices
    + "\u00bc\u00bd\u00be\u2153\u2154\u215b\u00b9\u00b2\u00b3\u2070\u2074\u2082\u207f"
    + "\ufb00\ufb01\ufb02\ufb03\ufb04\u0153\u0152\u00e6\u00c6\u00df\u1e9e\u0133\u0149"  # ligatures
    # mathematics
    + "\u00d7\u00f7\u00b1\u00b0\u00ba\u00aa\u2030\u2248\u2260\u2264\u2265\u221e\u221a\u03c0\u00b5"
    + "\u00a3\u20ac\u00a5\u00a2\u20b9\u20a9\u20bd\u20bf\u00a9\u00ae"
    + "\u2122\u2120\u2116\u00a7\u00b6\u2020\u2103\u203c\u203d"
    + "\u00bf\u00a1\u2190\u2192\u2191\u2193\u2605\u2606\u2713\u2714\u2764\u2665\u266a\u2600"
    + "\U0001f382\U0001f923\U0001f1fa\U0001f468"
    + "".join(chr(c) for c in range(0xC0, 0x250) if chr(c).isalpha())  # Latin letters with accents
    + "\u1ea1\u1ed3\u1ec7\u01b0\u01a1\u1e0d\u1e25\u1e63"  # Vietnamese and transcriptions
    + "".join(chr(c) for c in (*range(0x391, 0x3A2), *range(0x3A3, 0x3CF)))  # Greek
    + "".join(chr(c) for c in range(0xFF01, 0xFF5F))  # full-width
    + "\u3001\u3002\u300c\u300d\u30fb\u30fc\u301c\u2460\u2161\u30ab\uff76\u304c\u6f22\u5b57"
)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("It\u2019s", "it's"),
        ("rock \u2018n\u2019 roll", "ROCK 'N' ROLL"),
        ("say ''hi''", 'say "hi"'),
        ("1990\u20132000 \u2014 now", "1990-2000-now"),
        ("wait\u2026", "wait..."),
        ("\u00bd price", "1/2 PRICE"),
        ("\uff33\uff21\uff2c\uff25\uff01", "sale!"),
        ("o\ufb03ce \ufb02ower", "OFFICE FLOWER"),
        ("c\u0153ur \u00c6on stra\u00dfe", "coeur aeon STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("new\u00a0york\u200b co\u00adop", "newyorkcoop"),
        ("3 \u00d7 4", "3x4"),
        ("Acme\u2122 20\u00baC", "acmetm 20\u00b0c"),
        ("I \u2764\ufe0f NY \U0001f5fd", "i ny"),
        ("\u1ea1\u1ed3", "ao"),
        ("\u30ab\u3099", "\uff76\uff9e"),
    ],
)
def test_what_looks_the_same_is_equal(a, b):
    assert normalise(a) == normalise(b) != ""
    for scoring in (ocr.strict, ocr.reference):
        for read, asked in ((a, b), (b, a)):
            assert scoring([ocr.TextLine(read, 0.9, (0, 0, 1, 1))], [asked]).exact


@pytest.mark.parametrize(
    ("a", "b"),
    [("caf\u00e9", "cafe"), ("1", "l"), ("a.b", "a,b"), ("50%", "50"), ("\u304c", "\u304b")],
)
def test_what_looks_different_is_not(a, b):
    assert normalise(a) != normalise(b)


@pytest.fixture(scope="module")
def characters() -> frozenset[str]:
    """Return all characters of the recogniser, from the model inside rapidocr's wheel."""
    rapidocr, onnxruntime = pytest.importorskip("rapidocr"), pytest.importorskip("onnxruntime")
    [model] = pathlib.Path(rapidocr.__file__).parent.glob("models/*_rec_*.onnx")
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return frozenset("".join(session.get_modelmeta().custom_metadata_map["character"].split("\n")))


def test_the_form_of_every_character_can_be_read_or_is_nothing(characters):
    assert len(characters) > 10_000
    sayable = set("".join(map(normalise, characters)))
    assert sayable >= _SIGNS
    for char in ALPHABET:
        form = normalise(char)
        assert set(form) <= sayable, (
            f"{char!r} ({unicodedata.name(char, '?')}) becomes {form!r}, which is never read"
        )
        assert normalise(form) == form and not unreadable(char)


def test_letters_that_are_never_read_are_named():
    assert (
        unreadable("Cafe \u041a\u0410 \ud55c \u05d0 24 \u0663") == "\u043a\u0430\ud55c\u05d0\u0663"
    )
    assert unreadable("Caf\u00e9 \u6f22\u5b57 \u03a9 \u30ab\u30ca \u3072\u3089") == ""
