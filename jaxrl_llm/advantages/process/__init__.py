"""Advantages of the turns and steps of a completion."""
