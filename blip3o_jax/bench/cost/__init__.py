"""Predict the cost of a compiled program by walking its scheduled HLO."""
