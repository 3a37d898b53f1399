"""Map images to discrete tokens and features: encoders and quantizers."""
