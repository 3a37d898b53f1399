"""Types of settings that several groups share."""

import typing
from typing import Annotated, Literal

from blip3o_jax.config.fields import Bounds, check

Dtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "full", "dots", "offload"]
REMAT: tuple[str, ...] = typing.get_args(Remat)
Part = Literal[
    "tokenizer",
    "text_tower",
    "ar",
    "connector",
    "dit",
    "vae",
    "patch_readout",
    "latent_connector",
    "feature_connector",
]
TableRows = Annotated[int, Bounds(1, 2**24)]  # of a vocabulary, of a codebook
BatchSize = Annotated[int, Bounds(1, 2**24)]


def check_heads(part: str, width: int, heads: int) -> None:
    check(
        width % heads == 0,
        f"{part}.hidden_size={width} must be a multiple of {part}.num_attention_heads={heads}",
    )
