"""Define the training stages: the parts, the loss and the trainable parameters of each.

The training loop is the same for all stages.

    autoencoder   pixels -> vae -> pixels                        L1 + image gradients
    contrastive   (pixels, caption) -> encoder, text tower       SigLIP's sigmoid loss, optionally
                                                                 with pixels from the features
    tokenizer     pixels -> frozen encoder -> codes -> features  reconstruction + commitment + code
                                                                 usage
    joint         row + image -> AR, connector, DiT              cross entropy + flow matching
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax import nn
from blip3o_jax.blip3o import Blip3o, scale_pixels
from blip3o_jax.config import Config
from blip3o_jax.image_tokens.contrastive import same_caption_mask, sigmoid_loss
from blip3o_jax.parts import family_of
from blip3o_jax.train.joint_loss import (
    joint_loss,
    joint_normalizers,
    joint_preview,
    joint_totals,
)
from blip3o_jax.vae.losses import reconstruction_loss

Batch = dict[str, jax.Array]  # global arrays, whose first axis is the batch
# (model, batch, one key a row) -> (loss, metrics), both means over the rows given.
LossFunction = Callable[[Blip3o, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def no_normalizers(batch: Batch, examples: int) -> dict[str, jax.Array]:
    """Return no divisors: the loss is a mean over the examples."""
    del batch, examples
    return {}


def no_totals(batch: Batch) -> dict[str, jax.Array]:
    """Return no totals: the loop itself counts steps and examples."""
    del batch
    return {}


@dataclasses.dataclass(frozen=True)
class Loss:
    """Define the loss of a train step, and the sums that the step counts over the whole batch.

    `normalizers`: (batch, number of examples) -> {name: scalar}, the divisors of the function, as
    means over the examples. The step counts them before it splits the batch and adds them to it,
    the same number for every example, so that the mean of the micro-batches' losses is the loss of
    the batch. `totals`: batch -> {metric: scalar}, sums over the batch.
    """

    function: LossFunction
    normalizers: Callable[[Batch, int], dict[str, jax.Array]] = no_normalizers
    totals: Callable[[Batch], dict[str, jax.Array]] = no_totals

    def __call__(
        self, model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss and its metrics over the rows given."""
        return self.function(model, batch, keys_B)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Define a stage: the `parts` of its model, the `fields` of an example (data/examples.py) that
    its loss reads, and its default filter `trainable`; `normalizers` and `totals`: see `Loss`.
    """

    parts: tuple[str, ...]
    fields: tuple[str, ...]
    trainable: tuple[str, ...]
    normalizers: Callable[[Batch, int], dict[str, jax.Array]] = no_normalizers
    totals: Callable[[Batch], dict[str, jax.Array]] = no_totals


STAGES: dict[str, Stage] = {
    "autoencoder": Stage(("vae",), ("pixels",), ("vae/.*",)),
    "contrastive": Stage(
        ("tokenizer", "text_tower", "patch_readout"),
        ("tokenizer_pixels", "caption"),
        ("tokenizer/encoder/.*", "text_tower/.*", "patch_readout/.*"),
    ),
    "tokenizer": Stage(
        ("tokenizer",),
        ("tokenizer_pixels",),
        (r"tokenizer/(?!encoder/).*",),
    ),
    # The published freezing: of the DiT only the caption projection and its norm are trained.
    "joint": Stage(
        ("tokenizer", "ar", "connector", "dit", "vae"),
        ("row", "pixels", "tokenizer_pixels"),
        ("ar/.*", "connector/.*", "dit/caption.*"),
        joint_normalizers,
        joint_totals,
    ),
}


def stage_parts(config: Config) -> tuple[str, ...]:
    """Return the parts of a run's model: the stage's, and for the joint stage the connectors of
    editing that the configuration turns on.
    """
    editing = config.model.editing
    extra = {"latent_connector": editing.latents, "feature_connector": editing.features}
    return STAGES[config.stage].parts + tuple(
        name for name, there in extra.items() if there and config.stage == "joint"
    )


def stage_trainable(config: Config) -> tuple[str, ...]:
    """Return the stage's default patterns of trainable parameters.

    With reference slots they include the connectors of references and, for concatenated latents,
    the DiT's input and output layers (BLIP3o-NEXT, arXiv 2510.15857, sec. 4).
    """
    editing, patterns = config.model.editing, STAGES[config.stage].trainable
    if config.stage != "joint" or not editing.reference_slots:
        return patterns
    wider_map = ("dit/patch_embed/.*", "dit/proj_out/.*") if editing.latent_concat else ()
    return (
        patterns
        + tuple(f"{part}/.*" for part in stage_parts(config) if part.endswith("_connector"))
        + wider_map
    )


def trainable_filter(config: Config) -> Callable[[str], bool]:
    """Return whether the parameter of a path name ("ar/layers/...") is trained: one that matches
    `trainable`, or without it one of the stage's that no family holds constant (parts.py).
    """
    compiled = [re.compile(p) for p in config.trainable or stage_trainable(config)]
    constant: set[str] = set()
    if not config.trainable:
        for part in stage_parts(config):
            constant |= {f"{part}/{path}" for path in family_of(part, config.model).constant}
    # `fullmatch`: a pattern that names a layer must not select another with the same beginning.
    return lambda name: name not in constant and any(p.fullmatch(name) for p in compiled)


def make_loss(config: Config, image_token_offset: int) -> Loss:
    """Return the loss of the configured stage; `image_token_offset` is the vocabulary id of the
    first codebook entry (joint stage only).
    """
    stage = STAGES[config.stage]
    return Loss(_loss_function(config, image_token_offset), stage.normalizers, stage.totals)


def _loss_function(config: Config, image_token_offset: int) -> LossFunction:

    def autoencoder(
        model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        x_BHWC = scale_pixels(batch["pixels"])
        with nn.part("vae"):
            scale = config.model.vae.scaling_factor
            # Noise is added at the scale of the latents that the diffusion head has.
            z_BHWC = model.vae.encode(x_BHWC).astype(jnp.float32) * scale
            noise = jax.vmap(lambda key: jax.random.normal(key, z_BHWC.shape[1:]))(keys_B)
            noisy_BHWC = z_BHWC + config.loss.latent_noise * noise
            loss, metrics = reconstruction_loss(
                model.vae.decode(noisy_BHWC / scale),
                x_BHWC,
                config.loss.gradient,
                config.loss.squared,
            )
        # Added inside of the root, whose gradient is infinite at 0 (a channel that is constant).
        deviation_C = jnp.sqrt(jnp.mean(z_BHWC**2, axis=(0, 1, 2)) + 1e-8)
        off_scale = jnp.mean(jnp.log(deviation_C) ** 2)
        return loss + config.loss.latent_scale * off_scale, metrics | {
            "latent_deviation": jnp.mean(deviation_C)
        }

    def contrastive(
        model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        with nn.part("tokenizer"):
            x_BHWC = scale_pixels(batch["tokenizer_pixels"])
            image = model.tokenizer.embed_image(x_BHWC)
        with nn.part("text_tower"):
            tower = model.text_tower
            text_BD = tower(batch["text_ids"], batch["text_mask"])
            same_BB = same_caption_mask(batch["text_ids"])
            loss, metrics = sigmoid_loss(
                image.pooled_BD, text_BD, tower.log_scale[...], tower.bias[...], same_BB
            )
        if config.loss.dense:
            with nn.part("patch_readout"):
                metrics["dense"] = model.patch_readout.loss(image.features_BPD, image.patches_BPX)
            loss += config.loss.dense * metrics["dense"]
        return loss, metrics

    def tokenizer(
        model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        with nn.part("tokenizer"):
            # One key for all rows: the stochastic codebook samples over the whole array
            # (SimVq._assign).
            out = model.tokenizer(scale_pixels(batch["tokenizer_pixels"]), key=keys_B[0])
        # Divided by the features' variance: predicting their mean has error 1 at any scale of the
        # encoder.
        variance = jnp.mean((out.teacher_BND - out.teacher_BND.mean(axis=(0, 1))) ** 2)
        reconstruction = jnp.mean((out.reconstructed_BND - out.teacher_BND) ** 2) / variance
        loss = (
            reconstruction
            + out.codebook_loss
            + config.loss.commitment * out.commitment_loss
            + config.loss.code_entropy * out.entropy_gap
        )
        return loss, {
            "reconstruction": reconstruction,
            "commitment": out.commitment_loss,
            "entropy_gap": out.entropy_gap,
            "usage": out.usage,
            "perplexity": out.perplexity,
        }

    def joint(
        model: Blip3o, batch: Batch, keys_B: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return joint_loss(
            model, batch, keys_B, loss=config.loss, image_token_offset=image_token_offset
        )

    return {
        "autoencoder": autoencoder,
        "contrastive": contrastive,
        "tokenizer": tokenizer,
        "joint": joint,
    }[config.stage]


def make_preview(
    config: Config, image_token_offset: int
) -> Callable[[Blip3o, Batch, jax.Array], jax.Array] | None:
    """Return (model, batch, keys) -> images in [0, 1] that show the stage's progress, None for
    stages without images.
    """

    def autoencoder(model: Blip3o, batch: Batch, keys_B: jax.Array) -> jax.Array:
        return jnp.concatenate(
            [batch["pixels"] / 255, model.pixels(model.latents(batch["pixels"]))], axis=2
        )

    def joint(model: Blip3o, batch: Batch, keys_B: jax.Array) -> jax.Array:
        return joint_preview(
            model, batch, keys_B, loss=config.loss, image_token_offset=image_token_offset
        )

    return (
        {"autoencoder": autoencoder, "joint": joint}.get(config.stage) if config.preview else None
    )
