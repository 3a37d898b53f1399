"""The autoregressive transformer: text and image ids -> hidden states and logits."""
