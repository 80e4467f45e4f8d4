"""Combination of several reward components into one reward."""
