"""Advantages relative to the other samples of the same prompt."""
