"""Advantages modified by another property of a completion: confidence, entropy, rank, solve rate."""
