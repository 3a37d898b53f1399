"""BLIP3o-NEXT, native image generation, in JAX: `blip3o_jax.load(DIR).generate(["a red circle"],
seed=0)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip3o_jax.pipeline import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line answers without importing jax.
    if name == "load":
        from blip3o_jax.pipeline import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
