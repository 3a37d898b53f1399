"""Rewards: what an image is worth beside its prompt."""
