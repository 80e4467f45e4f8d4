"""Policy losses: from log-probabilities and advantages to a gradient of the policy."""
