"""Advantages that use the estimates of a value model."""
