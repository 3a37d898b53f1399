"""HTTP services within limits, independent of what they serve."""
