"""Train states, array by array."""

import jax
import numpy as np
import optax


def leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def moments(state):
    """Return (first, second) moments of Adam."""
    return (optax.tree.get(state["opt"], name) for name in ("mu", "nu"))


def check_close(got, want, tolerance):
    """Compare every array, by the norm of the difference over the norm; those that are zero but for
    rounding by absolute size.
    """
    for (path, a), (_, b) in zip(leaves(got), leaves(want), strict=True):
        scale = np.linalg.norm(b)
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= tolerance * max(scale, 1e-6), (
            path,
            scale,
        )
