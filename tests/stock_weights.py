"""Convert weights and gradients of stock PyTorch modules to this package's trees by the converter's
tables.

A module is one part of a model: its configuration, whose class names the part, is put into that of
a whole model.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import config
from blip3o_jax.config import ModelConfig
from blip3o_jax.convert import conversions, mapping
from blip3o_jax.image_tokens.siglip2 import SiglipVision
from blip3o_jax.part_registry import PART_TABLE, Family, resolve


def _autoencoder_of(channels: int) -> config.DcAeConfig:
    """Return an autoencoder with latents of so many channels: its widths have to be multiples of
    them.
    """
    widths = (channels,) * 6
    return config.DcAeConfig(
        latent_channels=channels,
        attention_head_dim=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
    )


def whole(part: str, cfg: Any) -> ModelConfig:
    """Return a model whose `part` has the settings `cfg`, other parts such that they go
    together."""
    others: dict[str, Any] = {}
    if part == "dit":
        others["vae"] = _autoencoder_of(cfg.in_channels)
        others["image_size"] = cfg.patch_size * others["vae"].spatial_compression
    if part == "vae":
        others["dit"] = config.SanaConfig(in_channels=cfg.latent_channels)
        others["image_size"] = cfg.spatial_compression
    return ModelConfig(**{part: cfg}, **others)


def row(cfg: Any) -> tuple[str, Family]:
    """Return the part that `cfg` is settings of, and its row in the table of parts."""
    found = [
        (part, family)
        for part, spec in PART_TABLE.items()
        for family in spec.families
        if spec.field == part and type(cfg) is family.settings
    ]
    return found[0]


def convert(named: Mapping[str, torch.Tensor], cfg: object) -> dict[str, np.ndarray]:
    """Convert torch name -> tensor (weights or gradients) to path -> array: layers stacked,
    vocabulary rows padded with zeros. Every tensor has its parameter and every parameter its
    tensor."""
    if isinstance(cfg, config.SiglipVisionConfig):
        return _convert_encoder(named, cfg)
    part, _ = row(cfg)
    model = whole(part, cfg)
    computed = conversions.conversion_of(part, model).buffers(cfg)
    named = {key: x for key, x in named.items() if key not in computed}
    if getattr(cfg, "tie_word_embeddings", False):
        named = {key: x for key, x in named.items() if key != "lm_head.weight"}
    assert named.keys() == mapping.tensor_shapes(part, model).keys()
    return mapping.to_jax(part, model, {key: x.detach().numpy() for key, x in named.items()})


def _convert_encoder(
    named: Mapping[str, torch.Tensor], cfg: config.SiglipVisionConfig
) -> dict[str, np.ndarray]:
    """Convert the vision tokenizer's encoder alone, within a tokenizer of zeros."""
    tokenizer = config.TaTokConfig(encoder=cfg, bottleneck_dim=1, codebook_size=1)
    rest = mapping.tensor_shapes("tokenizer", ModelConfig(tokenizer=tokenizer))
    zeros = {
        key: torch.zeros(shape) for key, shape in rest.items() if not key.startswith("encoder.")
    }
    arrays = convert(zeros | {f"encoder.{key}": x for key, x in named.items()}, tokenizer)
    return {
        path.removeprefix("encoder/"): x
        for path, x in arrays.items()
        if path.startswith("encoder/")
    }


def jax_model(module: torch.nn.Module, cfg: object) -> nnx.Module:
    """Return this package's network with the module's weights."""
    is_encoder = isinstance(cfg, config.SiglipVisionConfig)
    cls = SiglipVision if is_encoder else resolve(row(cfg)[1].network)
    model = nnx.eval_shape(lambda: cls(cfg, rngs=nnx.Rngs(0)))
    arrays = convert(module.state_dict(), cfg)
    state = nnx.state(model)
    assert {path: array.shape for path, array in arrays.items()} == {
        path: x.shape for path, x in flat(state).items()
    }
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(arrays["/".join(map(str, path))]))
    nnx.update(model, state)
    return model


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return torch name -> gradient of the last backward pass, zeros where none arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


def flat(tree: object) -> dict[str, jax.Array]:
    """Return an NNX state (of parameters or gradients) as path -> array."""
    return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.as_pure(tree))}
