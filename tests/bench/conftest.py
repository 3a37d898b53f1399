"""Let XLA optimise as it does for users, since the benches report its programs."""

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
    """Compile fast the programs of which no number is checked: compiling them takes all their
    time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
