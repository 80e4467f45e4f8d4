"""Likelihood of given tokens."""
