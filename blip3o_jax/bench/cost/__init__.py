"""What a compiled program costs: its scheduled HLO, read and walked."""
