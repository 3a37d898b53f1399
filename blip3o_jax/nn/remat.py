"""Name the rematerialisation policies: the values that a layer stores for its backward pass."""

from collections.abc import Callable

import jax

# The checkpoint name (jax.ad_checkpoint) of an attention kernel's results. Policies that store
# matrix products do not recognise a kernel as one, so they store it by this name.
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
