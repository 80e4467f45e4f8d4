"""Judges: models that rate completions."""
