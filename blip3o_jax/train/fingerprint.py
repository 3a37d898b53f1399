"""Identify weights: those that a cache was encoded with, those that a policy is compared with."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp


def weights_fingerprint(params: Any) -> str:
    """Return a digest of parameters, the same on any mesh and any number of hosts.

    It is of the path, the dtype, the shape and a 32-bit sum of each array. The sums are computed
    where the arrays are: no host needs to hold a whole array.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in sorted(leaves, key=lambda item: jax.tree_util.keystr(item[0])):
        line = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {int(_bits(leaf))}\n"
        digest.update(line.encode())
    return digest.hexdigest()


@jax.jit
def _bits(x: jax.Array) -> jax.Array:
    """Return the sum, modulo 2^32, of an array's words, each mixed with its index.

    A sum of integers is the same in any order, and so on any mesh. The index makes it depend on
    where a value is: of two arrays of the same values in another order the sums differ.
    """
    words = jax.lax.bitcast_convert_type(
        x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    ).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = index * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    # Finaliser of MurmurHash3: every bit of the input changes half of the bits of the output.
    mixed = words ^ (index * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
