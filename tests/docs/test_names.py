"""Check that the files and settings named in pages, docstrings and comments exist."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT, titled
from tests.docs.test_settings_page import settings_page

# A directory may be left out of a file's name next to another file of the same directory.
SOURCE_FILES = {path.name for path in ROOT.rglob("*.py")}
SOURCES = sorted(path for path in ROOT.joinpath("blip3o_jax").rglob("*.py"))
# Files of other projects, and names that stand for any file.
FOREIGN = {"photos.py", "xla_flags_library.py", "file.py"}
SETTINGS = {
    settings_page.join(group.path, name)
    for group in settings_page.groups()
    for name in settings_page.field_types(group.cls)
}
# Groups whose names begin nothing but settings. Tensors and Python names begin with "model." too.
GROUPS = sorted({name.rpartition(".")[0] for name in SETTINGS} - {"", "model"})


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_that_is_named_exists(path):
    text = path.read_text("utf-8")
    written = set(titled(path)) if path.suffix == ".md" else set()  # files of a worked example
    for match in re.finditer(r"(?<![\w.:/-])[a-z_][a-z_0-9/]*\.py\b", text):
        name = match[0]
        places = (ROOT, ROOT / "blip3o_jax", path.parent, path.parent.parent)
        if "/" not in name:
            found = name in SOURCE_FILES
        else:
            found = any((place / name).is_file() for place in places)
        line = text.count("\n", 0, match.start()) + 1
        assert found or name in written | FOREIGN, f"{path.relative_to(ROOT)}:{line}: no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_setting_that_is_named_exists(page):
    text = page.read_text("utf-8").partition("### Renamed settings")[0]
    for name in re.findall(rf"`((?:{'|'.join(map(re.escape, GROUPS))})\.[a-z_0-9.]+)`", text):
        assert name in SETTINGS or name in GROUPS, f"{page.name}: no setting {name}"
