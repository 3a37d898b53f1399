"""A reward whose module has a mistake. Not a test."""

score = 1 / 0
