"""Convert text to ids and back: text tokenizers and the joint text-and-image vocabulary."""
