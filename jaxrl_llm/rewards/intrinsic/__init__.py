"""Rewards that a policy gives itself: from what it, or a network made from it, says of answers."""
