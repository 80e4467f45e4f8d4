"""Rewards of the turns and steps of a completion."""
