"""Judges: models that say how good a completion is."""
