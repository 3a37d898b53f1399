"""Encode pixels to latents and back: the deep-compression autoencoder and its loss."""
