"""Compare the same weights and work in JAX and in PyTorch, interleaved."""
