"""Regression of a value model."""
