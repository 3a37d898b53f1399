"""Configure eight CPU devices for every test, programs that compile fast, and one shared compile
cache."""

import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # as parallel/mesh.py has it for eight devices
# Compiling takes most of the suite's time, running the tiny programs next to none. The compiler's
# newer generator of fused loops takes twice as long as the one that this flag brings back. XLA has
# the older one up to jax 0.10, and ends a process whose XLA_FLAGS name an unknown flag.
# Processes that tests start inherit it.
if importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    )

# In the environment, for the processes that tests start too.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".jax_cache")

import jax
import numpy as np
import pytest

CACHE = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)


def relative_error(got, want) -> float:
    """Return the norm of the difference over the norm of the expected array."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def optimizations() -> Iterator[None]:
    """Let XLA optimise as it does for users: for tests that look at the program it makes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
