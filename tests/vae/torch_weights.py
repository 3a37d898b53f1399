"""`diffusers.AutoencoderDC` with the sizes of a configuration and random weights."""

import dataclasses

import diffusers
import torch

from blip3o_jax import config

SHARED_FIELDS = {field.name for field in dataclasses.fields(config.DcAeConfig)} - {
    "dtype",
    "param_dtype",
    "remat",
    "unroll",
}


def torch_class(cfg: config.DcAeConfig) -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(**{name: getattr(cfg, name) for name in SHARED_FIELDS}).eval()


def torch_model(cfg: config.DcAeConfig, seed: int = 0) -> diffusers.AutoencoderDC:
    """Return the stock model in float32 with every parameter random, biases and norms included, so
    that a forgotten or swapped one shows.
    """
    torch.manual_seed(seed)
    model = torch_class(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            random = torch.randn_like(p)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            scale = name.endswith("weight") and p.ndim == 1
            p.copy_(
                1 + 0.3 * random
                if scale
                else 0.3 * random
                if p.ndim == 1
                else random * fan_in**-0.5
            )
    return model
