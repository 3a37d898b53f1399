"""Check that the places that name the package's version agree."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_setup_changelog_and_citation_name_one_version():
    read = lambda name: (ROOT / name).read_text(encoding="utf-8")
    (version,) = re.findall(r'^    version="(\S+)",$', read("setup.py"), re.MULTILINE)
    headings = re.findall(r"^## (\S+)", read("docs/CHANGELOG.md"), re.MULTILINE)
    assert headings[0] in ("Unreleased", version)
    assert next(heading for heading in headings if heading != "Unreleased") == version
    assert re.findall(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE) == [version]
