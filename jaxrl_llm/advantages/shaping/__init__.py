"""Advantages corrected by something else that is known of a completion."""
