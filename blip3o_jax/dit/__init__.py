"""Map noise and conditions to latents: the diffusion transformer, its loss and its sampler."""
