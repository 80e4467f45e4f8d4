"""What is added to an objective to keep the policy in shape: entropy, balance."""
