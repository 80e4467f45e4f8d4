"""Rewards from the policy's own probabilities, hidden states and votes, without a verifier."""
