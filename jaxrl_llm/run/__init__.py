"""A run: from a config to objects, the one loop over its stages, checkpoints, and what a composed step consists of."""
