"""Compute the cross entropy over a large vocabulary in blocks, without storing all logits.

    loss = sum over labelled tokens t of  logsumexp_v(h_t . W_v) - h_t . W_label(t)

Only as many positions of each row are computed as can have a label: in a text-to-image row those of
the image, a third of a row of 2048. Rows of the batch keep their sharding. Positions are split into
equal blocks of at most `chunk`, and the backward pass recomputes each block's logits, so memory is
B x chunk x V instead of B x L x V. A single block is not recomputed. The head is gathered once,
before the blocks.

Legend: B batch, L positions, M those computed, D width, V vocabulary rows (padded).
"""

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.ar.logits import scan_blocks


def cross_entropy(
    hidden_BLD: jax.Array,
    head_DV: jax.Array,
    labels_BL: jax.Array,
    mask_BL: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    max_labels: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses of tokens in `mask_BL`, and the number predicted correctly.

    Both are float32. A row has at most `max_labels` labels (None: its length); labels past that
    number are dropped. Logits are float32, since bfloat16 has a resolution of 0.06 at a loss of 11
    nats. Columns of the head past `vocab_size` are padding and have probability 0.
    """
    L = hidden_BLD.shape[1]
    # M is static: the number of labels that a row's layout allows, not the number that this batch
    # has.
    M = min(max_labels or L, L)
    mask_BL = mask_BL.astype(bool)
    # Only the vocabulary stays sharded, the width is gathered: a block then computes its logits
    # without communication, and the softmax reduces over the shards.
    head_DV = nn.constrain(head_DV.astype(hidden_BLD.dtype), None, "act_vocab")

    def block(
        hidden_BCD: jax.Array, labels_BC: jax.Array, mask_BC: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        logits_BCV = jnp.einsum(
            "bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32
        )
        logits_BCV = nn.constrain(logits_BCV, "batch", "length", "act_vocab")
        # The rows past `vocab_size` exist to shard evenly. Left in, their random values would take
        # probability from real tokens.
        logits_BCV = jnp.where(jnp.arange(head_DV.shape[1]) < vocab_size, logits_BCV, -jnp.inf)
        right_BC = jnp.argmax(logits_BCV, axis=-1) == labels_BC
        at_label_BC = jnp.take_along_axis(logits_BCV, labels_BC[..., None], axis=-1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - at_label_BC
        loss = jnp.sum(jnp.where(mask_BC, loss_BC, 0.0))
        right = jnp.sum(jnp.where(mask_BC, right_BC, False).astype(jnp.float32))
        return (loss, right), None

    with jax.named_scope("cross_entropy"):
        start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        inputs = (hidden_BLD, labels_BL, mask_BL)
        if M < L:
            # A stable sort moves labelled positions to the front in their order.
            labelled_first_BM = jnp.argsort(~mask_BL, axis=1, stable=True)[:, :M]
            take = jax.vmap(
                # The indices are part of a permutation: without bounds checks and duplicates the
                # gradient is a plain scatter.
                lambda x, index: x.at[index].get(mode="promise_in_bounds", unique_indices=True)
            )
            inputs = (
                take(hidden_BLD, labelled_first_BM),
                take(labels_BL, labelled_first_BM),
                take(mask_BL, labelled_first_BM),
            )
        # Zeros that pad a block have mask False, so that their loss is not counted.
        totals, _ = scan_blocks(block, inputs, start, chunk=chunk, multiple=nn.shards("length"))
        return totals
