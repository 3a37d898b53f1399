"""Fill and slice rows of tokens on the devices, in the layout of data/sequence.py.

Legend: B examples of a batch, or its rows; L row length, D width, N image tokens, R reference
images, E examples of a packed row.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.config import check_choice
from blip3o_jax.data.sequence import ROW_FIELDS


def flatten_packed(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a packed batch with rows and examples flattened into one leading dimension.

    ROW_FIELDS keep the dimension of rows. A batch that is not packed is returned unchanged.
    """
    if batch["image_span"].ndim == 1:
        return batch
    return {
        name: x if name in ROW_FIELDS else x.reshape(-1, *x.shape[2:]) for name, x in batch.items()
    }


def mask_prompts(
    segment_ids_BL: jax.Array, image_span_B: jax.Array, hide_B: jax.Array
) -> jax.Array:
    """Return `segment_ids_BL` with the prompts of the examples `hide_B` marked as padding.

    The tokens before the scale token are marked, so that the image tokens attend to no caption.
    `image_span_B` and `hide_B` lead with the examples, E of each row.
    """
    rows, length = segment_ids_BL.shape
    # Example e of a packed row is segment e + 1.
    number_E = jnp.arange(1, len(image_span_B) // rows + 1)
    own_BEL = segment_ids_BL[:, None] == number_E[:, None]
    before_BEL = jnp.arange(length) < image_span_B.reshape(rows, -1, 1)
    return jnp.where(
        jnp.any(own_BEL & before_BEL & hide_B.reshape(rows, -1, 1), axis=1), 0, segment_ids_BL
    )


def insert_image_ids(
    tokens_BL: jax.Array,
    image_span_B: jax.Array,
    image_ids_BN: jax.Array,
    mask_B: jax.Array | None = None,
) -> jax.Array:
    """Return `tokens_BL` with each row's image ids at the N positions after `image_span_B`.

    The span is the position of the scale token, or of an opening tag. Rows where `mask_B` is 0 are
    unchanged.
    """

    def row(tokens_L: jax.Array, span: jax.Array, image_ids_N: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            tokens_L, image_ids_N.astype(tokens_L.dtype), span + 1, axis=0
        )

    filled_BL = jax.vmap(row)(tokens_BL, image_span_B, image_ids_BN)
    return filled_BL if mask_B is None else jnp.where(mask_B[:, None] > 0, filled_BL, tokens_BL)


def insert_references(
    tokens_BL: jax.Array,
    span_BR: jax.Array,
    image_ids_BRN: jax.Array,
    mask_BR: jax.Array | None = None,
) -> jax.Array:
    """Return `tokens_BL` with the ids of each row's R images at the N positions after `span_BR`.

    References where `mask_BR` is 0 are not inserted.
    """
    # R is static and small, so that the loop is unrolled.
    for r in range(span_BR.shape[1]):
        tokens_BL = insert_image_ids(
            tokens_BL,
            span_BR[:, r],
            image_ids_BRN[:, r],
            None if mask_BR is None else mask_BR[:, r],
        )
    return tokens_BL


def insert_features(
    embedded_BLD: jax.Array,
    reference_span_BR: jax.Array,
    features_BRND: jax.Array,
    mask_BR: jax.Array,
) -> jax.Array:
    """Return `embedded_BLD` with image features at the N positions after `reference_span_BR`.

    The span is the position of a reference's opening tag. References where `mask_BR` is 0 are not
    inserted.
    """

    def row(embedded_LD: jax.Array, span: jax.Array, features_ND: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            embedded_LD, features_ND.astype(embedded_LD.dtype), span + 1, axis=0
        )

    # `where` passes the gradient to the features where they are inserted, else to the embeddings.
    for r in range(reference_span_BR.shape[1]):
        filled_BLD = jax.vmap(row)(embedded_BLD, reference_span_BR[:, r], features_BRND[:, r])
        embedded_BLD = jnp.where(mask_BR[:, r, None, None] > 0, filled_BLD, embedded_BLD)
    return embedded_BLD


def condition_positions(image_span_B: jax.Array, n: int) -> jax.Array:
    """Return the indices [B, n + 1] of the scale token and the n image tokens after it."""
    return image_span_B[:, None] + jnp.arange(n + 1, dtype=image_span_B.dtype)


def slice_condition_span(
    hidden_BLD: jax.Array, image_span_B: jax.Array, n: int, mode: str = "exact"
) -> jax.Array:
    """Return the hidden states [B, n + 1, D] of each example that condition the diffusion head.

    Mode "exact" returns those at `condition_positions` (the scale token and the n image tokens), as
    in sampling. "last" returns the last n + 1 of the row, end tokens and padding included: the
    published weights are trained with it. Raises ConfigError for another mode.
    """
    check_choice("loss.condition_span", mode, ("exact", "last"))
    if mode == "last":
        # The reference implementation tests the wrong dimension and always takes the row's end.
        return hidden_BLD[:, -(n + 1) :]
    rows = len(hidden_BLD)
    cut = lambda hidden_LD, span: jax.lax.dynamic_slice_in_dim(hidden_LD, span, n + 1, axis=0)
    # Without packing: one span a row.
    if len(image_span_B) == rows:
        return jax.vmap(cut)(hidden_BLD, image_span_B)
    span_BETD = jax.vmap(jax.vmap(cut, in_axes=(None, 0)))(
        hidden_BLD, image_span_B.reshape(rows, -1)
    )
    return span_BETD.reshape(-1, *span_BETD.shape[2:])
