"""Name what the backward pass keeps of a layer."""

from collections.abc import Callable

import jax

# What an attention kernel calls its results (jax.ad_checkpoint), for a policy to keep: to it the
# kernel is no product.
ATTENTION = "attention"

REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names(ATTENTION),
    ),
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
