"""Weights and masks of tokens."""
