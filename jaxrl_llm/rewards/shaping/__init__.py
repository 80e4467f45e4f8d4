"""Rewards changed by how a completion looks."""
