"""configs/instruct.py, with and without questions about images."""

import pathlib

import pytest

from blip3o_jax.config import ConfigError, loader

FILE = str(pathlib.Path(__file__).parents[2] / "configs/instruct.py")


def test_a_place_for_an_image_where_it_learns_to_understand():
    plain, more = (loader.load(f"{FILE}:1.7b{tasks}") for tasks in ("", ":understand"))
    assert (plain.model.editing.reference_slots, more.model.editing.reference_slots) == (0, 1)
    assert more.data == plain.data
    with pytest.raises(ConfigError, match="tasks='edit' is not one of"):
        loader.load(f"{FILE}:1.7b:edit")
