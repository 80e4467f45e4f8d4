"""Regularisers of the policy: entropy, balance of experts."""
