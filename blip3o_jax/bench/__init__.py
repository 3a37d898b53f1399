"""Measurements: beside PyTorch (peer.py), of conversions (conversion.py), of strategies on TPUs (sharding.py)."""
