"""Cross entropy over a large vocabulary without ever holding all logits.

    loss = sum over labelled tokens t of  logsumexp_v(h_t . W_v) - h_t . W_label(t)

Of each row only as many positions are computed as can have a label: in a text-to-image row those of
the image, a third of a row of 2048. Rows of the batch keep their sharding; positions are cut
into equal blocks of at most `chunk`, and the backward pass recomputes each block's logits, so
memory is B x chunk x V instead of B x L x V. A single block has nothing to save and is kept
instead. The head is gathered once, before the blocks.

Legend: B batch, L positions, M those computed, D width, V vocabulary rows (padded).
"""

import jax
import jax.numpy as jnp

from blip3o_jax import nn


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
    """Return the sum of the token losses where `mask_BL` is set, and the number of those tokens
    whose arg max is the label; float32.

    No row may have more than `max_labels` labels set (None: all); labels past that number are
    dropped.
    Logits are float32: in bfloat16 a loss of 11 nats has steps of 0.06. Rows of the head past
    `vocab_size` are padding and can never be predicted.
    """
    B, L, _ = hidden_BLD.shape
    M = min(max_labels or L, L)
    mask_BL = mask_BL.astype(bool)
    head_DV = nn.constrain(head_DV.astype(hidden_BLD.dtype), None, "act_vocab")
    blocks = -(-M // chunk)
    # As many blocks, but no more padding than their number asks for, and the devices that a row
    # lies over.
    among = nn.shards("length")
    chunk = -(-M // (blocks * among)) * among
    pad = blocks * chunk - M

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, blocks, chunk, *x.shape[2:]), 1, 0)

    def block(
        hidden_BCD: jax.Array, labels_BC: jax.Array, mask_BC: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits_BCV = jnp.einsum(
            "bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32
        )
        logits_BCV = nn.constrain(logits_BCV, "batch", "length", "act_vocab")
        logits_BCV = jnp.where(jnp.arange(head_DV.shape[1]) < vocab_size, logits_BCV, -jnp.inf)
        right_BC = jnp.argmax(logits_BCV, axis=-1) == labels_BC
        at_label_BC = jnp.take_along_axis(logits_BCV, labels_BC[..., None], axis=-1)[..., 0]
        loss_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - at_label_BC
        return jnp.sum(jnp.where(mask_BC, loss_BC, 0.0)), jnp.sum(
            jnp.where(mask_BC, right_BC, False).astype(jnp.float32)
        )

    def body(
        totals: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        loss, right = (block if blocks == 1 else jax.checkpoint(block))(*inputs)
        return (totals[0] + loss, totals[1] + right), None

    with jax.named_scope("cross_entropy"):
        start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        inputs = hidden_BLD, labels_BL, mask_BL
        if M < L:
            labelled_first_BM = jnp.argsort(~mask_BL, axis=1, stable=True)[:, :M]
            take = jax.vmap(
                lambda x, index: x.at[index].get(mode="promise_in_bounds", unique_indices=True)
            )
            inputs = [take(x, labelled_first_BM) for x in inputs]
        return jax.lax.scan(body, start, tuple(map(cut, inputs)))[0]
