"""Train on captioned pictures of your own, from random weights; everything follows from the
pictures and the devices.

Command:
    blip3o demo --config=configs/own.py:photos --workdir=runs/photos
    blip3o sample --checkpoint=runs/photos/train --prompt="a red bicycle" --out=samples
    The argument is the data set: a folder, tar, parquet file or any other of docs/data.md. `blip3o
    train` takes it too and leaves the report out.
Hardware: a CPU or one accelerator. docs/how_to/own_images.md says how many pictures it takes.
Duration: within 15 minutes on two quiet CPU cores.
Expected: a page, runs/photos/report.html, with the sample of each held-out caption, its own picture
    and the nearest training picture, and the losses of held-out pictures along the training.
"""

from blip3o_jax import config
from blip3o_jax.demo import own


def get_config(path: str) -> dict[str, config.Config]:
    return own.recipe(path)
