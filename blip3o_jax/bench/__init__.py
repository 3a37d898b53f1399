"""Measurements: against the same model in PyTorch (peer.py), of conversion (conversion.py), of strategies on TPUs (sharding.py)."""
