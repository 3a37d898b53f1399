"""Latents <-> pixels: the deep-compression autoencoder and its reconstruction loss."""
