"""Train the networks: stages, optimizers, checkpoints, metrics and the training loop."""
