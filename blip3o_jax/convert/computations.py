"""Define what a part computes in PyTorch and in JAX, for a comparison of the outputs (compare.py).

Inputs are seeded numpy arrays, images and latents as [B, H, W, C]; PyTorch's side gets them as
[B, C, H, W]. Legend: B batch, L row length, N image tokens, T condition tokens, D width, C
channels, H W image or latent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from blip3o_jax.blip3o import Blip3o
from blip3o_jax.config import LossConfig, ModelConfig
from blip3o_jax.convert import torch_model
from blip3o_jax.convert.source import TorchSource
from blip3o_jax.convert.tables import CONVERTED_PARTS
from blip3o_jax.dit.protocol import Condition
from blip3o_jax.part_registry import PART_TABLE
from blip3o_jax.text.vocabulary import Vocabulary
from blip3o_jax.train.joint_loss import joint_loss, sample_training_noise

Arrays = dict[str, np.ndarray]
# Small, since reading weights takes most of the time; larger than any kernel, so that every weight
# affects the outputs.
ROW_LENGTH = 24
LATENT_SIZE = 8


@dataclasses.dataclass(frozen=True)
class PartComputation:
    """Hold a computation from `inputs` to named outputs, as PyTorch and JAX functions.

    `valid_BL` is the mask of the AR's positions that are not padding.
    """

    inputs: Arrays
    torch: Callable[[Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    jax: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]
    valid_BL: np.ndarray | None = None

    def without_padding(self, x: np.ndarray) -> np.ndarray:
        """Return `x` without padding positions if it is an AR output [B, L, ...]."""
        masked = self.valid_BL is not None and x.shape[:2] == self.valid_BL.shape
        return x[self.valid_BL] if masked else x


def part_computations(part: str, source: TorchSource, seed: int) -> list[PartComputation]:
    """Return the computations to compare a part in; inputs depend only on seed and part."""
    cfg = source.config.model
    rng = np.random.default_rng([seed, CONVERTED_PARTS.index(part)])
    if part == "ar":
        return [_ar_computation(cfg, shared_vocab_size(source), rng)]
    if part == "tokenizer":
        return _tokenizer_computations(cfg, rng)
    if part == "dit":
        return [_dit_computation(cfg, rng)]
    if part == "vae":
        return _vae_computations(cfg, rng)
    return [_connector_computation(part, cfg, rng)]


def shared_vocab_size(source: TorchSource) -> int:
    """Return the number of ids with rows on both sides.

    The rows of image tokens are missing in the files if the import initialised them.
    """
    return (
        source.text_rows
        if "image_embeddings" in source.initialise
        else source.config.model.ar.vocab_size
    )


def _ar_computation(cfg: ModelConfig, ids: int, rng: np.random.Generator) -> PartComputation:
    """Return a computation on three rows: full, padded right, and padded left."""
    index_L = np.arange(ROW_LENGTH)
    # Both sides of padding: an error in positions or masks shows in one of them.
    segments_BL = np.stack([index_L >= 0, index_L < ROW_LENGTH - 5, index_L >= 7]).astype(np.int32)
    inputs = {
        "tokens": rng.integers(0, ids, segments_BL.shape, np.int32),
        "segments": segments_BL,
        "positions": np.maximum(segments_BL.cumsum(1) - 1, 0).astype(np.int32),
    }

    def torch_outputs(
        model: torch_model.Blip3o, x: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        hidden_BLD = model.hidden(x["tokens"], x["positions"], x["segments"])
        return {"hidden states": hidden_BLD, "logits": model.ar.lm_head(hidden_BLD)[..., :ids]}

    def jax_outputs(model: Blip3o, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        hidden_BLD = model.hidden(x["tokens"], x["positions"], x["segments"])
        return {"hidden states": hidden_BLD, "logits": model.ar.logits(hidden_BLD)[..., :ids]}

    return PartComputation(inputs, torch_outputs, jax_outputs, segments_BL > 0)


def _connector_computation(
    part: str, cfg: ModelConfig, rng: np.random.Generator
) -> PartComputation:
    """Return a computation on two rows, one of them dropped."""
    arguments = PART_TABLE[part].arguments
    assert arguments is not None, "a connector is made from its widths"
    _, d_in, _ = arguments(cfg)[0]
    inputs = {
        "x": _normal(rng, 2, cfg.tokenizer.num_tokens + 1, d_in),
        "keep": np.array([True, False]),
    }
    both = lambda model, x: {"condition": getattr(model, part)(x["x"], x["keep"])}
    return PartComputation(inputs, both, both)


def _tokenizer_computations(cfg: ModelConfig, rng: np.random.Generator) -> list[PartComputation]:
    size, tokens = cfg.tokenizer.image_size, cfg.tokenizer.num_tokens
    encode = lambda model, x: {
        "features": model.tokenizer.features(x["images"]),
        "indices": model.tokenizer.encode(x["images"]),
    }
    decode = lambda model, x: {"decoded features": model.tokenizer.decode(x["indices"])}
    images = {"images": rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)}
    indices = {"indices": rng.integers(0, cfg.tokenizer.codebook_size, (2, tokens), np.int32)}
    return [PartComputation(images, encode, encode), PartComputation(indices, decode, decode)]


def latent_size(cfg: ModelConfig) -> int:
    """Return a small latent side that is a multiple of the patch size."""
    patch = cfg.dit.patch_size
    return max(min(LATENT_SIZE, cfg.dit.sample_size) // patch, 1) * patch


def _dit_computation(cfg: ModelConfig, rng: np.random.Generator) -> PartComputation:
    """Return a computation on two latents, higher than wide, at fractional timesteps.

    Large timesteps are not compared: the timestep multiplies the rounding error of an embedding's
    frequency, and PyTorch's exp is inexact for 2 of the 128 frequencies.
    """
    side = latent_size(cfg)
    patch = cfg.dit.patch_size
    inputs = {
        "z": _normal(rng, 2, side + patch, side, cfg.dit.in_channels),
        "timestep": np.array([187.4375, 62.8125], np.float32),
        "condition": _normal(rng, 2, cfg.tokenizer.num_tokens + 1, cfg.dit.caption_channels),
    }
    return PartComputation(
        inputs,
        lambda model, x: {"velocity": model.velocity(x["z"], x["timestep"], x["condition"])},
        lambda model, x: {
            "velocity": model.velocity(x["z"], x["timestep"], Condition(x["condition"]))
        },
    )


def _vae_computations(cfg: ModelConfig, rng: np.random.Generator) -> list[PartComputation]:
    """Return computations on a square image, a wide image, and wide latents."""
    factor = cfg.vae.spatial_compression
    channels = cfg.vae.latent_channels

    def encode(width: int) -> PartComputation:
        name = f"encode to 2 x {width}"
        images = {
            "images": rng.uniform(-1, 1, (1, 2 * factor, width * factor, 3)).astype(np.float32)
        }
        return PartComputation(
            images,
            lambda model, x: {name: model.encode_image(x["images"])},
            lambda model, x: {name: model.vae.encode(x["images"])},
        )

    decode = PartComputation(
        {"latents": _normal(rng, 1, 2, 3, channels)},
        lambda model, x: {"decode 2 x 3": model.decode_latents(x["latents"])},
        lambda model, x: {"decode 2 x 3": model.vae.decode(x["latents"])},
    )
    return [encode(2), encode(3), decode]


def joint_computation(source: TorchSource, seed: int) -> PartComputation:
    """Return the computation of the joint losses on random codes and latents.

    Each row has two noise samples, which both sides share.
    """
    cfg = source.config.model
    rng = np.random.default_rng([seed, len(CONVERTED_PARTS)])
    image_token_offset = Vocabulary(
        source.tokenizer, cfg.tokenizer.codebook_size
    ).image_token_offset
    loss = LossConfig(condition_dropout=0.5, flow_samples=2)
    keys_B = jax.random.split(jax.random.key(seed), 2)
    inputs = _joint_batch(cfg, image_token_offset, rng)
    shape = inputs["latents"].shape[1:]
    training_noise = jax.jit(sample_training_noise, static_argnums=(1, 2, 3))(
        keys_B, shape, cfg, loss
    )
    draws = {
        "noise": training_noise.noise.reshape(-1, *shape),
        "sigma": training_noise.sigma.reshape(-1),
        "keep": training_noise.keep_B,
    }

    def torch_outputs(
        model: torch_model.Blip3o, x: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        ce, flow = model.joint_loss(
            x["tokens"],
            x["loss_mask"],
            x["image_span"],
            x["codes"],
            x["latents"],
            x["noise"],
            x["sigma"],
            image_token_offset=image_token_offset,
            keep_B=x["keep"],
            positions_BL=x["positions"],
            segment_ids_BL=x["segment_ids"],
        )
        return {"cross entropy": ce, "flow loss": flow}

    def jax_outputs(model: Blip3o, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        _, metrics = joint_loss(model, x, keys_B, loss=loss, image_token_offset=image_token_offset)
        return {"cross entropy": metrics["ce"], "flow loss": metrics["flow"]}

    inputs |= {name: np.asarray(x) for name, x in draws.items()}
    return PartComputation(inputs, torch_outputs, jax_outputs, inputs["segment_ids"] > 0)


def _joint_batch(cfg: ModelConfig, image_token_offset: int, rng: np.random.Generator) -> Arrays:
    """Return a batch of two rows as data/sequence.py lays them out.

    A row is text, scale token, image tokens, two end ids and padding.
    """
    tokens = cfg.tokenizer.num_tokens
    side = latent_size(cfg)
    span_B = np.array([8, 13], np.int32)
    index_L = np.arange(span_B.max() + tokens + 4, dtype=np.int32)
    valid_BL = index_L < span_B[:, None] + tokens + 3
    loss_mask_BL = (valid_BL & (index_L > span_B[:, None])).astype(np.float32)
    return {
        "tokens": rng.integers(0, image_token_offset, valid_BL.shape, np.int32),
        "loss_mask": loss_mask_BL,
        "segment_ids": valid_BL.astype(np.int32),
        "positions": np.broadcast_to(index_L, valid_BL.shape),
        "image_span": span_B,
        "label_count": np.full(2, loss_mask_BL.sum() / 2, np.float32),
        "codes": rng.integers(0, cfg.tokenizer.codebook_size, (2, tokens), np.int32),
        "latents": _normal(rng, 2, side, side, cfg.vae.latent_channels),
    }


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)
