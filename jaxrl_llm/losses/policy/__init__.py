"""Policy losses: log-probabilities and advantages -> a gradient of the policy."""
