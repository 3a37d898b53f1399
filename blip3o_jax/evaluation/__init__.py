"""Score a model on a suite of prompts or images, and report the results."""
