"""Compute the loss of the joint stage: the cross entropy of a row's tokens, and the flow matching
of its images.

    loss = ce * CE + flow * FM
    CE     cross entropy of the labelled tokens (ar/cross_entropy.py)
    FM     squared error of the velocity at random noise levels (dit/flow.py)

Source: BLIP3o-NEXT (arXiv 2510.15857, sec. 3). The diffusion head is conditioned on the hidden
states at the image's tokens, so that its gradient reaches the AR through the connector.

Legend: B batch, L row length, N image tokens, D width, H W C image or latent, T condition tokens (N
+ 1), R reference slots.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.ar.cross_entropy import cross_entropy
from blip3o_jax.blip3o import Blip3o, Features, encode_references, encode_targets
from blip3o_jax.config import LossConfig, ModelConfig
from blip3o_jax.data.sequence import max_labels
from blip3o_jax.dit import flow
from blip3o_jax.rows import (
    flatten_packed,
    insert_references,
    mask_prompts,
    slice_condition_span,
)
from blip3o_jax.text.vocabulary import image_ids_from_codes


class TrainingNoise(NamedTuple):
    """Hold the random values of training examples.

    Each example's are sampled from its key, so that they do not depend on how the batch is split.
    """

    noise: jax.Array  # [B, flow_samples, H, W, C]
    sigma: jax.Array  # [B, flow_samples]
    captioned_B: jax.Array  # whether the image tokens see the prompt
    keep_B: jax.Array  # whether the hidden states are kept
    keep_references_B: jax.Array


def sample_training_noise(
    keys_B: jax.Array, shape: tuple[int, ...], cfg: ModelConfig, loss: LossConfig
) -> TrainingNoise:
    """Sample noise, noise levels and dropout of B examples with latents of `shape` [H, W, C]."""

    def row(key: jax.Array) -> TrainingNoise:
        noise_key, sigma_key, drop_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, (loss.flow_samples, *shape), jnp.float32)
        sigma = flow.sample_train_sigma(sigma_key, loss.flow_samples, cfg.flow)
        # One uniform number for all kinds of dropout: hidden states and references are dropped in
        # the rows below `condition_dropout`, hidden states alone in those from there to the sum
        # with `instruction_dropout`, and captions in those below `caption_dropout`, which with
        # equal fractions are the same rows as the first.
        chance, both = jax.random.uniform(drop_key), loss.condition_dropout
        return TrainingNoise(
            noise,
            sigma,
            chance >= loss.caption_dropout,
            chance >= both + loss.instruction_dropout,
            chance >= both,
        )

    return jax.vmap(row)(keys_B)


def joint_loss(
    model: Blip3o,
    batch: dict[str, jax.Array],
    keys_B: jax.Array,
    *,
    loss: LossConfig,
    image_token_offset: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of the module and its metrics, means over the given rows.

    `image_token_offset` is the vocabulary id of the first codebook entry. The batch holds the
    `joint_normalizers` of the whole batch for each example.
    """
    batch, keys_B = flatten_packed(batch), keys_B.reshape(-1)
    out, cfg = _joint_forward(model, batch, keys_B, loss, image_token_offset), model.cfg
    with nn.part("ar"):
        ce_sum, right = cross_entropy(
            # The state of a token predicts the next one, so that the last state and the first token
            # have no partner.
            out.hidden_BLD[:, :-1],
            model.ar.head(),
            out.tokens_BL[:, 1:],
            batch["loss_mask"][:, 1:],
            vocab_size=cfg.ar.vocab_size,
            chunk=loss.ce_chunk,
            max_labels=max_labels(
                cfg.template, cfg.tokenizer.num_tokens, len(keys_B) // len(out.tokens_BL)
            ),
        )
    labels = jnp.sum(batch["label_count"])
    # The whole batch's mean labels an example, times the examples here, not the labels here: the
    # mean over micro-batches is then one mean over tokens, however the labels are spread.
    ce = ce_sum / labels
    fm_B = flow.flow_loss(out.velocity_BHWC, out.z_BHWC, out.noise_BHWC)
    if "target" in batch:
        # Examples without an image to generate (questions) have weight 0.
        fm = jnp.sum(fm_B.reshape(-1, loss.flow_samples).mean(axis=1) * batch["target"]) / jnp.sum(
            batch["target_count"]
        )
    else:
        fm = jnp.mean(fm_B)
    return loss.ce * ce + loss.flow * fm, {"ce": ce, "flow": fm, "accuracy": right / labels}


def joint_normalizers(batch: dict[str, jax.Array], examples: int) -> dict[str, jax.Array]:
    """Return `label_count`, the mean number of labels of the batch's examples.

    If examples differ in having an image to generate, also return `target_count`, their number.
    """
    labels = jnp.sum(batch["loss_mask"][:, 1:].astype(jnp.float32))
    found = {"label_count": labels / examples}
    if "target" in batch:
        # A batch of questions alone generates no image.
        found["target_count"] = jnp.maximum(jnp.sum(batch["target"]), 1) / examples
    return found


def joint_totals(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what a batch holds, padding left out, and the room for it: `examples` in `slots`,
    `tokens` in `row_tokens`; `pairs` of a token and one it sees, itself included; `labels`, images
    to generate (`targets`) and reference images.
    """
    real_BL = batch["segment_ids"] > 0
    # float32: the pairs of a large batch exceed int32.
    count = lambda x: jnp.sum(x.astype(jnp.float32))
    found = {
        # Examples are numbered within their row.
        "examples": count(jnp.max(batch["segment_ids"], axis=1)),
        "slots": jnp.float32(batch["image_span"].size),
        "tokens": count(real_BL),
        "row_tokens": jnp.float32(real_BL.size),
        "pairs": count(jnp.where(real_BL, batch["positions"] + 1, 0)),
        "labels": count(batch["loss_mask"][:, 1:]),
    }
    found["targets"] = count(batch["target"]) if "target" in batch else found["examples"]
    if "reference_mask" in batch:
        found["references"] = count(batch["reference_mask"])
    return found


def joint_preview(
    model: Blip3o,
    batch: dict[str, jax.Array],
    keys_B: jax.Array,
    *,
    loss: LossConfig,
    image_token_offset: int,
) -> jax.Array:
    """Return previews [B, H, 2 W, 3] in [0, 1]: each target as the autoencoder reconstructs it, and
    the denoised estimate from one velocity at a random noise level.
    """
    out = _joint_forward(
        model,
        flatten_packed(batch),
        keys_B.reshape(-1),
        dataclasses.replace(loss, flow_samples=1),
        image_token_offset,
    )
    # x_sigma = (1 - sigma) z + sigma e and v = e - z give z = x_sigma - sigma v.
    guess_BHWC = out.x_BHWC - out.sigma_B[:, None, None, None] * out.velocity_BHWC.astype(
        jnp.float32
    )
    return jnp.concatenate([model.pixels(out.z_BHWC), model.pixels(guess_BHWC)], axis=2)


class _Joint(NamedTuple):
    """Hold the inputs of the joint losses; fields from z on have a row for each noise sample."""

    tokens_BL: jax.Array
    hidden_BLD: jax.Array
    z_BHWC: jax.Array
    noise_BHWC: jax.Array
    sigma_B: jax.Array
    x_BHWC: jax.Array
    velocity_BHWC: jax.Array


def _joint_forward(
    model: Blip3o,
    batch: dict[str, jax.Array],
    keys_B: jax.Array,
    loss: LossConfig,
    image_token_offset: int,
) -> _Joint:
    codes_BN, z_BHWC = encode_targets(model, batch)
    references = encode_references(model, batch)
    span_B, target_B = batch["image_span"], batch.get("target")
    # Arrays of examples regrouped by row, for what is inserted into a row's tokens.
    rows = len(batch["tokens"])
    group_by_row = lambda x: x.reshape(rows, -1)
    ids_by_row = lambda codes: image_ids_from_codes(codes, image_token_offset).reshape(
        rows, -1, codes.shape[-1]
    )
    tokens_BL = insert_references(
        batch["tokens"],
        group_by_row(span_B),
        ids_by_row(codes_BN),
        None if target_B is None else group_by_row(target_B),
    )
    features: Features | None = None
    if references is not None:
        span_BR = group_by_row(batch["reference_span"])
        mask_BR = group_by_row(references.mask_BR)
        tokens_BL = insert_references(tokens_BL, span_BR, ids_by_row(references.codes_BRN), mask_BR)
        if references.features_BRND is not None:
            shape = references.features_BRND.shape[2:]
            features = (references.features_BRND.reshape(rows, -1, *shape), span_BR, mask_BR)
    sampled = sample_training_noise(keys_B, z_BHWC.shape[1:], model.cfg, loss)
    # A question is never hidden: its answer depends on it alone.
    hidden_B = ~sampled.captioned_B if target_B is None else ~sampled.captioned_B & (target_B > 0)
    segment_ids_BL = mask_prompts(batch["segment_ids"], span_B, hidden_B)
    hidden_BLD = model.hidden(tokens_BL, batch["positions"], segment_ids_BL, features)
    # The states at <S0>, I_1 .. I_n: those that sampling has for its condition.
    span_BTD = slice_condition_span(hidden_BLD, span_B, codes_BN.shape[1], loss.condition_span)
    condition = model.condition(span_BTD, sampled.keep_B, references, sampled.keep_references_B)
    # The noise samples of an example share its condition, and so one pass of the AR (as in MAR,
    # arXiv 2406.11838).
    z_BHWC, condition = jax.tree.map(
        lambda x: jnp.repeat(x, loss.flow_samples, axis=0), (z_BHWC, condition)
    )
    noise_BHWC, sigma_B = sampled.noise.reshape(z_BHWC.shape), sampled.sigma.reshape(-1)
    x_BHWC = flow.add_noise(z_BHWC, noise_BHWC, sigma_B)
    velocity_BHWC = model.velocity(x_BHWC, sigma_B * model.cfg.flow.num_train_timesteps, condition)
    return _Joint(tokens_BL, hidden_BLD, z_BHWC, noise_BHWC, sigma_B, x_BHWC, velocity_BHWC)
