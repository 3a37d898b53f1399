"""The composition: which parts a model has, how they join, and the joint loss.

    pixels -> tokenizer -> codes ─┐                                          pixels -> vae -> latents ─┐
    caption ----------------------┴-> ar -> hidden states of <S0>, I_1 .. I_n -> connector -> condition ┴-> dit -> velocity
                                      └-> logits -> cross entropy                                     flow-matching loss <-┘

Legend: B batch, L row length, N image tokens, D width, H W C image or latent, T condition tokens (N + 1).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.cross_entropy import cross_entropy
from blip3o_jax.ar.qwen3 import Qwen3
from blip3o_jax.config import LossConfig, ModelConfig
from blip3o_jax.connector import Connector
from blip3o_jax.data.sequence import hide_prompts, insert_image_ids, most_labels, take_span
from blip3o_jax.dit import flow
from blip3o_jax.dit.sana import SanaTransformer
from blip3o_jax.image_tokens.contrastive import PatchReadout, TextTower
from blip3o_jax.image_tokens.ta_tok import TaTok
from blip3o_jax.text.vocabulary import image_ids_from_codes
from blip3o_jax.vae.dc_ae import DcAe

PARTS = ("tokenizer", "text_tower", "ar", "connector", "dit", "vae", "patch_readout", "latent_connector", "feature_connector")


class Blip3o(nnx.Module):
    """The parts named in `parts`, as attributes of those names; each is initialised from its own key, so that a part's
    initial weights do not depend on which others are there, nor on whether it has low-rank factors (nn.Linear)."""

    def __init__(self, cfg: ModelConfig, parts: Iterable[str], *, seed: int):
        plain = dataclasses.replace(cfg.connector, positions=False)
        make = {
            "tokenizer": lambda rngs: TaTok(cfg.tokenizer, rngs=rngs),
            "text_tower": lambda rngs: TextTower(
                cfg.text_tower, cfg.ar.vocab_size, cfg.tokenizer.encoder.hidden_size, rngs=rngs
            ),
            "patch_readout": lambda rngs: PatchReadout(cfg.tokenizer.encoder, rngs=rngs),
            "ar": lambda rngs: Qwen3(cfg.ar, rngs=rngs),
            "connector": lambda rngs: Connector(cfg.connector, cfg.ar.hidden_size, cfg.dit.caption_channels, rngs=rngs),
            "dit": lambda rngs: SanaTransformer(cfg.dit, rngs=rngs),
            "vae": lambda rngs: DcAe(cfg.vae, rngs=rngs),
            "latent_connector": lambda rngs: Connector(
                plain, cfg.vae.latent_channels, cfg.dit.caption_channels, rngs=rngs, axis=None
            ),
            "feature_connector": lambda rngs: Connector(
                plain, cfg.tokenizer.encoder.hidden_size, cfg.ar.hidden_size, rngs=rngs
            ),
        }
        self.cfg = cfg
        for name in parts:
            key = jax.random.fold_in(jax.random.key(seed), PARTS.index(name))
            setattr(self, name, make[name](nnx.Rngs(key, lora=jax.random.fold_in(key, 0))))

    def codes(self, pixels_BHWC: jax.Array) -> jax.Array:
        """uint8 pixels at the tokenizer's size -> codebook indices [B, N]."""
        with nn.part("tokenizer"):
            return self.tokenizer.encode(scale_pixels(pixels_BHWC))

    def latents(self, pixels_BHWC: jax.Array) -> jax.Array:
        """uint8 pixels at the target size -> scaled latents, float32."""
        with nn.part("vae"):
            return self.vae.encode(scale_pixels(pixels_BHWC)).astype(jnp.float32) * self.cfg.vae.scaling_factor

    def pixels(self, z_BHWC: jax.Array) -> jax.Array:
        """Scaled latents -> float32 image in [0, 1]."""
        with nn.part("vae"):
            x_BHWC = self.vae.decode(z_BHWC / self.cfg.vae.scaling_factor)
        return jnp.clip(x_BHWC.astype(jnp.float32) / 2 + 0.5, 0, 1)

    def start_image_rows_at_codes(self, image_first: int, seed: int) -> None:
        """Sets the rows of the image tokens in the AR's tables to random projections of their codes, so that codes that look
        alike start alike (such projections keep distances: Johnson and Lindenstrauss, 1984):

            row_k = range * c_k R / |c|,    R Gaussian [code width, D], another for each table; |c| the root mean square

        Drawn rows say nothing of what a token looks like, and each is learned from its own occurrences alone.
        """
        codes_KD, ar = self.tokenizer.bottleneck.codebook.table(), self.cfg.ar
        codes_KD *= jax.lax.rsqrt(jnp.mean(jnp.sum(codes_KD**2, axis=-1)))
        rows = slice(image_first, image_first + len(codes_KD))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), len(PARTS)))

        def projected(key: jax.Array, deviation: float) -> jax.Array:
            return deviation * codes_KD @ jax.random.normal(key, (codes_KD.shape[1], ar.hidden_size), jnp.float32)

        table = self.ar.embedding
        table[...] = table[...].at[rows].set(projected(keys[0], ar.embedding_deviation).astype(table.dtype))
        if self.ar.lm_head is not None:
            head = self.ar.lm_head.kernel
            head[...] = head[...].at[:, rows].set(projected(keys[1], ar.initializer_range).T.astype(head.dtype))

    def hidden(self, tokens_BL: jax.Array, positions_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
        with nn.part("ar"):
            return self.ar(self.ar.embed(tokens_BL), positions_BL, segment_ids_BL)

    def condition(self, hidden_BTD: jax.Array, keep_B: jax.Array | None = None) -> jax.Array:
        """Hidden states -> condition tokens of the DiT; rows that are not kept get the null condition."""
        with nn.part("connector"):
            return self.connector(hidden_BTD, keep_B)

    def null_condition(self, rows: int) -> jax.Array:
        """What the connector makes of zeros, [rows, 1, C]: the unconditional branch. One token stands for all n + 1, since
        cross-attention over equal tokens does not depend on their number; a row for each of the batch, as rows are spread
        over the devices."""
        zeros = jnp.zeros((rows, 1, self.cfg.ar.hidden_size), jnp.float32)
        return self.condition(zeros, jnp.zeros(rows, bool))

    def velocity(self, z_BHWC: jax.Array, timestep_B: jax.Array, condition_BTC: jax.Array) -> jax.Array:
        with nn.part("dit"):
            return self.dit(z_BHWC, timestep_B, condition_BTC)


def scale_pixels(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]: mean 0.5, std 0.5, as the SigLIP image processor and the autoencoder have it."""
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def targets(model: Blip3o, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Codes [B, N] and latents [B, H, W, C] of a batch: cached, or by the frozen encoders."""
    if "codes" in batch:
        return batch["codes"], batch["latents"].astype(jnp.float32)
    with jax.named_scope("encode"):
        return (
            jax.lax.stop_gradient(model.codes(batch["tokenizer_pixels"])),
            jax.lax.stop_gradient(model.latents(batch["pixels"])),
        )


def draw_noise(keys_B: jax.Array, shape: tuple[int, ...], cfg: ModelConfig, loss: LossConfig) -> tuple[jax.Array, ...]:
    """Per row, from its own key: noises [B, draws, *shape], sigmas [B, draws] and whether caption and condition are kept [B];
    the same at any batch split."""

    def row(key: jax.Array) -> tuple[jax.Array, ...]:
        noise_key, sigma_key, drop_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, (loss.flow_draws, *shape), jnp.float32)
        sigma = flow.sample_train_sigma(sigma_key, loss.flow_draws, cfg.flow)
        chance = jax.random.uniform(drop_key)
        return noise, sigma, chance >= loss.caption_dropout, chance >= loss.condition_dropout

    return jax.vmap(row)(keys_B)


def joint_loss(
    model: Blip3o, batch: dict[str, jax.Array], keys_B: jax.Array, *, loss: LossConfig, image_first: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy of the next token plus flow matching through the connector (BLIP3o-NEXT, arXiv 2510.15857, sec. 3).

    `image_first` is the vocabulary id of code 0. `batch["label_count"]` is the mean number of labels a row over the whole
    batch, so that the mean of micro-batch losses is the loss of the batch. Metrics are means over the rows given.
    """
    out, cfg = _joint_forward(model, batch, keys_B, loss, image_first), model.cfg
    with nn.part("ar"):
        ce_sum, right = cross_entropy(
            out.hidden_BLD[:, :-1],
            model.ar.head(),
            out.tokens_BL[:, 1:],
            batch["loss_mask"][:, 1:],
            vocab_size=cfg.ar.vocab_size,
            chunk=loss.ce_chunk,
            most=most_labels(cfg.template, cfg.tokenizer.num_tokens),
        )
    labels = jnp.sum(batch["label_count"])
    ce = ce_sum / labels
    fm = jnp.mean(flow.flow_loss(out.velocity_BHWC, out.z_BHWC, out.noise_BHWC))
    return loss.ce * ce + loss.flow * fm, {"ce": ce, "flow": fm, "accuracy": right / labels}


def joint_preview(
    model: Blip3o, batch: dict[str, jax.Array], keys_B: jax.Array, *, loss: LossConfig, image_first: int
) -> jax.Array:
    """[B, H, 2 W, 3] in [0, 1]: each target as the autoencoder has it, and what one velocity from a noisy one points to."""
    out = _joint_forward(model, batch, keys_B, dataclasses.replace(loss, flow_draws=1), image_first)
    guess_BHWC = out.x_BHWC - out.sigma_B[:, None, None, None] * out.velocity_BHWC.astype(jnp.float32)
    return jnp.concatenate([model.pixels(out.z_BHWC), model.pixels(guess_BHWC)], axis=2)


class _Joint(NamedTuple):
    """Everything the joint loss is computed from; from z on, a row for each draw of noise."""

    tokens_BL: jax.Array
    hidden_BLD: jax.Array
    z_BHWC: jax.Array
    noise_BHWC: jax.Array
    sigma_B: jax.Array
    x_BHWC: jax.Array
    velocity_BHWC: jax.Array


def _joint_forward(model: Blip3o, batch: dict[str, jax.Array], keys_B: jax.Array, loss: LossConfig, image_first: int) -> _Joint:
    codes_BN, z_BHWC = targets(model, batch)
    tokens_BL = insert_image_ids(batch["tokens"], batch["image_span"], image_ids_from_codes(codes_BN, image_first))
    noises, sigmas, captioned_B, keep_B = draw_noise(keys_B, z_BHWC.shape[1:], model.cfg, loss)
    segment_ids_BL = hide_prompts(batch["segment_ids"], batch["image_span"], ~captioned_B)
    hidden_BLD = model.hidden(tokens_BL, batch["positions"], segment_ids_BL)
    span_BTD = take_span(hidden_BLD, batch["image_span"], codes_BN.shape[1], loss.condition_span)
    condition_BTC = model.condition(span_BTD, keep_B)
    # The draws of an example share its condition, and so one pass of the AR (as in MAR, arXiv 2406.11838).
    z_BHWC, condition_BTC = (jnp.repeat(x, loss.flow_draws, axis=0) for x in (z_BHWC, condition_BTC))
    noise_BHWC, sigma_B = noises.reshape(z_BHWC.shape), sigmas.reshape(-1)
    x_BHWC = flow.noisy(z_BHWC, noise_BHWC, sigma_B)
    velocity_BHWC = model.velocity(x_BHWC, sigma_B * model.cfg.flow.num_train_timesteps, condition_BTC)
    return _Joint(tokens_BL, hidden_BLD, z_BHWC, noise_BHWC, sigma_B, x_BHWC, velocity_BHWC)


def path_name(path: tuple[Any, ...]) -> str:
    """("ar", "layers", "mlp", "up", "kernel") -> "ar/layers/mlp/up/kernel"."""
    return "/".join(str(p) for p in path)


def split(model: Blip3o, trainable: Callable[[str], bool]) -> tuple[Any, Any, Any]:
    """(graphdef, trainable state, frozen state) by parameter path name."""
    return nnx.split(model, lambda path, value: trainable(path_name(path)), ...)
