"""Members of tar shards: which record each belongs to, what is refused, what is counted."""

import io
import json
import pathlib
import re
import tarfile

import pytest

from blip3o_jax.config import SourceConfig, UserError
from blip3o_jax.data.record import BadRecord, Source
from blip3o_jax.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: pathlib.Path, *members: tuple, **options: object) -> pathlib.Path:
    """Write a tar of (name, data) or (name, data, fields of TarInfo)."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data, *rest in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in (rest[0] if rest else {}).items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(path: pathlib.Path) -> Source:
    return open_source(SourceConfig(str(path)))


def pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", f"picture {key}".encode()), (f"{key}.txt", f"caption {key}".encode())]


@pytest.mark.parametrize("second", ["b.png", "b.PNG", "b.txt", "b.cls"])
def test_two_members_of_one_name_are_refused(tmp_path: pathlib.Path, second: str) -> None:
    path = write(
        tmp_path / "a.tar", *pair("a"), *pair("b"), ("b.cls", b"1"), (second, b"of another export")
    )
    with pytest.raises(
        UserError,
        match=rf"^{re.escape(str(path))}: two members are called {second}: .* a shard each",
    ):
        opened(path)


def test_every_member_is_used_or_counted(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path / "a.tar",
        ("pictures", b"", {"type": tarfile.DIRTYPE}),
        *pair("pictures/v1.0/a"),
        *pair("b" * 300),  # a name of its own extended header
        ("b" * 300 + ".json", b"{}"),
        ("c.png", b"", {"type": tarfile.LNKTYPE, "linkname": "pictures/v1.0/a.png"}),
        ("c.txt", b"caption c"),
        ("c.webp", b"another"),
        ("d.png", b"", {"type": tarfile.LNKTYPE, "linkname": "elsewhere.png"}),
        ("d.txt", b"caption d"),
        ("e.png", b"", {"type": tarfile.SYMTYPE, "linkname": "c.png"}),
        ("f.png", b"1234", {"pax_headers": {"GNU.sparse.map": "0,4", "GNU.sparse.size": "9000"}}),
        ("g.png", b"", {"type": tarfile.FIFOTYPE}),
        ("h.cls", b"7"),
        ("h.b.png", b"what follows the first dot"),
        ("README", b"read"),
        (".DS_Store", b"x"),
        ("i.png", b""),
        ("i.txt", b"caption i"),
    )
    with path.open("ab") as file:
        file.write(b"signed by nobody")
    source = opened(path)
    records = [source[n] for n in (0, 1, 2, 4)]
    assert [record.key for record in records] == ["pictures/v1.0/a", "b" * 300, "c", "i"]
    assert [record.caption for record in records[::2]] == ["caption pictures/v1.0/a", "caption c"]
    assert records[2].image == records[0].image == b"picture pictures/v1.0/a", (
        "a hard link has the bytes of its target"
    )
    with pytest.raises(BadRecord, match="d: no image"):
        source[3]
    assert source.unused == {
        "directory": 1,
        "json_with_txt": 1,
        "second_image": 1,
        "link": 2,
        "sparse": 1,
        "special": 1,
        "unknown_suffix": 2,
        "no_key": 2,
        "after_end": 1,
    }
    assert (len(source), source.incomplete) == (5, 2)
    unused, incomplete = source.notes
    assert unused.startswith(f"{path}: 12 members not used: ")
    assert f"2 of unknown suffix (h.cls first in {path})" in unused
    assert incomplete == (
        f"{path}: 2 of 5 records incomplete: 1 with an empty image (i first in {path}), "
        f"1 without an image (d first in {path})"
    )
    again = opened(path)
    assert (again.notes, again.unused) == (source.notes, source.unused), "the index knows it too"


def test_names_that_are_not_utf8(tmp_path: pathlib.Path) -> None:
    options = {"format": tarfile.USTAR_FORMAT, "encoding": "latin-1"}
    source = opened(write(tmp_path / "a.tar", *pair("caf\xe9\n"), *pair("b"), **options))
    record = source[0]
    assert (record.key, record.image) == (r"caf\xe9\n", "picture caf\xe9\n".encode())
    assert json.dumps(record.key).isascii() and source[1].key == "b" and not source.notes


def test_an_archive_behind_the_end_of_another_is_refused(tmp_path: pathlib.Path) -> None:
    first, second = (write(tmp_path / f"{key}.tar", *pair(key)).read_bytes() for key in "ab")
    path = tmp_path / "both.tar"
    path.write_bytes(first + second)
    with pytest.raises(
        UserError, match=rf"both.tar: another archive begins at byte {len(first)}, .* as a shard"
    ):
        opened(path)


def test_members_of_a_record_need_not_be_neighbours(tmp_path: pathlib.Path) -> None:
    (a_png, a_txt), (b_png, b_txt) = pair("a"), pair("b")
    source = opened(write(tmp_path / "a.tar", a_png, b_png, b_txt, a_txt))
    assert [(source[n].key, source[n].caption) for n in range(2)] == [
        ("a", "caption a"),
        ("b", "caption b"),
    ]


def test_headers_that_lead_back_or_never_end_are_refused(tmp_path: pathlib.Path) -> None:
    raw = write(tmp_path / "a.tar", *pair("a"), *pair("b")).read_bytes()
    last = raw.index(b"b.txt")
    header = bytearray(raw[last : last + tarfile.BLOCKSIZE])
    header[124:136] = (256**12 - tarfile.BLOCKSIZE).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    back = raw[:last] + header + raw[last + tarfile.BLOCKSIZE :]
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    chain = (info.tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(tarfile.BLOCKSIZE - 1)) * 3000
    for name, data, at in [("back.tar", back, last), ("chain.tar", raw[:last] + chain, last)]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}: cut off or damaged at byte {at} "):
            opened(tmp_path / name)
    (tmp_path / "first.tar").write_bytes(chain)
    with pytest.raises(
        UserError, match=r"first.tar: not a tar file .*; the headers before its first"
    ):
        opened(tmp_path / "first.tar")
