"""Train the demo's recipe by `blip3o train`: every part from random weights, on the embedded data
set or one of your own.

Command:
    blip3o data shapes --out=runs/shapes --image_size=48 --num_train=12000
    blip3o train --config=configs/demo.py --config.data.path=runs/shapes
Hardware: two CPU cores, no accelerator.
Duration: about 9 minutes, as for the same stages of `blip3o demo`.
Expected: the demo's score (README.md). Training samples nothing; `blip3o evaluate --suite=shapes`
    scores the checkpoint.
"""

from blip3o_jax import config
from blip3o_jax.demo import recipe as demo


def get_config() -> dict[str, config.Config]:
    return demo.recipe(data_dir="", cache_dir="runs/demo_cache")
