"""Measurements: beside PyTorch (peer/), of conversions (conversion.py), of strategies on TPUs
(sharding/), which are predicted from the compiled program (cost/).
"""
