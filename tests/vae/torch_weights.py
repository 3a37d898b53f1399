"""Weights of `diffusers.AutoencoderDC` as this package's tree: one declarative table, every key consumed."""

import dataclasses
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from blip3o_jax import config
from blip3o_jax.vae.dc_ae import DcAe

# torch layout -> ours
LAYOUTS = {
    "same": lambda w: w,
    "linear": lambda w: w.T,  # [out, in] -> [in, out]
    "conv": lambda w: w.transpose(2, 3, 1, 0),  # [out, in, kh, kw] -> [kh, kw, in, out]
    "conv1x1": lambda w: w[:, :, 0, 0].T,  # [out, in, 1, 1] -> [in, out]
}

# What a stage's modules hold. {s}: a scale.
MODULES = {
    "conv.weight": ("resample/conv/kernel", "conv"),
    "conv.bias": ("resample/conv/bias", "same"),
    "conv1.weight": ("blocks/conv1/kernel", "conv"),
    "conv1.bias": ("blocks/conv1/bias", "same"),
    "conv2.weight": ("blocks/conv2/kernel", "conv"),
    "norm.weight": ("blocks/norm/scale", "same"),
    "norm.bias": ("blocks/norm/bias", "same"),
    "attn.to_q.weight": ("blocks/attention/to_q/kernel", "linear"),
    "attn.to_k.weight": ("blocks/attention/to_k/kernel", "linear"),
    "attn.to_v.weight": ("blocks/attention/to_v/kernel", "linear"),
    "attn.to_qkv_multiscale.{s}.proj_in.weight": ("blocks/attention/scales/{s}/proj_in/kernel", "conv"),
    "attn.to_qkv_multiscale.{s}.proj_out.weight": ("blocks/attention/scales/{s}/proj_out/kernel", "conv"),
    "attn.to_out.weight": ("blocks/attention/to_out/kernel", "linear"),
    "attn.norm_out.weight": ("blocks/attention/norm/scale", "same"),
    "attn.norm_out.bias": ("blocks/attention/norm/bias", "same"),
    "conv_out.conv_inverted.weight": ("blocks/glu/expand/kernel", "conv1x1"),
    "conv_out.conv_inverted.bias": ("blocks/glu/expand/bias", "same"),
    "conv_out.conv_depth.weight": ("blocks/glu/depthwise/kernel", "conv"),
    "conv_out.conv_depth.bias": ("blocks/glu/depthwise/bias", "same"),
    "conv_out.conv_point.weight": ("blocks/glu/project/kernel", "conv1x1"),
    "conv_out.norm.weight": ("blocks/glu/norm/scale", "same"),
    "conv_out.norm.bias": ("blocks/glu/norm/bias", "same"),
}

# torch key -> (path, layout). {i}: a stage; {j}: a module of it, of which those with one path are stacked in order.
TABLE = {
    f"{side}.{conv}.{inner}{name}": (f"{side}/{conv}/{inner.replace('.', '/')}{ours}", layout)
    for side in ("encoder", "decoder")
    for conv in ("conv_in", "conv_out")
    for inner in ("", "conv.")  # an outermost stage without blocks makes it a down or up block
    for name, ours, layout in (("weight", "kernel", "conv"), ("bias", "bias", "same"))
}
TABLE |= {
    f"{side}.{stages}.{{i}}.{{j}}.{name}": (f"{side}/stages/{{i}}/{path}", layout)
    for side, stages in (("encoder", "down_blocks"), ("decoder", "up_blocks"))
    for name, (path, layout) in MODULES.items()
}
TABLE |= {
    "decoder.norm_out.weight": ("decoder/norm_out/scale", "same"),
    "decoder.norm_out.bias": ("decoder/norm_out/bias", "same"),
}
RULES = [(re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(key))), *rule) for key, rule in TABLE.items()]

SHARED_FIELDS = {field.name for field in dataclasses.fields(config.DcAeConfig)} - {"dtype", "param_dtype", "remat", "unroll"}


def torch_class(cfg: config.DcAeConfig) -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(**{name: getattr(cfg, name) for name in SHARED_FIELDS}).eval()


def torch_model(cfg: config.DcAeConfig, seed: int = 0) -> diffusers.AutoencoderDC:
    """float32, every parameter random, biases and norms included, so that a forgotten or swapped one shows."""
    torch.manual_seed(seed)
    model = torch_class(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            random = torch.randn_like(p)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            scale = name.endswith("weight") and p.ndim == 1
            p.copy_(1 + 0.3 * random if scale else 0.3 * random if p.ndim == 1 else random * fan_in**-0.5)
    return model


def convert(named: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """torch name -> tensor (weights or gradients), as path -> array, blocks stacked."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in named.items():
        hits = [(match.groupdict(), path, layout) for rule, path, layout in RULES if (match := rule.fullmatch(key))]
        assert len(hits) == 1, f"{key} has {len(hits)} rules"
        fields, path, layout = hits[0]
        found.setdefault(path.format(**fields), {})[int(fields.get("j", 0))] = LAYOUTS[layout](tensor.detach().numpy())
    return {
        path: np.stack([arrays[j] for j in sorted(arrays)]) if "/blocks/" in path else arrays.popitem()[1]
        for path, arrays in found.items()
    }


def flat(tree) -> dict[str, jax.Array]:
    """An NNX state (of parameters or gradients) as path -> array."""
    return {"/".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.as_pure(tree))}


def jax_model(torch_model: diffusers.AutoencoderDC, cfg: config.DcAeConfig) -> DcAe:
    """The same network here, with the same weights; every parameter of either side has its counterpart."""
    model = nnx.eval_shape(lambda: DcAe(cfg, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    arrays = convert(torch_model.state_dict())
    shapes = {path: tuple(value.shape) for path, value in flat(state).items()}
    assert {path: array.shape for path, array in arrays.items()} == shapes
    for path, variable in nnx.to_flat_state(state):
        variable.set_value(jnp.asarray(arrays["/".join(map(str, path))]))
    nnx.update(model, state)
    return model
