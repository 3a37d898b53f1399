"""Types of settings that several groups share.

Upper bounds are beyond what any machine of today holds; whether a size fits this machine is asked
later, with all sizes at hand (train/memory.py).
"""

import typing
from typing import Annotated, Literal

from blip3o_jax.config.constraints import Bounds, PathText, Pattern, UnicodeText
from blip3o_jax.config.errors import check

INT32 = 2**31 - 1
UINT32 = 2**32 - 1

Count = Annotated[int, Bounds(0, INT32)]
PositiveInt = Annotated[int, Bounds(1, INT32)]
Seed = Annotated[int, Bounds(0, UINT32)]
Width = Annotated[int, Bounds(1, 2**17)]
Depth = Annotated[int, Bounds(1, 1024)]
Heads = Annotated[int, Bounds(1, 1024)]
Side = Annotated[int, Bounds(1, 2**14)]  # pixels, patches
# A smaller one vanishes in float32, where 0 / 0 is left.
Epsilon = Annotated[float, Bounds(1e-30, 1)]
Fraction = Annotated[float, Bounds(0, 1)]
Decay = Annotated[float, Bounds(0, 1, open_high=True)]
NonNegative = Annotated[float, Bounds(0, 1e6)]
Positive = Annotated[float, Bounds(1e-6, 1e6)]
Finite = Annotated[float, Bounds(-1e6, 1e6)]
Path = Annotated[str, PathText()]
Text = Annotated[str, UnicodeText()]
Regex = Annotated[str, UnicodeText(), Pattern()]
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
    """Raise ConfigError unless the attention heads of `part` divide its width evenly."""
    check(
        width % heads == 0,
        f"{part}.hidden_size={width} must be a multiple of {part}.num_attention_heads={heads}",
    )
