"""Define a reward whose module raises. Not a test."""

score = 1 / 0
