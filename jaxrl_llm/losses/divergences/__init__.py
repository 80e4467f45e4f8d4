"""Divergences between policies, each with a stated gradient."""
