"""Check that damage of any kind is found and named."""

import json
import os
import re

import pytest

from blip3o_jax import checksums
from blip3o_jax.checksums import DamagedFile


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_crc32c_is_castagnolis():
    """Check the value of RFC 3720, and a file as its bytes."""
    assert checksums.crc32c([b"1234", b"56789"]) == 0xE3069283


def test_no_bit_of_a_json_file_flips_unseen(tmp_path):
    """Flip every bit, except those that do not change the value: a blank, the case of an
    exponent's e."""
    file, value = tmp_path / "a.json", {"rate": 1e-05, "names": ["a", None]}
    checksums.write_json(file, value)
    text = file.read_text()
    for bit in range(0, 8 * len(text), 3):
        flip(file, bit)
        try:
            assert checksums.read_json(file) == value
        except DamagedFile as error:
            assert str(error).startswith(f"{file} ") and "\n" not in str(error)
        file.write_text(text)


def test_a_file_that_people_edit(tmp_path):
    file = tmp_path / "config.json"
    checksums.write_json(file, {"a": 1})
    values = json.loads(file.read_text()) | {"a": 2}
    file.write_text(json.dumps(values))
    with pytest.raises(DamagedFile, match="if you have edited it, take out its 'crc32c'"):
        checksums.read_json(file, edited=True)
    del values["crc32c"]
    file.write_text(json.dumps(values))
    assert checksums.read_json(file, edited=True) == {"a": 2}
    with pytest.raises(DamagedFile, match="is damaged"):
        checksums.read_json(file)


def test_nesting_that_python_does_not_follow(tmp_path):
    (tmp_path / "a.json").write_text("[" * 10**5)
    with pytest.raises(DamagedFile, match="cannot be read as JSON"):
        checksums.read_json(tmp_path / "a.json")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def naming(name, size=0):
    return lambda file: checksums.write_json(file, {"files": {name: [size, 0]}})


def listing(value):
    return lambda file: checksums.write_json(file, {"files": {"two": value}})


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("a/one", lambda file: flip(file, 3), r"a/one has CRC32C \w{8}, not \w{8}"),
        ("a/one", truncate, "a/one has 2 bytes, not 3"),
        ("two", lambda file: file.unlink(), "two is missing"),
        ("manifest.json", lambda file: file.unlink(), "manifest.json is missing"),
        ("manifest.json", lambda file: file.write_text("{}"), r"manifest.json is damaged .*"),
        (
            "manifest.json",
            lambda file: checksums.write_json(file, {}),
            "manifest.json lists no files",
        ),
        (
            "manifest.json",
            lambda file: checksums.write_json(file, {"files": [1]}),
            "manifest.json lists no files",
        ),
        ("manifest.json", naming("two", "x"), "manifest.json has no size and CRC32C of 'two'"),
        ("manifest.json", naming("two", "1"), "manifest.json has no size and CRC32C of 'two'"),
        ("manifest.json", naming("two", -1), "manifest.json has no size and CRC32C of 'two'"),
        (
            "manifest.json",
            naming("two", float("inf")),
            "manifest.json has no size and CRC32C of 'two'",
        ),
        ("manifest.json", listing("xy"), "manifest.json has no size and CRC32C of 'two'"),
        ("manifest.json", listing([1]), "manifest.json has no size and CRC32C of 'two'"),
        (
            "manifest.json",
            naming("a\ud800"),
            r"manifest.json names 'a\\ud800', which is no file's name",
        ),
        (
            "manifest.json",
            naming("a\n\x1b[1m"),
            r"manifest.json names 'a\\n\\x1b\[1m', which is no file's name",
        ),
        ("manifest.json", pipe, "manifest.json is no regular file"),
        (
            "manifest.json",
            naming("/dev/null"),
            "manifest.json names '/dev/null', which is not below it",
        ),
        (
            "manifest.json",
            naming("a/../../x"),
            r"manifest.json names 'a/\.\./\.\./x', which is not below it",
        ),
        ("manifest.json", naming("x\0"), r"manifest.json names 'x\\x00', which is not below it"),
        ("two", pipe, "two is no regular file"),
        ("a/x\n", lambda file: file.write_text(""), r"a/x\\n is not listed in manifest.json"),
    ],
)
def test_a_manifest_finds_what_is_wrong(tmp_path, name, spoil, reason):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"")
    checksums.write_manifest(tmp_path)
    (tmp_path / "a" / ".nfs0001").touch()
    assert checksums.find_damage(tmp_path, required=["a/one"]) == ""
    assert (
        checksums.find_damage(tmp_path, required=["three"]) == "manifest.json does not list three"
    )
    spoil(tmp_path / name)
    shares = [checksums.find_damage(tmp_path, share, 2) for share in range(2)]
    found = [text for text in shares if text]
    # Of several hosts the one whose share it is finds it; without a manifest all do.
    assert len(found) == (2 if name == "manifest.json" else 1)
    assert re.fullmatch(reason, found[0]), found
    assert checksums.find_damage(tmp_path) == found[0]
