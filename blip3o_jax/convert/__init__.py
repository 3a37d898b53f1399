"""Import published PyTorch weights, export trained ones, and verify both."""
