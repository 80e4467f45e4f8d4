"""Losses that compare the answers to one prompt with each other."""
