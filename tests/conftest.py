"""Eight CPU devices for every test, and one compile cache shared by them all."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "64")  # as parallel/mesh.py has it for eight devices

import jax
import numpy as np
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")


def relative_error(got, want) -> float:
    """Norm of the difference over the norm of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, wanted {want.shape}"
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
