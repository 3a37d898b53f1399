"""Map text and image ids to hidden states and logits: the autoregressive transformer."""
