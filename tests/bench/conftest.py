"""The benches report what XLA makes of a program: here it optimises as it does for users."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimizations_of_the_bench() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def quick_compile(optimizations_of_the_bench: None) -> Iterator[None]:
    """Programs of which no number is looked at: compiling them is all the time they take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
