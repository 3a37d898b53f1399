"""The demo's recipe for `blip3o train`: every part from random weights, on the embedded data set or
one of your own.

Command:
    blip3o data shapes --out=runs/shapes --image_size=48 --num_train=12000
    blip3o train --config=configs/demo.py --config.data.path=runs/shapes
Hardware: two CPU cores, no accelerator.
Duration: about 9 minutes, those that `blip3o demo` spends on the same stages.
Expected: the demo's score, which README.md has; nothing is sampled here, which `blip3o evaluate --suite=shapes` does.
"""

from blip3o_jax import config
from blip3o_jax.demo import recipe as demo


def get_config() -> dict[str, config.Config]:
    return demo.recipe(data_dir="", cache_dir="runs/demo_cache")
