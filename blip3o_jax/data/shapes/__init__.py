"""Provide the embedded data set: rendered scenes with captions, held-out combinations, a scorer.

`vocabulary` (words, held-out rule) -> `scene` (what is where) -> `draw` (pixels) and `captions`
(words) -> `builder` (a TFDS data set); `detect` (pixels -> objects) -> `scorer` (objects against a
prompt).
"""

from blip3o_jax.data.shapes.captions import describe, prompts
from blip3o_jax.data.shapes.draw import render
from blip3o_jax.data.shapes.scene import sample
from blip3o_jax.data.shapes.scorer import ScoreResult, score

__all__ = ["ScoreResult", "describe", "prompts", "render", "sample", "score"]
