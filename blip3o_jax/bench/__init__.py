"""Measure speed and memory: side by side with PyTorch (peer/), of conversions (conversion.py), and
of strategies on TPUs (sharding/), predicted from the compiled program (cost/)."""
