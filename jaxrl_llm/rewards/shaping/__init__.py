"""Reward shaping: length, confidence, noise, normalisation."""
