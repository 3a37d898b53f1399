"""Compose the parts of a model, and encode what their losses read (train/joint_loss.py).

    pixels -> tokenizer -> codes ─┐                           pixels -> vae -> latents ─┐
    caption ----------------------┴-> ar -> hidden states of                            │
                                      │     <S0>, I_1 .. I_n -> connector -> condition ─┴-> dit
                                      └-> logits -> cross entropy                           │
                                                      flow-matching loss <- velocity <------┘

Reference images enter three ways, each by `model.editing`: their codes (or features) in the row,
their latents as further condition tokens, and concatenated to the noisy latents of the DiT.

Legend: B batch, L row length, N image tokens, D width, H W C image or latent, T condition tokens (N
+ 1), R reference slots.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from blip3o_jax import nn
from blip3o_jax.ar.protocol import LanguageModel
from blip3o_jax.config import ModelConfig, SamplingConfig
from blip3o_jax.connector import Connector
from blip3o_jax.dit.guidance import Guidance
from blip3o_jax.dit.protocol import Condition, DiffusionHead, LatentConcat
from blip3o_jax.image_tokens.contrastive import PatchReadout, TextTower
from blip3o_jax.image_tokens.protocol import ImageTokenizer
from blip3o_jax.part_registry import IMAGE_EMBEDDING_SEED_INDEX, PART_TABLE, make_part
from blip3o_jax.rows import insert_features
from blip3o_jax.vae.protocol import Autoencoder

MODEL_PARTS = tuple(PART_TABLE)


# Reference images of a row: pooled features [B, R, N, width], the index of each image's opening tag
# [B, R], and the mask of slots that hold one [B, R].
Features = tuple[jax.Array, jax.Array, jax.Array]


class Blip3o(nnx.Module):
    """Hold the parts named in `parts` as attributes of those names.

    The type of a part's settings selects its family (part_registry.py). Each part is initialised
    from a separate key, so that its initial weights do not depend on the other parts, nor on LoRA
    (nn.Linear).
    """

    tokenizer: ImageTokenizer
    text_tower: TextTower
    ar: LanguageModel
    connector: Connector
    dit: DiffusionHead
    vae: Autoencoder
    patch_readout: PatchReadout
    latent_connector: Connector
    feature_connector: Connector

    def __init__(self, cfg: ModelConfig, parts: Iterable[str], *, seed: int):
        self.cfg = cfg
        for name in parts:
            # A number of the part, not its index in `parts`: a stage that leaves parts out starts
            # the others with the same weights.
            key = jax.random.fold_in(jax.random.key(seed), PART_TABLE[name].seed_index)
            # A separate stream for LoRA: in the stream of the parameters the factors would shift
            # the keys of all later layers.
            rngs = nnx.Rngs(key, lora=jax.random.fold_in(key, 0))
            setattr(self, name, make_part(name, cfg, rngs))

    def codes(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Encode uint8 pixels at the tokenizer's size to codebook indices [B, N]."""
        with nn.part("tokenizer"):
            return self.tokenizer.encode(scale_pixels(pixels_BHWC))

    def features(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Encode uint8 pixels at the tokenizer's size to features [B, N, D]."""
        with nn.part("tokenizer"):
            return self.tokenizer.features(scale_pixels(pixels_BHWC))

    def latents(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Encode uint8 pixels at the target size to scaled latents, float32."""
        with nn.part("vae"):
            return (
                self.vae.encode(scale_pixels(pixels_BHWC)).astype(jnp.float32)
                * self.cfg.vae.scaling_factor
            )

    def pixels(self, z_BHWC: jax.Array) -> jax.Array:
        """Decode scaled latents to float32 images in [0, 1]."""
        with nn.part("vae"):
            x_BHWC = self.vae.decode(z_BHWC / self.cfg.vae.scaling_factor)
        return jnp.clip(x_BHWC.astype(jnp.float32) / 2 + 0.5, 0, 1)

    def init_image_embeddings_from_codes(self, image_token_offset: int, seed: int) -> None:
        """Set the image tokens' embeddings in the AR's tables to random projections of their codes.

        Similar codes then have similar embeddings, since random projections preserve distances
        (Johnson and Lindenstrauss, 1984):

            row_k = range * c_k R / |c|

        with R Gaussian [code width, D], different for each table, and |c| the root mean square.
        Random embeddings carry no information on the codes, and each is learned only from its
        token's occurrences.
        """
        codes_KD, ar = self.tokenizer.codes(), self.cfg.ar
        # Divided by the codes' root mean square length, so that a row's deviation is `deviation`
        # whatever the scale of the codebook.
        codes_KD *= jax.lax.rsqrt(jnp.mean(jnp.sum(codes_KD**2, axis=-1)))
        rows = slice(image_token_offset, image_token_offset + len(codes_KD))
        key = jax.random.fold_in(jax.random.key(seed), IMAGE_EMBEDDING_SEED_INDEX)
        keys = jax.random.split(key)

        def projected(key: jax.Array, deviation: float) -> jax.Array:
            return (
                deviation
                * codes_KD
                @ jax.random.normal(key, (codes_KD.shape[1], ar.hidden_size), jnp.float32)
            )

        table = self.ar.embedding
        table[...] = (
            table[...].at[rows].set(projected(keys[0], ar.embedding_std).astype(table.dtype))
        )
        if self.ar.lm_head is not None:
            head = self.ar.lm_head.kernel
            head[...] = (
                head[...]
                .at[:, rows]
                .set(projected(keys[1], ar.initializer_range).T.astype(head.dtype))
            )

    def hidden(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        features: Features | None = None,
    ) -> jax.Array:
        embedded_BLD = self.embed(tokens_BL, features)
        with nn.part("ar"):
            return self.ar(embedded_BLD, positions_BL, segment_ids_BL)

    def embed(self, tokens_BL: jax.Array, features: Features | None = None) -> jax.Array:
        """Return embeddings [B, L, D] of rows, with the tokenizer's features in place of the
        embeddings of image tokens where `features` are given.
        """
        with nn.part("ar"):
            embedded_BLD = self.ar.embed(tokens_BL)
        if features is None:
            return embedded_BLD
        features_BRND, span_BR, mask_BR = features
        B, R, N, width = features_BRND.shape
        with nn.part("connector"), jax.named_scope("references"):
            # R and N are flattened, since the connector and its constraints are of three
            # dimensions.
            features_BXD = self.feature_connector(features_BRND.reshape(B, R * N, width))
        return insert_features(embedded_BLD, span_BR, features_BXD.reshape(B, R, N, -1), mask_BR)

    def condition(
        self,
        hidden_BTD: jax.Array,
        keep_B: jax.Array | None = None,
        references: "References | None" = None,
        keep_references_B: jax.Array | None = None,
    ) -> Condition:
        """Return the condition of the DiT, from hidden states and reference images.

        Hidden states that are dropped (`keep_B` False) become zeros before the connector.
        References that are dropped leave zeros as their condition tokens; the concatenated latents
        stay, or go where `editing.uncond_latent_concat` is false.
        """
        editing = self.cfg.editing
        latent_concat: LatentConcat | None = None
        mask_BT: jax.Array | None = None
        with nn.part("connector"):
            tokens_BTC = self.connector(hidden_BTD, keep_B)
            if references is not None and editing.latents:
                z_BRHWC = references.latents_BRHWC
                assert z_BRHWC is not None, "encode_references made them for this route"
                with jax.named_scope("references"):
                    reference_tokens_BXC = self.latent_connector(
                        z_BRHWC.reshape(len(z_BRHWC), -1, z_BRHWC.shape[-1])
                    )
                if keep_references_B is not None:
                    # Zeros after the connector, where the connector's output for zeros is not zero:
                    # dropped in training and unconditional in sampling are then the same condition.
                    reference_tokens_BXC = jnp.where(
                        keep_references_B[:, None, None], reference_tokens_BXC, 0
                    )
                mask_BX = jnp.repeat(
                    references.mask_BR, z_BRHWC.shape[2] * z_BRHWC.shape[3], axis=1
                )
                mask_BT = jnp.concatenate([jnp.ones(tokens_BTC.shape[:2], bool), mask_BX], axis=1)
                tokens_BTC = jnp.concatenate([tokens_BTC, reference_tokens_BXC], axis=1)
        if references is not None and editing.latent_concat:
            mask_BR = references.mask_BR
            if keep_references_B is not None and not editing.uncond_latent_concat:
                mask_BR &= keep_references_B[:, None]
            assert references.latents_BRHWC is not None, "encode_references made them"
            latent_concat = LatentConcat(references.latents_BRHWC, mask_BR)
        return Condition(tokens_BTC, mask_BT, latent_concat)

    def guidance(
        self,
        hidden_BTD: jax.Array,
        settings: SamplingConfig,
        references: "References | None" = None,
    ) -> Guidance:
        """Return the branches of classifier-free guidance. The unconditional one and that of the
        references alone are the conditions that dropout leaves in training.
        """
        scale, reference_scale = settings.guidance, settings.reference_guidance or settings.guidance
        cond = self.condition(hidden_BTD, None, references)
        if scale == reference_scale == 1.0:
            return Guidance(cond)
        rows = len(hidden_BTD)
        # The branches of InstructPix2Pix (arXiv 2211.09800, eq. 3): neither, references alone,
        # both.
        keep_none_B, keep_all_B = jnp.zeros(rows, bool), jnp.ones(rows, bool)
        # One token stands for all T where they are equal and their number does not matter, as in
        # cross-attention.
        one = cond.mask_BT is None and not self.cfg.dit.counts_condition_tokens
        count = 1 if one else hidden_BTD.shape[1]
        zeros_BTD = jnp.zeros((rows, count, self.cfg.ar.hidden_size), jnp.float32)
        uncond = self.condition(zeros_BTD, keep_none_B, references, keep_none_B)
        if references is None or scale == reference_scale:
            return Guidance(cond, uncond, scale)
        return Guidance(
            cond,
            uncond,
            scale,
            self.condition(zeros_BTD, keep_none_B, references, keep_all_B),
            reference_scale,
        )

    def velocity(self, z_BHWC: jax.Array, timestep_B: jax.Array, condition: Condition) -> jax.Array:
        with nn.part("dit"):
            return self.dit(z_BHWC, timestep_B, *condition)


class References(NamedTuple):
    """Hold the reference images of a batch, in R slots per row."""

    mask_BR: jax.Array  # bool
    codes_BRN: jax.Array
    features_BRND: jax.Array | None  # with `editing.features`
    latents_BRHWC: jax.Array | None  # scaled, where a conditioning route reads them


def scale_pixels(pixels: jax.Array) -> jax.Array:
    """Convert uint8 to float32 in [-1, 1]: mean 0.5, std 0.5, as the SigLIP image processor and the
    autoencoder have it.
    """
    # float32 before the division: bfloat16 would round quotients from 1 to 2 by up to half a level.
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def encode_targets(model: Blip3o, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return codes [B, N] and latents [B, H, W, C] of a batch, cached or encoded by the frozen
    encoders.
    """
    if "codes" in batch:
        return batch["codes"], batch["latents"].astype(jnp.float32)
    with jax.named_scope("encode"):
        return (
            # The encoders stay frozen, whichever parameters a run trains.
            jax.lax.stop_gradient(model.codes(batch["tokenizer_pixels"])),
            jax.lax.stop_gradient(model.latents(batch["pixels"])),
        )


def encode_references(model: Blip3o, batch: dict[str, jax.Array]) -> References | None:
    """Return the batch's reference images, cached or encoded by the frozen encoders; None where its
    rows have no reference slots.
    """
    if "reference_mask" not in batch:
        return None
    mask_BR, editing = batch["reference_mask"] > 0, model.cfg.editing
    if "reference_codes" in batch:
        latents_BRHWC = batch["reference_latents"].astype(jnp.float32)
        return References(
            mask_BR, batch["reference_codes"], batch.get("reference_features"), latents_BRHWC
        )

    def encode_each(encode: Callable[[jax.Array], jax.Array], pixels_BRHWC: jax.Array) -> jax.Array:
        y = encode(pixels_BRHWC.reshape(-1, *pixels_BRHWC.shape[2:]))
        return jax.lax.stop_gradient(y.reshape(*mask_BR.shape, *y.shape[1:]))

    with jax.named_scope("encode"), jax.named_scope("references"):
        tokenizer_pixels_BRHWC = batch["reference_tokenizer_pixels"]
        features_BRND = (
            encode_each(model.features, tokenizer_pixels_BRHWC) if editing.features else None
        )
        needs_latents = editing.latents or editing.latent_concat
        z_BRHWC = encode_each(model.latents, batch["reference_pixels"]) if needs_latents else None
        return References(
            mask_BR, encode_each(model.codes, tokenizer_pixels_BRHWC), features_BRND, z_BRHWC
        )


def path_name(path: tuple[Any, ...]) -> str:
    """Return the name of a path: ("ar", "layers", "mlp") -> "ar/layers/mlp"."""
    return "/".join(str(p) for p in path)


def split(model: Blip3o, trainable: Callable[[str], bool]) -> tuple[Any, Any, Any]:
    """Split into (graphdef, trainable state, frozen state) by parameter path name."""
    graphdef, *states = nnx.split(model, lambda path, value: trainable(path_name(path)), ...)
    trained, frozen = states
    return graphdef, trained, frozen
