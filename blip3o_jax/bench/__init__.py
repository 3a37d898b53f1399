"""Measurements: against the same model in PyTorch (peer.py)."""
