"""The demo's recipe for `blip3o train`: every part from random weights, on the embedded data set or one of your own.

Command:
    blip3o data shapes --out=runs/shapes --image_size=48
    blip3o train --config=configs/demo.py --config.data.path=runs/shapes
Hardware: two CPU cores, no accelerator.
Duration: 10 minutes for the stages of `blip3o demo`, which draws the data, runs this recipe, samples and scores in one command.
Expected: 75 % of the held-out prompts of the shapes set drawn as asked (README.md).
"""

from blip3o_jax import config
from blip3o_jax.demo import recipe as demo


def get_config() -> dict[str, config.Config]:
    return demo.recipe(data_dir="", cache_dir="runs/demo_cache")
