"""Weights of `diffusers.SanaTransformer2DModel` as this package's tree: one declarative table, every key consumed."""

import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import config
from blip3o_jax.dit.sana import SanaTransformer

# torch layout -> ours
LAYOUTS = {
    "same": lambda w: w,
    "linear": lambda w: w.T,  # [out, in] -> [in, out]
    "conv": lambda w: w.transpose(2, 3, 1, 0),  # [out, in, kh, kw] -> [kh, kw, in, out]
    "conv1x1": lambda w: w[:, :, 0, 0].T,  # [out, in, 1, 1] -> [in, out]
}

# torch key ("{i}" a block) -> (path, layout)
TABLE = {
    "patch_embed.proj.weight": ("patch_embed/kernel", "conv"),
    "patch_embed.proj.bias": ("patch_embed/bias", "same"),
    "time_embed.emb.timestep_embedder.linear_1.weight": ("time_embed/linear_1/kernel", "linear"),
    "time_embed.emb.timestep_embedder.linear_1.bias": ("time_embed/linear_1/bias", "same"),
    "time_embed.emb.timestep_embedder.linear_2.weight": ("time_embed/linear_2/kernel", "linear"),
    "time_embed.emb.timestep_embedder.linear_2.bias": ("time_embed/linear_2/bias", "same"),
    "time_embed.linear.weight": ("time_embed/modulation/kernel", "linear"),
    "time_embed.linear.bias": ("time_embed/modulation/bias", "same"),
    "caption_projection.linear_1.weight": ("caption_projection/linear_1/kernel", "linear"),
    "caption_projection.linear_1.bias": ("caption_projection/linear_1/bias", "same"),
    "caption_projection.linear_2.weight": ("caption_projection/linear_2/kernel", "linear"),
    "caption_projection.linear_2.bias": ("caption_projection/linear_2/bias", "same"),
    "caption_norm.weight": ("caption_norm/scale", "same"),
    "transformer_blocks.{i}.scale_shift_table": ("blocks/scale_shift_table", "same"),
    "transformer_blocks.{i}.attn1.to_q.weight": ("blocks/self_attention/q/kernel", "linear"),
    "transformer_blocks.{i}.attn1.to_k.weight": ("blocks/self_attention/k/kernel", "linear"),
    "transformer_blocks.{i}.attn1.to_v.weight": ("blocks/self_attention/v/kernel", "linear"),
    "transformer_blocks.{i}.attn1.to_out.0.weight": ("blocks/self_attention/o/kernel", "linear"),
    "transformer_blocks.{i}.attn1.to_out.0.bias": ("blocks/self_attention/o/bias", "same"),
    "transformer_blocks.{i}.attn1.norm_q.weight": ("blocks/self_attention/q_norm/scale", "same"),
    "transformer_blocks.{i}.attn1.norm_k.weight": ("blocks/self_attention/k_norm/scale", "same"),
    "transformer_blocks.{i}.attn2.to_q.weight": ("blocks/cross_attention/q/kernel", "linear"),
    "transformer_blocks.{i}.attn2.to_q.bias": ("blocks/cross_attention/q/bias", "same"),
    "transformer_blocks.{i}.attn2.to_k.weight": ("blocks/cross_attention/k/kernel", "linear"),
    "transformer_blocks.{i}.attn2.to_k.bias": ("blocks/cross_attention/k/bias", "same"),
    "transformer_blocks.{i}.attn2.to_v.weight": ("blocks/cross_attention/v/kernel", "linear"),
    "transformer_blocks.{i}.attn2.to_v.bias": ("blocks/cross_attention/v/bias", "same"),
    "transformer_blocks.{i}.attn2.to_out.0.weight": ("blocks/cross_attention/o/kernel", "linear"),
    "transformer_blocks.{i}.attn2.to_out.0.bias": ("blocks/cross_attention/o/bias", "same"),
    "transformer_blocks.{i}.attn2.norm_q.weight": ("blocks/cross_attention/q_norm/scale", "same"),
    "transformer_blocks.{i}.attn2.norm_k.weight": ("blocks/cross_attention/k_norm/scale", "same"),
    "transformer_blocks.{i}.ff.conv_inverted.weight": ("blocks/ffn/expand/kernel", "conv1x1"),
    "transformer_blocks.{i}.ff.conv_inverted.bias": ("blocks/ffn/expand/bias", "same"),
    "transformer_blocks.{i}.ff.conv_depth.weight": ("blocks/ffn/depthwise/kernel", "conv"),
    "transformer_blocks.{i}.ff.conv_depth.bias": ("blocks/ffn/depthwise/bias", "same"),
    "transformer_blocks.{i}.ff.conv_point.weight": ("blocks/ffn/contract/kernel", "conv1x1"),
    "scale_shift_table": ("scale_shift_table", "same"),
    "proj_out.weight": ("proj_out/kernel", "linear"),
    "proj_out.bias": ("proj_out/bias", "same"),
}

# What this package adds to the fields of the diffusers class.
OWN_FIELDS = {"dtype", "param_dtype", "remat", "unroll"}


def torch_model(cfg: config.SanaConfig, seed: int = 0) -> diffusers.SanaTransformer2DModel:
    """float32, every parameter random, biases, norms and tables included, so that a forgotten or swapped one shows."""
    torch.manual_seed(seed)
    model = diffusers.SanaTransformer2DModel(**{k: v for k, v in vars(cfg).items() if k not in OWN_FIELDS}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            random = torch.randn_like(p)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(1 + 0.3 * random if "norm" in name else 0.3 * random if "bias" in name else random * fan_in**-0.5)
    return model


def convert(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torch name -> tensor (weights or gradients), as path -> array, blocks stacked. KeyError for a name not in the table."""
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in named.items():
        path, layout = TABLE[re.sub(r"^(transformer_blocks)\.\d+\.", r"\1.{i}.", key)]
        index = re.match(r"transformer_blocks\.(\d+)\.", key)
        blocks.setdefault(path, {})[int(index[1]) if index else 0] = LAYOUTS[layout](tensor.detach().numpy())
    return {
        path: np.stack([arrays[i] for i in range(len(arrays))]) if path.startswith("blocks/") else arrays[0]
        for path, arrays in blocks.items()
    }


def flat(tree) -> dict[str, jax.Array]:
    """An NNX state (of parameters or gradients) as path -> array."""
    return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.as_pure(tree))}


def jax_model(torch_model: diffusers.SanaTransformer2DModel, cfg: config.SanaConfig) -> SanaTransformer:
    """The same network here, with the same weights; every parameter of either side has its counterpart."""
    model = nnx.eval_shape(lambda: SanaTransformer(cfg, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    arrays = convert(torch_model.state_dict())
    shapes = {path: tuple(value.shape) for path, value in flat(state).items()}
    assert {path: array.shape for path, array in arrays.items()} == shapes
    pure = {tuple(path.split("/")): jnp.asarray(array) for path, array in arrays.items()}
    nnx.replace_by_pure_dict(state, nnx.traversals.unflatten_mapping(pure))
    nnx.update(model, state)
    return model
