"""configs/demo.py is the demo's recipe, to be run on any data set."""

import pathlib

from blip3o_jax.config import loader
from blip3o_jax.demo.recipe import recipe

FILE = str(pathlib.Path(__file__).parents[2] / "configs/demo.py")


def test_it_is_the_recipe_of_the_demo():
    assert loader.load_recipe(FILE) == recipe("", "runs/demo_cache")


def test_it_takes_a_data_set_and_a_change_of_one_stage():
    stages = loader.load_recipe(FILE, {"data.path": "photos.tar", "joint.steps": "7"})
    assert {stage.data.path for stage in stages.values()} == {"photos.tar"}
    assert stages["joint"].steps == 7 and stages["tokenizer"].steps > 7
