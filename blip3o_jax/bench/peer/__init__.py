"""The same weights and work in JAX and in PyTorch, in turns."""
