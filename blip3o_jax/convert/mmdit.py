"""Convert MMDiT: `diffusers.SD3Transformer2DModel` without dual attention."""

from typing import Any

import numpy as np

from blip3o_jax.config import MMDiTConfig
from blip3o_jax.convert.conversions import Conversion
from blip3o_jax.convert.stock_config import REQUIRED, ConfigLayout
from blip3o_jax.convert.tables import Rule, linear, norm

LAYOUT = ConfigLayout(
    MMDiTConfig,
    fields={
        "sample_size": REQUIRED,
        "patch_size": REQUIRED,
        "in_channels": REQUIRED,
        "out_channels": REQUIRED,
        "num_layers": REQUIRED,
        "attention_head_dim": REQUIRED,
        "num_attention_heads": REQUIRED,
        "joint_attention_dim": REQUIRED,
        "caption_projection_dim": REQUIRED,
        "pooled_projection_dim": REQUIRED,
        "pos_embed_max_size": REQUIRED,
        "qk_norm": None,
    },
    fixed={"_class_name": ("SD3Transformer2DModel",), "dual_attention_layers": ((), [])},
    ignored=frozenset(),
)


def rules(cfg: MMDiTConfig) -> list[Rule]:
    """Return the rules of `diffusers.SD3Transformer2DModel`. Its last block is not of the stack."""
    last = f"transformer_blocks.{cfg.num_layers - 1}."
    time = "time_text_embed."
    return [
        *linear("pos_embed.proj", "patch_embed", "conv"),
        *linear(f"{time}timestep_embedder.linear_1", "time_embed/linear_1"),
        *linear(f"{time}timestep_embedder.linear_2", "time_embed/linear_2"),
        *linear(f"{time}text_embedder.linear_1", "caption_pooled/linear_1"),
        *linear(f"{time}text_embedder.linear_2", "caption_pooled/linear_2"),
        *linear("context_embedder", "caption_projection"),
        *_latents(cfg, "transformer_blocks.{i}.", "blocks/latents/"),
        *_context(cfg, "transformer_blocks.{i}.", "blocks/context/", whole=True),
        *_latents(cfg, last, "last_block/latents/"),
        *_context(cfg, last, "last_block/context/", whole=False),
        *linear("norm_out.linear", "modulation"),
        *linear("proj_out", "proj_out"),
    ]


def _latents(cfg: MMDiTConfig, torch: str, path: str) -> list[Rule]:
    return [
        *linear(f"{torch}norm1.linear", f"{path}modulation"),
        *(r for n in "qkv" for r in linear(f"{torch}attn.to_{n}", f"{path}attention/{n}")),
        *_norms(cfg, f"{torch}attn.norm_", f"{path}attention/"),
        *linear(f"{torch}attn.to_out.0", f"{path}o"),
        *linear(f"{torch}ff.net.0.proj", f"{path}up"),
        *linear(f"{torch}ff.net.2", f"{path}down"),
    ]


def _context(cfg: MMDiTConfig, torch: str, path: str, *, whole: bool) -> list[Rule]:
    table = [
        *linear(f"{torch}norm1_context.linear", f"{path}modulation"),
        *(r for n in "qkv" for r in linear(f"{torch}attn.add_{n}_proj", f"{path}attention/{n}")),
        *_norms(cfg, f"{torch}attn.norm_added_", f"{path}attention/"),
    ]
    if not whole:
        return table
    return [
        *table,
        *linear(f"{torch}attn.to_add_out", f"{path}o"),
        *linear(f"{torch}ff_context.net.0.proj", f"{path}up"),
        *linear(f"{torch}ff_context.net.2", f"{path}down"),
    ]


def _norms(cfg: MMDiTConfig, torch: str, path: str) -> list[Rule]:
    if cfg.qk_norm is None:
        return []
    return [rule for n in "qk" for rule in norm(f"{torch}{n}", f"{path}{n}_norm")]


def velocity(dit: Any, z: Any, condition: Any, timestep: Any) -> Any:
    """Return the stock class's velocity [B, C, H, W], with the mean of the condition as its pooled
    projection.
    """
    pooled = condition.mean(1)
    return dit(
        z, encoder_hidden_states=condition, pooled_projections=pooled, timestep=timestep
    ).sample


def buffers(cfg: MMDiTConfig) -> dict[str, np.ndarray]:
    """Return the table of positions, which the stock class stores: [1, tokens, width]."""
    from blip3o_jax.dit.mmdit import positions  # imported here, since the tables need no jax

    side = cfg.pos_embed_max_size
    return {"pos_embed.pos_embed": positions(cfg, (side, side))[None]}


CONVERSION = Conversion(
    rules,
    "diffusers:SD3Transformer2DModel",
    prefix="model.mmdit.",
    layers=("JointTransformerBlock",),
    layout=LAYOUT,
    velocity=velocity,
    buffers=buffers,
)
