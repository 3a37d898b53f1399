"""Score images against their prompts."""
