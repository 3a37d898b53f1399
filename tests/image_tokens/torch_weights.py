"""Random weights for a torch module."""

import torch


def randomise(torch_module, seed=0):
    """Make every parameter random, norms and biases too: a mixed-up pair must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in torch_module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(
                1 + 0.2 * noise
                if is_scale
                else noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
            )
    return torch_module
