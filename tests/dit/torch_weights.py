"""`diffusers.SanaTransformer2DModel` with the sizes of a configuration and random weights."""

import diffusers
import torch

from blip3o_jax import config

# What this package adds to the fields of the diffusers class.
OWN_FIELDS = {"dtype", "param_dtype", "remat", "unroll", "lora"}


def torch_model(cfg: config.SanaConfig, seed: int = 0) -> diffusers.SanaTransformer2DModel:
    """Return the stock model in float32 with every parameter random, biases, norms and tables
    included, so that a forgotten or swapped one shows.
    """
    torch.manual_seed(seed)
    model = diffusers.SanaTransformer2DModel(
        **{k: v for k, v in vars(cfg).items() if k not in OWN_FIELDS}
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            random = torch.randn_like(p)
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(
                1 + 0.3 * random
                if "norm" in name
                else 0.3 * random
                if "bias" in name
                else random * fan_in**-0.5
            )
    return model
