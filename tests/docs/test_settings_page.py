"""Check that docs/settings.md explains every setting."""

import importlib.util
import re

from tests.docs.pages import ROOT

_spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/settings_page.py")
settings_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(settings_page)


def test_every_setting_has_a_sentence():
    groups = list(settings_page.groups())
    assert {"", "model.ar.lora", "data.sources", "rl.rollout"} <= {group.path for group in groups}
    for group in groups:
        for name in settings_page.field_types(group.cls):
            text = settings_page.descriptions(group.cls).get(name, "")
            place = f"{group.cls.__name__}.{name}"
            assert re.fullmatch("[A-Z`].*[.]", text), f"{place}: no sentence below it: {text!r}"


def test_a_setting_is_shown_with_type_bounds_default_and_text():
    page = settings_page.on_page_markdown((ROOT / "docs/settings.md").read_text("utf-8"))
    assert (
        "`rl.rollout.top_p`{ #rl.rollout.top_p } `float`, between 0 (excluded) and 1; 1 switches "
        "it off, default `1.0`\n:   Probability mass of"
    ) in page
    assert (
        "`model.ar.head_dim`{ #model.ar.head_dim } `int`, between 1 and 131,072, even: rotary "
        "embedding, default `128`"
    ) in page
    assert "## `model.dit` with `model_type=mmdit` { #model.dit-mmdit }" in page
    assert "[`data.sources`](#data.sources) tuple of elements (group), default `()`" in page
